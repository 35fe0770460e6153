"""sft.py: what is trained on, that micro-batches add up, and that small updates are not lost."""
import csv
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data, inject, sample, sft


def response_logprobs(model, inputs, targets):
    """Log-probs and entropies (B, T) of the targets, row by row: what sums are checked against."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return sample.token_logprobs(hidden, model.lm_head.weight, targets)


def draw_examples(policy, n, seed=0):
    stream = data.generate(ops=(1, 4), seed=seed, max_value=100)
    return [(sample.encode_prompt(policy.tokenizer, p.question),
             sample.encode_response(policy.tokenizer, p.response))
            for p, _ in zip(stream, range(n))]


def test_targets_are_the_answer_and_one_end(tiny):
    """Bugs: training on the prompt; an off-by-one between inputs and targets; the end token masked because
    pad == end."""
    policy = tiny()
    examples, end = draw_examples(policy, 5), policy.tokenizer.eos_token_id
    inputs, targets = sft.collate(examples, "cpu", pad=end)  # the hostile case: the pad is the end token
    for row, (prompt, response) in enumerate(examples):
        kept = targets[row] != sample.IGNORE
        assert targets[row][kept].tolist() == response and response.count(end) == 1 and response[-1] == end
        first = kept.nonzero()[0].item()
        # the first target is predicted from the whole prompt
        assert inputs[row, :first + 1].tolist() == prompt
        assert inputs[row][kept].tolist() == [prompt[-1], *response[:-1]]


def gradients(policy, batch, groups, total=sft.sum_of_logprobs):
    policy.model.zero_grad()
    tokens = sum(len(response) for _, response in batch)
    for rows in groups:
        (-total(policy.model, *sft.collate([batch[r] for r in rows], "cpu", 0)) / tokens).backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_gradient_is_that_of_cross_entropy_for_every_micro_batch(tiny):
    """Bugs: a mean of micro-batch means (rejected below), a forgotten short last group, the prompt in the
    loss."""
    policy = tiny()
    batch = draw_examples(policy, 7)
    inputs, targets = sft.collate(batch, "cpu", 0)
    policy.model.zero_grad()
    F.cross_entropy(policy.model(input_ids=inputs).logits.flatten(0, 1), targets.flatten(),
                    ignore_index=sample.IGNORE).backward()
    truth = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    for size in (1, 2, 3, 7):
        groups = [list(range(7))[i:i + size] for i in range(0, 7, size)]
        assert relative(gradients(policy, batch, groups), truth) < 2e-6
        by_token = lambda *inputs: response_logprobs(*inputs)[0].sum()
        assert relative(gradients(policy, batch, groups, by_token), truth) < 2e-6
    policy.model.zero_grad()
    for row in range(7):  # the wrong version: each micro-batch divided by its own tokens
        logprob, _ = response_logprobs(policy.model, *sft.collate([batch[row]], "cpu", 0))
        (-logprob.sum() / len(batch[row][1]) / 7).backward()
    wrong = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert relative(wrong, truth) > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_is_the_same_for_1_2_3_7_and_all_rows(tiny, checkpointing):
    """Bug: a sum over micro-batches that is not the batch's gradient to the last digits, with layers computed
    twice as well."""
    policy = tiny()
    batch, rows = draw_examples(policy, 11), list(range(11))
    truth = gradients(policy, batch, [rows])
    if checkpointing:
        sft.checkpoint_layers(policy.model)
    assert all(relative(gradients(policy, batch, [rows[i:i + n] for i in range(0, 11, n)]), truth) < 1e-6
               for n in (1, 2, 3, 7, 11))


def test_micro_batches_cover_every_row_once_within_the_bound():
    """Bugs: a row lost or doubled at a group's border; a group over the memory bound."""
    rng = Random(1)
    lengths = [rng.randint(5, 90) for _ in range(101)]
    assert len(set(lengths)) > 50
    groups = sft.micro_batches(lengths, 256)
    assert sorted(row for group in groups for row in group) == list(range(101))
    assert all(max(lengths[r] for r in group) * len(group) <= 256 for group in groups)
    computed = sum(max(lengths[r] for r in group) * len(group) for group in groups)
    assert computed < 1.1 * sum(lengths)  # in the order of the rows, a third more
    in_order = [lengths[i:i + 2] for i in range(0, 101, 2)]
    assert sum(max(pair) * len(pair) for pair in in_order) > 1.2 * sum(lengths)
    assert sft.micro_batches([1000], 256) == [[0]]  # one row at least


def test_batches_go_through_the_rows_of_every_epoch():
    """Bugs: the same order in every epoch or for every seed; a short last batch lost; rows drawn twice."""
    batches = sft.draw_batches(10, 4, epochs=3, seed=5)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [sum(batches[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs) and len(set(map(tuple, epochs))) == 3
    assert sft.draw_batches(10, 4, 3, 5) == batches != sft.draw_batches(10, 4, 3, 6)
    assert sft.draw_batches(10, 4, 1, 5) == batches[:3]


@pytest.mark.parametrize("flags, p, behaviors", [
    ([], 0.3, inject.BEHAVIORS), (["--p", 0.7], 0.7, inject.BEHAVIORS),
    (["--behaviors", "analysis"], 0.3, ["analysis"]), (["--method", "rc-aug"], 0.3, inject.BEHAVIORS)])
def test_fresh_answers_follow_their_flags(flags, p, behaviors, script, tiny_file, monkeypatch):
    """Bugs: another default of --p than the help's; a method, a behavior or a seed that does not arrive."""
    seen, augment = [], inject.augment

    def spy(problem, method, behaviors, p, seed):
        seen.append((method, tuple(behaviors), p, seed))
        return augment(problem, method, behaviors, p, seed=seed)
    monkeypatch.setattr(inject, "augment", spy)
    result = script("sft.py", "--model", tiny_file, "--n", 6, "--ops", 2, 2, "--seed", 4, *flags)
    assert result.returncode == 0, result.stderr
    method = flags[1] if "--method" in flags else "bridge"
    assert seen == [(method, tuple(behaviors), p, 4)] * 6


def test_the_task_is_that_of_the_data(script, tmp_path, monkeypatch):
    """Bug: PromptBench's file trained from iGSM's base and with its settings, since --task says nothing."""
    started = []

    def load(path, *_):
        started.append(Path(path).name)
        raise data.InputError("seen")
    monkeypatch.setattr(sample, "load_policy", load)
    for task in ("promptbench", "igsm"):
        script("data.py", "--task", task, "--n", 2, "--out", f"{task}.jsonl")
        for name in ("sft.py", "grpo.py", "eval.py", "sample.py"):
            assert script(name, "--data", f"{task}.jsonl").returncode == 2
    assert started == ["promptbench.pt"] * 4 + ["igsm.pt"] * 4


def test_bf16_weights_keep_small_updates():
    """Bug: AdamW on bf16 weights rounds every update of relative size 1e-3 away, and the model never
    moves."""
    model = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    plain = torch.nn.Parameter(model.weight.detach().clone())
    ours = sft.Optimizer(model, lr=1e-3, weight_decay=0)
    theirs = torch.optim.AdamW([plain], lr=1e-3, weight_decay=0)
    for _ in range(20):
        model.weight.sum().backward()
        ours.step()
        plain.grad = torch.ones_like(plain)
        theirs.step()
    assert (plain == 1).all()  # the wrong version stands still
    assert ours.master[0].dtype == torch.float32
    assert torch.allclose(ours.master[0], torch.full((4, 4), 0.98), atol=1e-3)
    assert torch.equal(model.weight, ours.master[0].to(torch.bfloat16)) and (model.weight < 1).all()


def test_gradients_of_bf16_micro_batches_are_summed_in_fp32():
    """Bug: a sum of many small bf16 gradients stalls at 256 times one of them."""
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = sft.Optimizer(model, lr=0.0)
    for _ in range(1000):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert optimizer.step(clip=1e9) == 1000


def test_tokenizer_gives_every_text_back():
    """Bugs: a phrase that swallows the space before a name (", each" once fell into letters); text that
    cannot be encoded."""
    tokenizer = sft.tiny_tokenizer()
    texts = ["Let's solve aaf, aaf = aab + aae = 81 + 0 = 81", "naïve 日本 \t x"]
    lengths = []
    for problem, _ in zip(data.generate(ops=(10, 14)), range(50)):
        (question, response), = inject.augment(problem, "bridge", p=0.3)
        texts += [question, response]
        lengths += [len(tokenizer(text).input_ids) / len(text.split()) for text in (question, response)]
    assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in texts)
    # names and phrases are single tokens: fewer tokens than two for three words
    assert sum(lengths) / len(lengths) < 1.3


def test_vocabulary_order_is_fixed():
    """Bug: a vocabulary built from a set changes with PYTHONHASHSEED, and every checkpoint with it."""
    a, b = sft.tiny_tokenizer().get_vocab(), sft.tiny_tokenizer().get_vocab()
    assert a == b and a["<pad>"] == 0 and len(set(a.values())) == len(a)


@pytest.mark.parametrize("method", ["bridge", "vanilla"])
def test_fine_tuning_learns_and_writes(script, tmp_path, tiny_file, method):
    """Bugs: a loop that trains nothing; a second run that overwrites the first; a log that is not one row a
    step."""
    run = lambda: script("sft.py", "--model", tiny_file, "--method", method, "--n", 60, "--epochs", 6,
                         "--ops", 1, 2, "--lr", 3e-3)
    first = run()
    assert first.returncode == 0, first.stderr
    rows = list(csv.DictReader(open(tmp_path / "sft.csv")))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    before = (tmp_path / "sft.pt").read_bytes()
    assert run().returncode == 0
    assert (tmp_path / "sft.1.pt").read_bytes() == before and (tmp_path / "sft.1.csv").exists()
    assert sample.load_policy(tmp_path / "sft.pt").info["method"] == method


def test_a_stop_for_numbers_leaves_the_last_good_state(script, tmp_path, tiny_file, monkeypatch):
    """Bug: weights of a run that has blown up, saved over those that could have been resumed from."""
    calls, total = [], sft.sum_of_logprobs

    def broken(*arguments):
        calls.append(1)
        return total(*arguments) * (float("nan") if len(calls) == 3 else 1)
    monkeypatch.setattr(sft, "sum_of_logprobs", broken)
    base = ["sft.py", "--model", tiny_file, "--n", 20, "--batch", 4, "--ops", 1, 1, "--save-every", 1]
    result = script(*base)
    assert result.returncode == 2 and "step 3" in result.stderr and "--lr" in result.stderr
    state = torch.load(tmp_path / "sft.state.pt", weights_only=True)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["optimizer"]["master"])
    assert not (tmp_path / "sft.pt").exists()
    assert script(*base, "--resume").returncode == 0


@pytest.mark.parametrize("arguments, words", [
    (["--model", "nowhere.pt"], ["nowhere.pt"]),
    (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--data", "bad.jsonl"], ["bad.jsonl", "line 2"]),
    (["--data", "silent.jsonl"], ["silent.jsonl", "response"]),
    (["--ops", "9", "3"], ["--ops 9 3"]),
    (["--batch", "0"], ["--batch"]),
    (["--p", "1.5"], ["--p"]),
    (["--out", "nowhere/sft.pt"], ["--out"]),
    (["--lr", "inf"], ["--lr: inf"]),
    (["--data", "silent.jsonl", "--ops", "1", "2"], ["--ops", "--data"]),
    (["--data", "silent.jsonl", "--method", "vanilla"], ["--method", "--data"]),
    (["--method", "vanilla", "--p", "0.5"], ["--p", "vanilla"]),
    (["--width", "64"], ["--width", "scratch"]),
    (["--model", "scratch", "--width", "1000000"], ["--width: 1000000"]),
    (["--export", "silent.jsonl"], ["--export silent.jsonl"]),
    (["--epoch", "3"], ["--epoch"]),  # no abbreviations: a typo must not be read as another flag
])
def test_bad_input_is_one_sentence(script, tmp_path, tiny_file, arguments, words):
    """Bug: a traceback, or worse, a run that starts with something else than what was asked for."""
    record = '{"question": "q", "answer": 1, "response": "r"}\n'
    (tmp_path / "bad.jsonl").write_text(record + "{broken\n")
    (tmp_path / "silent.jsonl").write_text('{"question": "q", "answer": 1}\n')
    result = script("sft.py", *(() if "--model" in arguments else ("--model", tiny_file)), *arguments)
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert all(word in last for word in words), result.stderr
    assert not (tmp_path / "sft.pt").exists()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "granite", "gemma2", "gpt2"])
def test_models_whose_logits_are_not_the_heads_product_are_refused(family):
    """Bug: another distribution than the model's own trained without a word: Granite divides its logits, Gemma 2 cuts
    them; GPT-2's parts have other names."""
    import transformers
    from test_sample import make_model
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, head_dim=16)
    other = {"granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**size, logits_scaling=8.0)),
             "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**size, final_logit_softcapping=0.1))}
    policy = SimpleNamespace(model=other[family]() if family in other else make_model(family), device="cpu")
    if family in ("qwen2", "qwen3", "llama"):
        return sft.check_head(policy)
    with pytest.raises(data.InputError, match=f"type {family} cannot be trained here"):
        sft.check_head(policy)


def test_what_changes_rounding_alone_may_change_on_the_way(tiny):
    """Bug: the README's remedies for too little memory refused by --resume."""
    model = tiny().model
    args = dict(lr=1e-3, micro_tokens=4096, gradient_checkpointing=False, data=None)
    before, after = (sft.identity(SimpleNamespace(**args | changed), model, sft.ROUNDING)
                     for changed in ({}, dict(micro_tokens=64, gradient_checkpointing=True)))
    assert before == after != sft.identity(SimpleNamespace(**args | dict(lr=1e-4)), model, sft.ROUNDING)
    assert before["a device of type"] == "cpu"  # begun on a GPU it would go on to other weights


def test_a_pretraining_that_blows_up_keeps_its_weights(tiny):
    """Bug: a NaN in one gradient that clipping spreads to every weight, and the next save to the disk."""
    policy = tiny()
    optimizer, before = sft.MuonAdamW(policy.model, 1e-3), [p.clone() for p in policy.model.parameters()]
    for p in policy.model.parameters():
        p.grad = torch.full_like(p, 0.1)
    next(policy.model.parameters()).grad[0] = torch.nan
    assert not optimizer.step(1.0) < 1e9
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters()))
    for p in policy.model.parameters():
        p.grad = torch.full_like(p, 0.1)
    assert 0 < optimizer.step(1.0) < 1e9
    assert not any(torch.equal(a, b) for a, b in zip(before, policy.model.parameters()))
