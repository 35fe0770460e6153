"""Injected answers: every one is sound, has the behaviors at the rate that was asked for, and nothing else.

BRIDGE_FULL=1 runs the same tests over 2,000 problems a setting and prints the figures; -s shows them."""
import doctest, json, os, random, re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import data, inject
from test_data import SETTINGS, script

FULL = bool(os.environ.get("BRIDGE_FULL"))
N = 2000 if FULL else 80


@pytest.fixture(scope="module")
def problems():
    return {name: list(islice(data.generate(seed=6, **options), N)) for name, options in SETTINGS.items()}


def plain_steps(problem, response):
    """(node, letter) of each step that is not a reflection."""
    return [(step.node, step.letter) for step in data.read_steps(problem, response) if not step.missing]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_trace_is_sound(name, problems):
    """An edit that breaks the answer, for any method; a copy that repeats another or changes the problem."""
    total = Counter()
    for problem in problems[name]:
        for method, options in [("vanilla", {}), ("bridge", {}), ("bridge", dict(p=0.5)),
                                ("bridge", dict(official=True, p=0.3)),
                                ("pp-aug", {}), ("rc-aug", {})]:
            examples = inject.augment(problem, method, **options)
            assert len(examples) == len(set(examples))
            assert method == "bridge" or examples[0] == (problem.question, problem.response)
            for question, response in examples:
                read = data.read_question(question, problem.categories)
                report = data.check_trace(read, response, subgoal=method == "bridge")
                assert report.ok, (response, report)
                assert (read.answer, read.nodes) == (problem.answer, problem.nodes)
                assert data.fingerprint(question) == data.fingerprint(problem.question)
                if method != "bridge":
                    assert report.reflections == report.analyses == report.subgoals == report.redundant == 0
                if "official" in options:
                    total["early"] += report.redundant
                elif method == "bridge":
                    assert plain_steps(problem, response) == plain_steps(problem, problem.response)
            total[method] += len(examples)
            if method == "pp-aug":
                assert len(examples) == 4 or len(problem.nodes) < 5
    assert total["early"] > 0
    print(f"\n{name}: sound traces {dict(total)}")


def test_rc_aug_finds_every_order():
    """Fewer copies than the problem has orders: here eight, the sum after its summands among four steps."""
    question = "\n".join(["The value of aab is 1.", "The value of aac is 2.", "The value of aad is 3.",
                          "aae gets its value by adding together the value of aab and aac.",
                          "aaf gets its value by multiplying together the value of aae and aad.",
                          "What is the value of aaf?"])
    problem = data.read_question(question)
    steps = [data.open_step(problem, q, q, random.Random(0)) for q in data.needed_nodes(problem.nodes, "aaf")]
    problem.response = data.write_response(problem, steps)
    for copies, distinct in ((1, 1), (4, 4), (8, 8), (50, 8)):
        assert len(inject.augment(problem, "rc-aug", copies=copies)) == distinct


@pytest.mark.parametrize("p", [0, .1, .3, 1])
def test_rates_are_p(p, problems):
    """A p applied to half the steps, twice, or where nothing is locked: within 4 standard errors."""
    for name, chosen in problems.items():
        possible, seen = Counter(), Counter()
        for problem in chosen:
            report = data.check_trace(problem, inject.augment(problem, "bridge", p=p)[0][1])
            seen.update(reflections=report.reflections, analyses=report.analyses)
            solved = set()
            for node, _ in plain_steps(problem, problem.response):
                possible["reflections"] += any(set(n.parents) - solved for n in problem.nodes.values())
                possible["analyses"] += problem.nodes[node].text != ""
                solved.add(node)
        for kind, n in possible.items():
            print(f"\n{name}, p {p}: {kind} at {seen[kind] / n:.4f} of {n} steps", end="")
            assert abs(seen[kind] - p * n) <= 4 * (n * p * (1 - p)) ** .5


def test_a_near_reflection_is_acted_on(problems):
    """`near` that is not read, or that picks what the step needs and not what needs the step."""
    for chosen in problems.values():
        acted_on, reflections = Counter(), Counter()
        for problem in chosen:
            for near in (0, .5, 1):
                text = inject.inject(problem, problem.response, ("reflection",), 1, random.Random(problem.id),
                                     near=near)
                steps = data.read_steps(problem, text)
                for step, after in zip(steps, steps[1:]):
                    if step.missing and any(after.node in n.parents for n in problem.nodes.values()):
                        reflections[near] += 1
                        acted_on[near] += after.node in step.missing
        assert acted_on[1] == reflections[1] and acted_on[0] < .8 * reflections[0]
        share = acted_on[0] / reflections[0]  # the other half is drawn like those without it
        assert abs(acted_on[.5] / reflections[.5] - (1 + share) / 2) < 4 * (.25 / reflections[.5]) ** .5


@pytest.mark.parametrize("behaviors", [
    (), ("analysis",), ("reflection",), ("subgoal",), ("subgoal", "analysis", "reflection")])
def test_each_behavior_has_its_switch(behaviors, problems):
    """A switch that does nothing, or brings another behavior along; p = 0 that still changes the answer."""
    for chosen in problems.values():
        counts = Counter()
        for problem in chosen[:20]:
            others = [b for b in behaviors if b != "subgoal"]
            assert inject.inject(problem, problem.response, others, 0) == problem.response
            report = data.check_trace(problem, inject.inject(problem, problem.response, behaviors, 1))
            counts.update(subgoal=report.subgoals, analysis=report.analyses, reflection=report.reflections)
        assert {name for name, k in counts.items() if k} == set(behaviors)


def test_each_behavior_has_its_probability(problems):
    """--p-analysis and --p-reflection swapped, or one of them for both."""
    for p in ({"analysis": 1, "reflection": 0}, {"analysis": 0, "reflection": 1}):
        for problem in problems["ops 15-20"][:20]:
            (_, text), = inject.augment(problem, "bridge", p=p)
            report = data.check_trace(problem, text)
            locked = any(problem.nodes[node].parents for node, _ in plain_steps(problem, problem.response))
            described = sum(problem.nodes[node].text != ""
                            for node, _ in plain_steps(problem, problem.response))
            assert report.analyses == p["analysis"] * described
            assert bool(report.reflections) == bool(p["reflection"] and locked)


@pytest.mark.parametrize("flags, p, seed, official", [
    ([], (0.1, 0.1), 0, False), (["--p", 0.4], (0.4, 0.4), 0, False), (["--seed", 3], (0.1, 0.1), 3, False),
    (["--p", 0.4, "--p-analysis", 0.2], (0.2, 0.4), 0, False), (["--p-reflection", 0], (0.1, 0), 0, False),
    (["--official"], (0.1, 0.1), 0, True)])
def test_flags_reach_the_injection(flags, p, seed, official, script, tmp_path):
    """Another default of --p than the paper's 0.1; a probability of 0 taken for none given; a seed left
    behind."""
    assert script("data.py", "--n", 20, "--out", "train.jsonl").returncode == 0
    assert script("inject.py", "train.jsonl", *flags, "--out", "out.jsonl").returncode == 0
    options = dict(p=dict(zip(("analysis", "reflection"), p)), seed=seed, official=official)
    expected = [text for problem in data.read_problems(tmp_path / "train.jsonl", graph=True)
                for _, text in inject.augment(problem, "bridge", **options)]
    assert [problem.response for problem in data.read_problems(tmp_path / "out.jsonl")] == expected


def test_official_departs_as_the_released_code_does(problems):
    """--official that draws as the paper: analyses go by the in-degree, reflections solve nodes early."""
    seen, early, detours = {k: Counter() for k in range(5)}, 0, Counter()
    for problem in problems["ops 20"] + problems["ops 25"]:
        for seed in range(1 if FULL else 5):
            (_, text), = inject.augment(problem, "bridge", p=.3, official=True, seed=seed)
            for step in data.read_steps(problem, text):
                node = problem.nodes[step.node]
                if node.text:
                    seen[node.degree if node.parents else 0][bool(step.analysis)] += 1
            early += plain_steps(problem, text) != plain_steps(problem, problem.response)
    for parents, p in enumerate((0, .1, .4, .8, 1)):
        n = sum(seen[parents].values())
        assert n > 20 and abs(seen[parents][True] - p * n) <= 4 * (n * p * (1 - p)) ** .5
    assert early > 0
    rng = random.Random(0)
    for problem in problems["ops 20"]:  # 70% of the detours fall on a node that the answer needs
        needed, letters = data.needed_nodes(problem.nodes, problem.target), {}
        first, *_ = data.read_steps(problem, problem.response)
        if len(needed) < len(problem.nodes):
            for _ in range(40):
                step = inject.take_detour(problem, first, set(), dict(letters), rng, official=True)
                detours[step.node in needed] += 1
    n = detours.total()
    assert n > 300 and abs(detours[True] - 0.7 * n) <= 4 * (n * 0.7 * 0.3) ** .5


def test_a_problem_is_edited_alike_wherever_it_stands(problems):
    """Edits that depend on the order of the file or on those before; a seed that changes nothing."""
    first, second = problems["ops 15-20"][:2]
    alone = inject.augment(second, "bridge")
    inject.augment(first, "bridge")
    assert inject.augment(second, "bridge") == alone != inject.augment(second, "bridge", seed=1)


def test_letters_may_run_out():
    """A crash where a problem has more quantities than there are letters and every step reflects."""
    for problem in islice(data.generate(ops=(30, 30), size=(28, 30)), 40):
        assert data.check_trace(problem, inject.inject(problem, problem.response, p=1)).ok
    few = [step.letter for step in data.read_steps(problem, problem.response)]
    assert data.new_letter(problem, problem.target, data.LETTERS, random.Random(0)) is None
    assert len(set(few)) == len(few)


def test_a_tree_of_more_nodes_than_letters():
    """Bug: PromptBench's steps, which have no letters, asked whether they stand in iGSM's order of letters: a tree of over 52
    nodes was a KeyError."""
    sizes = []
    for problem in islice(data.generate("promptbench", depth=7, redundancy=(0, 0), max_answer=10**12), 3):
        sizes.append(len(problem.nodes))
        for method in ("bridge", "rc-aug"):
            for _, response in inject.augment(problem, method, p=.3):
                assert data.check_trace(problem, response).ok
    assert max(sizes) > 52


def test_knows_no_grammar():
    """A word of either task's texts in inject.py: the behaviors are defined on the graph."""
    code = Path(inject.__file__).read_text().partition('"""\nfrom')[2]
    words = r"igsm|promptbench|LETTERS|categories|The number|Let's|equals|gets its|must be known"
    assert code and not re.search(words, code)


def test_marks_of_a_step_solved_early():
    """Bug: all that follows a detour that solves its quantity, as the released code draws some, marked as added."""
    plain = "- a = 1.\n- b = 2.\n- c = 3.\nend"
    assert inject.mark(plain, "- c = 3.\n- a = 1.\n- b = 1 + 1 = 2.\nend") == \
        "- c = 3.\n- a = 1.\n- b = [1 + 1 =] 2.\nend"


def test_doctests():
    """The marks in the view without arguments stand where something was added."""
    result = doctest.testmod(inject)
    assert result.attempted and not result.failed


# ------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize("flags", [("--ops", 10, 12), ("--task", "promptbench")])
def test_from_file_to_file(flags, script, tmp_path):
    """A record that loses a field on its way through the commands, or examples that the reader refuses."""
    assert script("data.py", *flags, "--n", 20, "--out", "train.jsonl").returncode == 0
    plain = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    problems = data.read_problems(tmp_path / "train.jsonl", graph=True)
    for method in ("vanilla", "bridge", "pp-aug", "rc-aug"):
        count = sum(len(inject.augment(problem, method)) for problem in problems)
        done = script("inject.py", "train.jsonl", "--method", method, "--out", f"{method}.jsonl")
        assert done.returncode == 0 and f"{count} examples" in done.stdout
        records = [json.loads(line) for line in (tmp_path / f"{method}.jsonl").read_text().splitlines()]
        assert len(data.read_problems(tmp_path / f"{method}.jsonl", graph=True)) == count
        assert count == 20 or 40 < count <= 80
        assert all(record.keys() == plain[0].keys() for record in records)
        assert method != "vanilla" or records == plain


@pytest.mark.parametrize("content, flags, word", [
    ("{oops\n", ["--out", "o"], "train.jsonl, line 1"), ("", ["--out", "o"], "train.jsonl"),
    (None, ["--out", "o"], "train.jsonl"),
    ('{"question": "What is the value of ab?", "answer": 1, "task": "promptbench"}', ["--out", "o"],
     "line 1"),
    ('{"question": "The value of ab is 1.\\nWhat is the value of ab?", "answer": 2, "task": "promptbench"}',
     ["--out", "o"], "not 2"),
    ('{"question": "The value of ab is 1.\\nWhat is the value of ab?", "answer": 1, "task": "promptbench"}',
     ["--out", "o"], "does not hold"),
    ('{"question": "x", "answer": 1}', ["--out", "o", "--p", "2"], "--p"),
    ('{"question": "x", "answer": 1}', [], "--out"),
    ('{"question": "x", "answer": 1}', ["--wurst"], "--wurst"),
    ('{"question": "x", "answer": 1}', ["--method", "ppaug"], "--method"),
    ('{"question": "x", "answer": 1}', ["--method", "vanilla", "--p", "0.5", "--out", "o"], "--p has no effect"),
    ('{"question": "x", "answer": 1}', ["--copies", "2", "--out", "o"], "--copies has no effect"),
    ('{"question": "x", "answer": 1}', ["--official", "--p-analysis", "1", "--out", "o"], "--p-analysis has no effect"),
    ('{"question": "x", "answer": 1}', ["--behaviors", "analysis", "--p-reflection", "1", "--out", "o"],
     "--p-reflection has no effect"),
    ('{"question": "x", "answer": 1}', ["--behaviors", "subgoal", "--p", "1", "--out", "o"], "--p has no effect"),
    ('{"question": "x", "answer": 1}', ["--behaviors", "subgoal", "--official", "--out", "o"], "--official has no effect"),
    ('{"question": "x", "answer": 1}', ["--behaviors", "analysis", "--official", "--p", "1", "--out", "o"],
     "--p has no effect"),
    ('{"question": "x", "answer": 1}', ["--method", "vanilla", "--seed", "7", "--out", "o"], "--seed has no effect"),
    ('{"question": "x", "answer": 1}', ["--behaviors", "subgoal", "--seed", "7", "--out", "o"], "--seed has no effect"),
    ('{"question": "x", "answer": 1}', ["--p", "1", "--p-analysis", "1", "--p-reflection", "1", "--out", "o"],
     "--p has no effect"),
    ('{"question": "x", "answer": 1}', ["--method", "rc-aug", "--copies", "2000000000", "--out", "o"], "from 1 to 1000"),
    ('{"question": "The value of ab is 1.\\nWhat is the value of ab?", "answer": 1, "task": "igsm"}',
     ["--out", "o"], "the question is one of promptbench"),
    ('{"question": "oops\\nWhat is the value of ab?", "answer": 1, "task": "promptbench"}', ["--out", "o"],
     "its question, line 1: not a premise")])
def test_bad_input(content, flags, word, script, tmp_path):
    """A traceback, or a half-written file beside a message that does not name the fault."""
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)
    done = script("inject.py", "train.jsonl", *flags)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize("method", ["bridge", "rc-aug"])
def test_answers_that_hold_behaviors_already(method, script, tmp_path):
    """Bug: a file blamed for the fault that a second injection brought; analyses drawn anew without a word."""
    assert script("data.py", "--ops", 6, 8, "--n", 20, "--out", "train.jsonl").returncode == 0
    assert script("inject.py", "train.jsonl", "--p", 1, "--out", "bridge.jsonl").returncode == 0
    done = script("inject.py", "bridge.jsonl", "--method", method, "--out", "o")
    assert done.returncode == 2 and "holds behaviors already; give plain answers" in done.stderr
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize("method", ["vanilla", "bridge", "pp-aug", "rc-aug"])
@pytest.mark.parametrize("broken", ["moved", "missing"])
def test_plain_answers_that_do_not_hold(method, broken, script, tmp_path):
    """Bug: an edit of steps in an impossible order, a traceback in the middle of an injection."""
    problem = next(data.generate(ops=(6, 8)))
    thought, ending = problem.response.split("\n</think>")
    start, first, *steps, last = thought.split("\n")
    lines = [start, last, *steps, first] if broken == "moved" else [start, *steps, last]
    answer = "\n".join(lines) + "\n</think>" + ending
    (tmp_path / "train.jsonl").write_text(json.dumps(data.to_record(problem) | {"id": 0, "response": answer}))
    done = script("inject.py", "train.jsonl", "--method", method, "--out", "o")
    assert done.returncode == 2 and re.search(r"its answer does not hold, line \d: ", done.stderr), done.stderr
    assert done.stderr.rstrip().endswith("(order)") and not (tmp_path / "o").exists()


def test_without_arguments(script):
    """The first thing a reader runs does not show a plain answer beside its injected one, with all three
    behaviors; or writes nothing where a file was asked for."""
    done = script("inject.py")
    assert done.returncode == 0 and "--- plain" in done.stdout
    assert re.search(r"\[It equals .*\]", done.stdout) and re.search(r"\[\S+ . \S+ =\]", done.stdout)
    assert script("inject.py", "--out", "x.jsonl").returncode == 2
    assert re.search(r"\[- .* has to wait\.\]", done.stdout)
