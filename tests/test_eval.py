"""eval.py: intervals and tests, the baseline, the table's figures, and the report over seeds."""
import csv
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import data, eval as evaluation, grpo, sample, sft


@pytest.mark.parametrize("correct, n, low, high", [(0, 100, 0.0, 0.03699), (50, 100, 0.40383, 0.59617),
                                                   (99, 100, 0.94549, 0.99823), (1, 1, 0.20655, 1.0)])
def test_wilson(correct, n, low, high):
    """Bug: the textbook interval p +- 1.96 sqrt(p(1-p)/n), which has width 0 at 0 of 100 and passes 1
    at 99; one that by rounding ends short of the share itself, which no figure can draw (300 of 300)."""
    assert evaluation.wilson(correct, n) == pytest.approx((low, high), abs=1e-4)
    assert all(evaluation.wilson(k, k)[1] == 1 and evaluation.wilson(0, k)[0] == 0 for k in range(1, 400))


@pytest.mark.parametrize("samples, right, k", [(8, [0, 1, 3, 8], 1), (8, [0, 1, 3, 8], 4), (5, [2], 5),
                                               (5, [1], 4)])
def test_pass_at_k(samples, right, k):
    """Bug: 1 - (1 - c/n)^k, drawn with replacement, is too low. The truth: try every choice of k rollouts."""
    def truth(c):
        choices = list(itertools.combinations([1] * c + [0] * (samples - c), k))
        return sum(any(choice) for choice in choices) / len(choices)
    value = evaluation.pass_at_k(right, samples, k)
    assert value == pytest.approx(sum(map(truth, right)) / len(right))
    wrong = sum(1 - (1 - c / samples) ** k for c in right) / len(right)
    assert k in (1, samples) or value > wrong + 1e-3


def test_mcnemar():
    """Bugs: counting problems on which both agree; a one-sided p; p above 1. By hand: 9 gained, 2 lost."""
    hits = [(0, 1)] * 9 + [(1, 0)] * 2 + [(1, 1)] * 50 + [(0, 0)] * 39
    tail = (1 + 11 + 55) / 2 ** 11
    assert evaluation.mcnemar(*zip(*hits)) == pytest.approx(2 * tail)
    assert evaluation.mcnemar([0, 1], [1, 0]) == 1.0 and evaluation.mcnemar([1, 1], [1, 1]) == 1.0


def test_t_interval():
    """Bug: 1.96 in place of Student's 2.776 for five seeds, or the population's standard deviation."""
    mean, low, high = evaluation.t_interval([0.1, 0.3, 0.2, 0.4, 0.5])
    assert (mean, low, high) == pytest.approx((0.3, 0.3 - 0.19633, 0.3 + 0.19633), abs=1e-4)
    assert math.isnan(evaluation.t_interval([0.5])[1])


@pytest.fixture
def told(tiny, monkeypatch):
    """told([texts of problem 1, texts of problem 2 ...]) -> a policy whose rollouts say just that, and whose
    greedy answers the first of each, whatever is asked."""
    def make(texts):
        policy = tiny()

        def generate(policy, prompts, n=1, *arguments, **options):
            encode = lambda text: sample.encode_response(policy.tokenizer, text)
            return [[SimpleNamespace(tokens=encode(text), logprobs=[], stop="eos") for text in group[:n]]
                    for group in texts]
        monkeypatch.setattr(sample, "generate", generate)
        return policy
    return make


def four_answers(problem):
    """Right and sound; right with a step left out; sound in every step with a wrong answer; neither."""
    right = problem.response
    unsound = "\n".join(line for i, line in enumerate(right.split("\n")) if i != 1)  # without its first step
    other = [text.replace(f"\\boxed{{{problem.answer}}}", f"\\boxed{{{problem.answer + 1}}}")
             for text in (right, unsound)]
    assert data.read_answer(unsound) == problem.answer and other[0] != right
    return right, unsound, *other


def test_process_counts_right_answers_with_sound_steps(told):
    """Bugs: process that counts a right answer with an unsound step, or sound steps with a wrong answer;
    rollouts checked against another problem than their own; a bool or a float for a count."""
    problems = list(itertools.islice(data.generate(ops=(3, 4), max_value=100, split="test"), 4))
    answers = [four_answers(problem) for problem in problems]
    scores = evaluation.measure(told([[answers[i][i]] for i in range(4)]), problems)  # one of each kind
    assert (scores["correct"], scores["process"], scores["hits"]) == (2, 1, [1, 1, 0, 0])
    assert type(scores["process"]) is int
    rollouts = evaluation.measure(told(answers), problems, samples=4)["rollouts"]
    assert (rollouts["correct"], rollouts["process"], rollouts["mean"]) == (8, 4, 0.5)
    assert rollouts["histogram"] == [0, 0, 1, 0, 0]
    texts = [[four[1]] for four in answers]
    assert evaluation.measure(told(texts), problems)["process"] == 0  # all right, none sound


def test_figures_of_known_hits(told):
    """Bugs: rates over another number than the problems'; a rollout's hit counted for another problem; hits
    and problems in another order, so that McNemar pairs strangers."""
    answer = "</think>\n<answer>\n\\boxed{{{}}}\n</answer>".format
    problems = [data.Problem("What is it?", x, "", {}) for x in (1, 2, 2, 3, 4)]
    texts = [[answer(1), answer(1), "no"], [answer(9), answer(2), answer(2)], ["no", "no", answer(1)],
             [answer(3)] * 3, [answer(4), answer(4), "no"]]
    policy = told(texts)
    scores = evaluation.measure(policy, problems, samples=3)
    assert scores["hits"] == [1, 0, 0, 1, 1] and (scores["n"], scores["correct"]) == (5, 3)
    assert (scores["accuracy"], scores["format_rate"], scores["majority"]) == (0.6, 0.8, 0.4)
    assert scores["ci95"] == evaluation.wilson(3, 5) and scores["cut_rate"] == 0
    lengths = [len(sample.encode_response(policy.tokenizer, text[0])) for text in texts]
    assert scores["mean_tokens"] == sum(lengths) / 5 and scores["process"] is None
    rollouts = scores["rollouts"]
    assert (rollouts["correct"], rollouts["mean"]) == (9, 0.6) and rollouts["histogram"] == [0.2, 0, 0.6, 0.2]
    assert rollouts["pass_at"] == pytest.approx({1: 0.6, 2: 0.8, 3: 0.8})
    results = [{"path": path, "splits": {"id": {"hits": hits}}}
               for path, hits in (("a", [1, 0, 0, 1, 1]), ("b", [0, 1, 1, 0, 0]), ("c", [1, 1, 1, 1, 1]))]
    found = {(c["before"], c["after"]): c["p"] for c in evaluation.compare(results)}
    assert found == {("a", "b"): 1.0, ("a", "c"): 0.5, ("b", "c"): 0.25}


def test_the_seed_draws_problems_and_rollouts(script, tiny_file, monkeypatch):
    """Bug: --seed, --n, --samples or --max-new-tokens that stop on their way from the command line."""
    seen, measure = [], evaluation.measure

    def spy(policy, problems, *rest, **analyses):
        seen.append(([p.question for p in problems], *rest))
        return measure(policy, problems[:1], 4)
    monkeypatch.setattr(evaluation, "measure", spy)
    for seed in (0, 7):
        result = script("eval.py", "--ckpt", tiny_file, "--n", 5, "--seed", seed, "--max-new-tokens", 9,
                        "--samples", 3, "--ops", 2, 3)
        assert result.returncode == 0, result.stderr
    for (questions, *rest), (seed, ops) in zip(seen, ((0, (2, 3)), (0, (4, 6)), (7, (2, 3)), (7, (4, 6)))):
        stream = data.generate(ops=ops, seed=seed, split="test")
        assert rest == [9, 3, seed] and questions == [p.question for p in itertools.islice(stream, 5)]


def test_process_of_files(told, tmp_path, capsys):
    """Bugs: process counted, as 0, where a question cannot be read back; not counted for files at all."""
    problems = list(itertools.islice(data.generate(ops=(2, 3), max_value=100), 2))
    records = [data.to_record(problem) for problem in problems]
    path = str(tmp_path / "two.jsonl")
    data.write_records(path, records)
    policy = told([[problem.response] for problem in problems])
    assert evaluation.measure(policy, evaluation.read_file(path))["process"] == 2
    records[1]["question"] = "What is six times seven?"
    data.write_records(path, records)
    scores = evaluation.measure(policy, evaluation.read_file(path), samples=1)
    assert scores["correct"] == 2 and scores["process"] is None and scores["rollouts"]["process"] is None
    assert "behaviors" not in scores and f"{path}, line 2" in capsys.readouterr().err
    evaluation.table([{"path": "a.pt", "splits": {path: scores}}])


def test_report_pairs_seeds(tmp_path, script):
    """Bugs: differences of means over other seeds than both methods have; gains mixed up between splits; a
    cell lost or doubled when a file is written to again; process before RL in place of after it."""
    path = str(tmp_path / "results.csv")

    def row(method, seed, stage, correct, split="id"):
        process = None if method == "majority" else correct // 2
        return dict(task="igsm", method=method, seed=seed, stage=stage, split=split, ops="2-4", n=100,
                    correct=correct, process=process)
    rows = [row(*cell) for cell in [
        ("vanilla", 1, "sft", 40), ("vanilla", 1, "rl", 50),
        ("bridge", 1, "sft", 40), ("bridge", 1, "rl", 80),
        ("vanilla", 2, "sft", 30), ("vanilla", 2, "rl", 45),
        ("bridge", 2, "sft", 45), ("bridge", 2, "rl", 90),
        ("bridge", 3, "sft", 10), ("bridge", 3, "rl", 99),  # seed 3 has no partner
        ("majority", 1, "", 11)]]
    evaluation.write_results(path, rows[:5] + [row("vanilla", 1, "rl", 50, "ood")])
    evaluation.write_results(path, rows)
    with open(path) as file:
        assert len(list(csv.DictReader(file))) == len(rows) + 1
    printed = script("eval.py", "--report", path).stdout
    _, low, high = evaluation.t_interval([0.30, 0.30])  # (40 - 10, 45 - 15) points
    gains = f"gain of bridge - gain of vanilla +30.0% [{low:+.1%}, {high:+.1%}]"
    assert f"paired over 2 seeds: {gains}" in printed
    assert "bridge - vanilla +37.5%" in printed  # (80 - 50 + 90 - 45) / 2
    assert "bridge / vanilla 1.79" in printed  # 85 / 47.5
    assert "| id | bridge | 3 | 31.7%" in printed  # (40 + 45 + 10) / 3: its table has all of its own seeds
    assert "| id | vanilla | 2 | 35.0%" in printed and "| 11.0% |" in printed and "| ood |" not in printed
    assert "| 23.5% [" in printed and "| 44.7% [" in printed  # process: (25 + 22) / 2, (40 + 45 + 49) / 3
    assert "process-verified after RL, bridge - vanilla +19.0%" in printed
    row = dict(task="igsm", seed=1, split="id", ops="2-4", n=100, process=None, correct=0)
    evaluation.write_results(str(tmp_path / "none.csv"), [row | dict(method=method, stage=stage)
                             for method in ("vanilla", "bridge") for stage in ("sft", "rl")])
    assert "bridge / vanilla nan" in script("eval.py", "--report", "none.csv").stdout  # nothing to divide by
    evaluation.write_results(str(tmp_path / "n.csv"), [row | dict(method="vanilla", stage="sft"),
                                                       row | dict(method="vanilla", stage="rl", n=300)])
    assert "another of this seed on 300" in script("eval.py", "--report", "n.csv").stderr
    (tmp_path / "noted.csv").write_text("".join(  # somebody's column, which writing would drop
        f"{line},{'note' if i == 0 else 'mine'}\n" for i, line in enumerate(
            (tmp_path / "none.csv").read_text().splitlines())))
    assert "noted.csv: not a file" in script("eval.py", "--report", "noted.csv").stderr


def test_report_on_options_of_grpo(tmp_path, script):
    """Bug: a run with another option of GRPO, which shares the SFT policy, left out or without its gain."""
    row = dict(task="igsm", seed=1, split="id", ops="7-9", n=100, process=None)
    evaluation.write_results(str(tmp_path / "results.csv"), [
        row | dict(method="vanilla", stage="sft", correct=40), row | dict(method="vanilla", stage="rl", correct=50),
        row | dict(method="vanilla:filter", stage="rl", correct=65)])
    printed = script("eval.py", "--report", "results.csv").stdout
    line, = [line for line in printed.split("\n") if "| vanilla:filter |" in line]
    assert "| 40.0% | 65.0% | +25.0% |" in line  # one seed: no interval


def test_report_on_behaviors(tmp_path, script):
    """Bugs: before and after exchanged; a run beside the SFT of another split or seed; a row from before
    behaviors were counted that stops the report."""
    def row(number, **changes):
        counts = {name: number + i for i, name in enumerate(evaluation.COUNTS)}
        return dict(task="igsm", method="bridge", seed=1, split="id", stage="sft", ops="6-8", n=100,
                    correct=number, process=number - 5) | counts | changes
    old = row(90, seed=2) | dict.fromkeys(evaluation.COUNTS)
    evaluation.write_results(str(tmp_path / "results.csv"), [
        row(10), row(30, stage="rl"), row(50, split="ood", ops="8-10"), row(70, split="ood", ops="8-10", stage="rl"),
        row(40, method="bridge:filter", stage="rl"), old, old | dict(stage="rl")])
    printed = script("eval.py", "--report", "results.csv").stdout
    lines = [line for line in printed.split("\n") if "→" in line]
    assert [line.split(" | ")[1:8] for line in lines] == [
        ["id", "bridge", "1", "100", "10 → 30", "5 → 25", "10 → 30"],
        ["ood", "bridge", "1", "100", "50 → 70", "45 → 65", "50 → 70"],
        ["id", "bridge:filter", "1", "100", "10 → 40", "5 → 35", "10 → 40"]]


def test_results_from_before_process_and_task(tmp_path, script):
    """Bugs: a file without these columns refused, its rows lost or given a process of 0 when it is written to
    again; tasks mixed in one row."""
    path = tmp_path / "results.csv"
    path.write_text("method,seed,stage,split,ops,n,correct\n"
                    "bridge,1,sft,id,2-4,100,40\nbridge,1,rl,id,2-4,100,60\n")
    assert "| igsm | id | bridge | 1 | 40.0%" in script("eval.py", "--report", path).stdout
    row = dict(task="promptbench", method="bridge", seed=1, split="id", ops="4-4", n=10)
    evaluation.write_results(str(path), [row | dict(stage="sft", correct=1, process=0),
                                         row | dict(stage="rl", correct=9, process=3)])
    with open(path) as file:
        assert [(r["task"], r["correct"], r["process"]) for r in csv.DictReader(file)] == [
            ("igsm", "60", ""), ("igsm", "40", ""), ("promptbench", "9", "3"), ("promptbench", "1", "0")]
    printed = script("eval.py", "--report", path).stdout
    old, new = [line for line in printed.split("\n") if "| bridge |" in line]
    assert old.startswith("| igsm | id | bridge | 1 | 40.0%") and "| not counted |" in old
    assert new.startswith("| promptbench | id | bridge | 1 | 10.0%") and "| 30.0% |" in new  # one seed has no interval
    row |= dict(task="igsm", seed=2)  # a seed that was counted does not stand for one that was not
    evaluation.write_results(str(path), [row | dict(stage="sft", correct=1, process=0),
                                         row | dict(stage="rl", correct=9, process=3)])
    printed = script("eval.py", "--report", path).stdout
    line, = [line for line in printed.split("\n") if "| igsm | id | bridge | 2 |" in line]
    assert "| not counted |" in line


def test_commit_is_that_of_the_scripts(tmp_path, monkeypatch):
    """Bugs: a row that names a commit which its code is not from; the table's own commits named; a
    traceback outside of git."""
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "eval.py"))
    assert evaluation.commit() == ""

    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "eval.py").write_text("1")
    git("add", "."), git("commit", "-qm", "code")
    code = evaluation.commit()
    (tmp_path / "results.csv").write_text("1")
    assert len(code) >= 7 and evaluation.commit() == code
    git("add", "."), git("commit", "-qm", "table")
    assert evaluation.commit() == code
    (tmp_path / "eval.py").write_text("2")
    assert evaluation.commit() == code + "+"


@pytest.mark.parametrize("info, made", [
    ({"stage": "sft", "method": "vanilla", "seed": 3, "data": None}, ("vanilla", 3, "sft")),
    ({"stage": "sft", "method": "bridge", "seed": 3, "data": "runs/rc-aug.jsonl"}, ("rc-aug", 3, "sft")),
    ({"stage": "grpo", "seed": 5, "base": {"stage": "sft", "method": "vanilla", "seed": 3}},
     ("vanilla", 5, "rl")),
    (None, ("other", 0, "sft"))])
def test_rows_say_where_a_checkpoint_comes_from(info, made):
    """Bugs: answers that came from a file filed under --method's default; RL's rows under the SFT's seed."""
    assert evaluation.origin(SimpleNamespace(info=info), "other-2.pt") == made


def test_curves_of_seeds_share_a_band(tmp_path, script):
    """Bug: every file a run of its own, or the seeds' number left in the name; the figure is drawn from
    logs of unequal length."""
    pytest.importorskip("matplotlib")
    names = ("a/bridge-rl-3.csv", "grpo.csv", "x-10.pt", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-0.5B", "a/b/")
    assert [evaluation.run_of(name) for name in names] == ["bridge-rl", "grpo", "x", "Qwen2.5-1.5B", "Qwen2.5-0.5B", "b"]
    assert list(evaluation.by_run([("_x-1.csv", 0)])) == ["x"]  # Matplotlib hides "_x"
    for name, steps in (("vanilla-1", 5), ("vanilla-2", 3), ("bridge-1", 5)):
        rows = [f"{i},0.{i},{0.5 if i == 1 else ''}\n" for i in range(1, steps + 1)]
        (tmp_path / f"{name}.csv").write_text("step,reward,val_accuracy\n" + "".join(rows))
    logs = ("vanilla-1.csv", "vanilla-2.csv", "bridge-1.csv")
    result = script("eval.py", "--curves", *logs, "--plot", "x.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "x.png").stat().st_size > 5000
    for name in ("y.pdf", "x.png", "y.pdf"):  # and again: our own figures are replaced
        result = script("eval.py", "--curves", "vanilla-1.csv", "--plot", name)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "y.pdf").read_bytes().startswith(b"%PDF")
    (tmp_path / "paid.csv").write_text("step,reward,val_accuracy\n1,0.5,\n2,1.05,\n")  # --format-reward 0.05
    axis = evaluation.new_figure(4, 3)[1][0][0]
    evaluation.draw_curves(axis, [str(tmp_path / "paid.csv")])
    assert axis.get_ylim() == (0, 1.05) and axis.get_ylabel() == "reward"


def test_rewards_of_two_runs_are_paired_by_seed(tmp_path, script):
    """Bugs: seeds paired in the order of the files; the difference of the gains without its interval, or with
    the one of unpaired seeds; the last steps of the longest log taken for all."""
    rewards = {"vanilla-1": [.2] * 20 + [.3] * 20, "vanilla-2": [.4] * 20 + [.6] * 30,
               "bridge-2": [.4] * 20 + [.9] * 20, "bridge-1": [.2] * 20 + [.5] * 20}
    for name, values in rewards.items():
        rows = [f"{i},{value},\n" for i, value in enumerate(values, start=1)]
        (tmp_path / f"{name}.csv").write_text("step,reward,val_accuracy\n" + "".join(rows))
    result = script("eval.py", "--curves", *(f"{name}.csv" for name in rewards))
    assert result.returncode == 0, result.stderr
    cells = [re.split(r"\s{2,}", line) for line in result.stdout.splitlines()]
    assert [row[0] for row in cells] == ["run", "vanilla", "bridge", "bridge - vanilla"]
    assert [[cell.split(" ")[0] for cell in row[2:]] for row in cells[1:]] == [
        ["30.0%", "45.0%", "+15.0%"], ["30.0%", "70.0%", "+40.0%"], ["+0.0%", "+25.0%", "+25.0%"]]
    # seed by seed: +0.2 and +0.3, so 0.25 +- 12.706 x 0.05; unpaired it would be 12.706 x 0.15 or 0.25
    assert cells[3][4] == "+25.0% [-38.5%, +88.5%]"
    (tmp_path / "short.csv").write_text("step,reward,val_accuracy\n1,.1,\n2,.2,\n3,.3,\n4,.4,\n5,.5,\n")
    short = script("eval.py", "--curves", "short.csv").stdout  # the first and the last 20 would be the same
    assert "first 2 steps" in short and "+30.0%" in short
    (tmp_path / "empty.csv").write_text("step,reward,val_accuracy\n")
    result = script("eval.py", "--curves", "empty.csv")
    assert result.returncode == 2 and "empty.csv: a log without a step" in result.stderr


def test_what_needs_the_heads_product_is_refused_before_it_measures(script, tmp_path, tiny, monkeypatch):
    """Bug: influence and entropy of Granite, which divides its logits, from logits that are not its own."""
    from transformers import GraniteConfig, GraniteForCausalLM
    tokenizer = tiny().tokenizer
    config = GraniteConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, logits_scaling=8.0,
                           eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    sample.save_policy(tmp_path / "granite.pt", sample.Policy(GraniteForCausalLM(config), tokenizer, tiny().device))
    monkeypatch.setattr(evaluation, "measure", None)
    for flag in ("--influence", "--entropy"):
        result = script("eval.py", "--ckpt", "granite.pt", "--n", 2, flag)
        assert result.returncode == 2 and "type granite cannot be trained here, nor measured" in result.stderr


def test_without_matplotlib(tmp_path, script, monkeypatch):
    """Bug: a traceback where the optional package is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "x.csv").write_text("step,reward,val_accuracy\n1,0.5,\n")
    result = script("eval.py", "--curves", "x.csv", "--plot", "x.png")
    assert result.returncode == 2 and "pip install matplotlib" in result.stderr


def test_reliability_of_behaviors():
    """Bugs: a reflection on a ready quantity counted as one on a locked quantity, or wrong names as right
    ones; a wrong sum after an analysis counted as the analysis's failure to restate the premise."""
    problem = data.read_question("\n".join([
        "The value of aaa is 3.", "aab gets its value by adding together the value of aaa and aac.",
        "The value of aac is 4.", "What is the value of aab?"]), None)
    given = "Let's solve aaa, aaa = 3\n"
    reflect = "Let's solve aab, but {} must be known first, so aab has to wait.\n"
    lines = {"right": reflect.format("aaa and aac") + given, "names": given + reflect.format("aaa and aac"),
             "false": reflect.replace("aab", "aac").format("aaa"), "none": "Let's solve aab, aab = 7\n"}
    found = {name: evaluation.reliability([data.check_trace(problem, "<think>\n" + text + "</think>")])
             for name, text in lines.items()}
    assert {name: f["locked"] for name, f in found.items()} == {
        "right": [1, 1], "names": [0, 1], "false": [0, 0], "none": [0, 1]}
    assert {name: f["ready"] for name, f in found.items()} == {
        "right": [1, 1], "names": [1, 1], "false": [0, 1], "none": [0, 0]}
    assert evaluation.counts({"n": 1, "behaviors": evaluation.behaviors([data.check_trace(
        problem, "<think>\n" + lines["false"] + "</think>")])}) == dict.fromkeys(evaluation.COUNTS, 0) | {
            "false_reflections": 1, "order": 1}
    restated = "Let's solve aac, given that The value of aac is {}, aac = 4\n"
    total = "Let's solve aab, {}aab = aaa + aac = {}\n"
    analysis = "given that aab gets its value by adding together the value of aaa and aac, "
    texts = [given + restated.format(4) + total.format(analysis, 7), given + restated.format(5),
             given + restated.format(4) + total.format(analysis, 8), given + restated.format(4) + total.format("", 8)]
    found = evaluation.reliability([data.check_trace(problem, f"<think>\n{text}</think>") for text in texts])
    assert found["analysed"] == [4, 5] and found["not_analysed"] == [4, 5]  # aac and aab; aaa and aab
    assert found["arithmetic"] == [8, 10] and found["premises"] == [5, 6]


def test_an_analysis_on_a_reflection_precedes_no_equation():
    """Bug: equations without an analysis right in over 100%: the released code puts an analysis on some reflections."""
    problem = data.read_question("\n".join([
        "The value of aaa is 3.", "aab gets its value by adding together the value of aaa and aac.",
        "The value of aac is 4.", "What is the value of aab?"]), None)
    report = data.check_trace(problem, "<think>\nLet's solve aab, given that aab gets its value by adding together the "
                              "value of aaa and aac, but aaa and aac must be known first, so aab has to wait.\n"
                              "Let's solve aaa, aaa = 3\nLet's solve aac, aac = 4\nLet's solve aab, aab = aaa + aac = 8\n")
    assert report.error.kind == "arithmetic" and report.reflections == report.analyses == 1
    found = evaluation.reliability([report])
    assert found["analysed"] == [0, 0] and found["not_analysed"] == [2, 3] and found["premises"] == [1, 1]


def test_cells_that_differ_in_size_alone_are_not_mixed(tmp_path, script):
    """Bug: two tests of one policy, on 6-8 and on 10-12 operations, of which the report showed one."""
    row = dict(task="igsm", method="bridge", seed=1, split="id", n=10, correct=5, process=5)
    evaluation.write_results(str(tmp_path / "r.csv"), [row | dict(stage=stage, ops=ops)
                                                       for stage in ("sft", "rl") for ops in ("6-8", "10-12")])
    result = script("eval.py", "--report", "r.csv")
    assert result.returncode == 2 and "differ in ops alone" in result.stderr


def test_every_flag_of_rollouts_and_loss_is_part_of_a_methods_name():
    """Bug: a new flag, with which two different runs would be one row of results.csv."""
    elsewhere = {"help", "ckpt", "out", "seed", "resume", "save_every", "export", "hand_over", "micro_tokens",
                 "gradient_checkpointing", *sft.DRAWING, "data", "filter", "eval_every", "eval_n", "patience"}
    parser = data.Parser("")
    grpo.add_flags(parser)
    assert {action.dest for action in parser._actions} - elsewhere == set(evaluation.RL_FLAGS)
    assert set(sft.DRAWING) == {"task"}.union(*(task.options for task in data.TASKS.values()))


def test_majority_answer():
    """Bug: a baseline that always answers 0 where another answer is more frequent."""
    problems = [data.Problem("", answer, "", {}) for answer in (0, 7, 7, 0, 7, 3)]
    assert evaluation.majority(problems) == 0.5


def test_table_and_json(script, tmp_path, tiny_file):
    """Bugs: a split that mixes its figures up with another's; JSON that says something else than the
    table."""
    result = script("eval.py", "--ckpt", tiny_file, tiny_file, "--n", 12, "--max-new-tokens", 24,
                    "--samples", 2, "--json", "scores.json", "--results", "results.csv")
    assert result.returncode == 0, result.stderr
    other = shutil.copy(tiny_file, tmp_path / "tiny-1.pt")  # the same name without its number
    refused = script("eval.py", "--ckpt", tiny_file, other, "--n", 2, "--max-new-tokens", 2, "--results", "r.csv")
    assert refused.returncode == 2 and "would be one row" in refused.stderr
    written = json.load(open(tmp_path / "scores.json"))
    scores = written["checkpoints"]
    assert [s["path"] for s in scores] == [str(tiny_file)] * 2
    for s in scores:
        assert set(s["splits"]) == {"id", "ood"}
        for split in s["splits"].values():
            assert split["n"] == 12 and split["ci95"][0] <= split["accuracy"] <= split["ci95"][1]
            assert abs(sum(split["rollouts"]["histogram"]) - 1) < 1e-9
            assert 0 <= split["process"] <= split["correct"]
            assert f"{split['accuracy']:.1%}" in result.stdout
    assert all(split["hits"].count(1) == split["correct"] for s in scores for split in s["splits"].values())
    assert written["mcnemar"] and all(c["p"] == 1 for c in written["mcnemar"])  # a policy against itself
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4  # the same checkpoint twice: two splits, and the majority in each
    assert {row["commit"] for row in rows} == {evaluation.commit()}
    options = data.TINY["igsm"] | dict(split="test")
    problems = list(itertools.islice(data.generate(**options), 12))
    assert scores[0]["splits"]["id"]["majority"] == evaluation.majority(problems)


@pytest.mark.parametrize("arguments, words", [
    (["--ckpt", "nowhere.pt"], ["nowhere.pt"]), (["--ckpt", "cut.pt"], ["cut.pt"]),
    (["--ckpt", "folder.pt"], ["folder.pt: a folder"]),
    (["--ckpt", "foreign.pt"], ["foreign.pt"]),
    (["--data", "empty.jsonl"], ["empty.jsonl"]), (["--plot", "x.png"], ["--samples"]),
    (["--ood", "9", "3"], ["--ops 9 3"]), (["--ops", "30", "30"], ["--ops 30 30", "--ood"]),
    (["--redundancy", "6", "8", "--task", "promptbench"], ["--redundancy 6 8", "--ood"]),
    (["--n", "0"], ["--n", "at least 1"]),
    (["--max-new-tokens", "5000"], ["--max-new-tokens", "2048"]), (["--sample", "3"], ["--sample"]),
    (["--report", "empty.jsonl2"], ["empty.jsonl2"]), (["--report", "zero.csv"], ["zero.csv", "--results"]),
    (["--report", "head.csv", "--json", "x.json"], ["--json", "--report"]),
    (["--curves", "head.csv", "folder.pt/head.csv"], ["files' names"]),
    (["--curves", "short.csv"], ["short.csv", "grpo.py"]), (["--curves", "long.csv"], ["long.csv", "grpo.py"]),
    (["--data", "empty.jsonl", "--ops", "3", "4"], ["--ops", "--data"]),
    (["--data", "empty.jsonl", "empty.jsonl"], ["--data", "twice"]),
    (["--data", "empty.jsonl", "--seed", "3"], ["--seed has no effect", "--samples"]),
    (["--micro-tokens", "100"], ["--micro-tokens has no effect", "--influence"]),
    (["--influence", "--samples", "1"], ["--samples", "influence"]),
    (["--html", "no/x.html"], ["no/x.html"])])
def test_bad_input_is_one_sentence(script, tmp_path, tiny_file, arguments, words):
    """Bug: a traceback for a missing, truncated or foreign checkpoint, an empty file, a prompt beyond the
    context, a table or a log that is cut or has no rows; a flag that is dropped without a word."""
    import torch
    (tmp_path / "cut.pt").write_bytes(tiny_file.read_bytes()[:5000])
    torch.save({"model": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder.pt").mkdir()
    heading = ",".join(evaluation.COLUMNS)
    (tmp_path / "head.csv").write_text(heading + "\n")
    (tmp_path / "zero.csv").write_text(f"{heading}\nigsm,bridge,2,rl,id,6-8,0,0{',' * 13}\n")
    (tmp_path / "short.csv").write_text("step,val_accuracy,reward\n1,,0.5\n2,\n")
    (tmp_path / "long.csv").write_text(f"step,reward,val_accuracy\n1,0.5,{'x' * 140_000}\n")
    measuring = {"--ckpt", "--report", "--curves"}.isdisjoint(arguments)
    result = script("eval.py", *(("--ckpt", tiny_file) if measuring else ()), *arguments)
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert all(word in last for word in words), result.stderr


def test_report_as_a_figure(tmp_path, script, monkeypatch):
    """Bugs: p 0 lost, or sorted as text; SFT's accuracy drawn for RL's; process-verified accuracy not drawn,
    or drawn where nobody counted it; a run with other options of GRPO drawn as its p; a traceback where
    there is nothing to draw."""
    pytest.importorskip("matplotlib")
    path, drawn = str(tmp_path / "results.csv"), []
    made = {"vanilla": None, "subgoal": 0.0, "analysis": 0.3, "reflection": 0.3, "bridge": 0.3,
            "bridge-p0.1": 0.1, "bridge:filter": 0.3}
    row = dict(task="igsm", split="id", ops="2-4", n=100)
    rows = [row | dict(method=method, seed=seed, stage=stage, correct=40 + 10 * i + (stage == "rl"), p=p,
                       process=None if method == "analysis" else 10 * i)
            for i, (method, p) in enumerate(made.items()) for seed in (1, 2) for stage in ("sft", "rl")]
    evaluation.write_results(path, rows)
    plain = evaluation.draw_intervals
    monkeypatch.setattr(evaluation, "draw_intervals", lambda *a: (drawn.append(a[1]), plain(*a)))
    # another task, whose bridge has another p, and a split without a policy after RL
    other = dict(row, task="promptbench", method="bridge", seed=1, correct=50, process=50, p=0.1)
    evaluation.write_results(path, [other | dict(stage="rl"), other | dict(stage="sft", split="ood")])
    result = script("eval.py", "--report", path, "--plot", "x.svg")
    assert result.returncode == 0 and (tmp_path / "x.svg").stat().st_size > 5000, result.stderr
    methods, sweep, others, other_sweep = drawn
    assert list(others) == ["bridge"] and list(other_sweep) == ["p = 0.1"]
    assert list(methods) == list(made) and list(sweep) == ["p = 0", "p = 0.1", "p = 0.3"]
    assert methods["bridge"] == [(0.81, 0.81, 0.81), (0.4, 0.4, 0.4)] == sweep["p = 0.3"]
    assert math.isnan(methods["analysis"][1][0])
    assert "| subgoal | 2 | 50.0% [50.0%, 50.0%] | 51.0% [51.0%, 51.0%] | +1.0%" in result.stdout
    (tmp_path / "head.csv").write_text(",".join(evaluation.COLUMNS) + "\n")
    result = script("eval.py", "--report", "head.csv", "--plot", "x.svg")
    assert result.returncode == 2 and "head.csv: no row of a policy after RL" in result.stderr


@pytest.mark.parametrize("made, method, p", [
    (dict(), "bridge", 0.3), (dict(p=0.1), "bridge-p0.1", 0.1), (dict(behaviors=["subgoal"]), "subgoal", 0.0),
    (dict(behaviors=["reflection"]), "reflection", 0.3), (dict(method="vanilla"), "vanilla", None),
    (dict(task="promptbench"), "bridge-p0.3", 0.3), (dict(task="promptbench", p=0.1), "bridge", 0.1),
    (dict(data="runs/x-1.jsonl"), "x", None), (dict(method="vanilla", n=3000), "vanilla-n3000", None)])
def test_rows_say_which_behaviors(tiny, made, method, p):
    """Bug: cells of different answers under one name, so that one overwrites the other."""
    usual = dict(stage="sft", method="bridge", behaviors=["subgoal", "analysis", "reflection"], p=0.3, seed=1)
    policy = tiny()
    policy.info = dict(stage="grpo", seed=1, base=usual | made)
    assert (evaluation.origin(policy, "y.pt")[0], evaluation.injection_p(policy)) == (method, p)
    policy.info |= dict(filter=[1, 7], steps=7, beta=1e-3)
    assert evaluation.origin(policy, "y.pt")[0] == f"{method}:filter:7-steps"
    policy.info |= dict(task="promptbench", filter=None, steps=120)  # PromptBench's own coefficient is 0.005
    assert evaluation.origin(policy, "y.pt")[0] == f"{method}:beta-0.001"
    policy.info |= dict(task=None, no_std=True, drop_flat=False, norm="token", lr=1e-6, clip=0.2)
    assert evaluation.origin(policy, "y.pt")[0] == f"{method}:lr-1e-06:norm-token:no-std:no-drop-flat"
