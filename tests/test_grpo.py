"""grpo.py: the formulas by hand, micro-batches, learning on a toy, resume after a kill, and the guard rails."""
import csv
import math
import signal
import time

import pytest
import torch

import data, grpo, sample, sft


# ------------------------------------------------------------------------------------------------- formulas
REWARDS = torch.tensor([[1., 0., 0., 0.], [1., 1., 0., 0.], [1., 1., 1., 1.]])
BY_HAND = torch.tensor([[1.5, -0.5, -0.5, -0.5],  # mean 1/4, std sqrt(3 (1/4)^2 + (3/4)^2) / 3) = 1/2
                        [0.8660254, 0.8660254, -0.8660254, -0.8660254],  # std sqrt(1/3)
                        [0.0, 0.0, 0.0, 0.0]])
WRONG_ADVANTAGES = {
    "sign": lambda r: -grpo.group_advantages(r),
    "no centring": lambda r: r / (r.std(1, keepdim=True) + 1e-6),
    "std of the batch": lambda r: (r - r.mean(1, keepdim=True)) / (r.std() + 1e-6),
    "population std": lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6),
    "mean of the batch": lambda r: (r - r.mean()) / (r.std(1, keepdim=True) + 1e-6),
    "zeros": torch.zeros_like,
}


def test_advantages():
    """Bugs: every wrong version of WRONG_ADVANTAGES; NaN in a group without variance."""
    matches = lambda f: torch.allclose(f(REWARDS), BY_HAND, atol=1e-4)
    assert matches(grpo.group_advantages)
    assert [name for name, wrong in WRONG_ADVANTAGES.items() if matches(wrong)] == []
    assert torch.allclose(grpo.group_advantages(REWARDS, std=False)[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    assert torch.equal(grpo.group_advantages(torch.ones(2, 1)), torch.zeros(2, 1))


# Two rollouts of 2 and 1 tokens. Ratios: e^0.5 = 1.6487 (clipped to 1.2), 1; e^-0.5 = 0.6065 (clipped to 0.8).
LOGPROB = torch.tensor([[-0.5, -1.0], [-2.0, -7.0]])
OLD = torch.tensor([[-1.0, -1.0], [-1.5, float("nan")]])  # what lies behind the mask must never count
REF = torch.tensor([[-0.5, -2.5], [-1.0, float("nan")]])
MASK = torch.tensor([[1, 1], [1, 0]])
ADVANTAGES = torch.tensor([2.0, -1.0])
# min(ratio A, clipped A): token by token 2.4, 2.0 and min(-0.6065, -0.8) = -0.8; d = ref - logprob = 0, -1.5, 1
SURROGATE = [2.4, 2.0, -0.8]
KL = {"k1": [0.0, 1.5, -1.0], "k2": [0.0, 1.125, 0.5], "k3": [0.0, math.exp(-1.5) + 0.5, math.e - 2]}


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_loss(norm, kl):
    """Bugs: sign, max for min, normalisers mixed up, the KL outside the mask or with d reversed."""
    a, b, c = (-s + 0.1 * k for s, k in zip(SURROGATE, KL[kl]))
    by_hand = {"sequence": ((a + b) / 2 + c) / 2, "token": (a + b + c) / 3, "constant": (a + b + c) / 10}
    inputs = [t.clone() for t in (LOGPROB, OLD, REF, ADVANTAGES, MASK)]
    loss = grpo.grpo_loss(*inputs, beta=0.1, kl=kl, norm=norm, denom=10 if norm == "constant" else None)
    assert loss.item() == pytest.approx(by_hand[norm], abs=1e-5)
    assert all(torch.equal(t, u) or t.isnan().any() for t, u in zip(inputs, (LOGPROB, OLD, REF, ADVANTAGES, MASK)))
    others = [value for name, value in by_hand.items() if name != norm] + [-by_hand[norm], 0.0]
    assert all(abs(loss.item() - wrong) > 1e-2 for wrong in others)
    reversed_kl = grpo.grpo_loss(LOGPROB, OLD, 2 * LOGPROB - REF, ADVANTAGES, MASK, beta=0.1, kl=kl, norm=norm,
                                 denom=10 if norm == "constant" else None)
    assert kl == "k2" or abs(loss.item() - reversed_kl.item()) > 1e-3  # k2 is symmetric in d


def test_clip_high_and_first_update():
    """Bugs: --clip-high ignored; a ratio whose gradient vanishes at 1, where every first update happens."""
    high = grpo.grpo_loss(LOGPROB, OLD, None, ADVANTAGES, MASK, clip_high=0.5, beta=0, norm="token")
    assert high.item() == pytest.approx(-(2 * 1.5 + 2.0 - 0.8) / 3, abs=1e-5)
    logprob = LOGPROB.clone().requires_grad_()
    loss = grpo.grpo_loss(logprob, logprob.detach(), None, ADVANTAGES, MASK, beta=0)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 - 1) / 2) and torch.allclose(logprob.grad, torch.tensor([[-0.5, -0.5], [0.5, 0.0]]))


def test_kl_estimates():
    """Bug: an estimator of KL(ref || pi): here k1, k2 and k3 are averaged exactly over tokens drawn from pi."""
    pi, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.6, 0.25, 0.15])
    truth, other = (pi * (pi / ref).log()).sum(), (ref * (ref / pi).log()).sum()
    for kind, tolerance in (("k1", 1e-6), ("k2", 2e-3), ("k3", 1e-6)):
        estimate = (pi * grpo.kl_estimate(pi.log(), ref.log(), kind)).sum()
        assert abs(estimate - truth) < tolerance
    assert abs(other - truth) > 5e-4
    assert grpo.kl_estimate(torch.tensor(-1.0), torch.tensor(-2.0), "k3") > 0


# --------------------------------------------------------------------------------------------- one whole step
@pytest.fixture(scope="module")
def batch(tiny):
    """3 problems x 4 rollouts with made-up rewards, one group without variance."""
    policy = tiny()
    problems = [p for p, _ in zip(data.generate(ops=(1, 2)), range(3))]
    prompts = [sample.encode_prompt(policy.tokenizer, p.question) for p in problems]
    groups = sample.generate(policy, prompts, n=4, max_new_tokens=20, seed=3)
    groups[0][0].tokens, groups[0][0].logprobs = groups[0][0].tokens[:5], groups[0][0].logprobs[:5]  # unequal lengths
    rollouts = [r for group in groups for r in group]
    examples = [(p, r.tokens) for p, group in zip(prompts, groups) for r in group]
    return examples, [r.logprobs for r in rollouts], torch.tensor([[1., 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])


def arguments(**changes):
    return type("Args", (), dict(no_std=False, micro_tokens=10**9, norm="sequence", max_new_tokens=20, epochs=1, temperature=1.0,
                                 clip=0.2, clip_high=None, beta=0.1, kl="k3", max_grad_norm=1.0) | changes)


class Recorder:
    """Stands in for the optimizer: keeps the gradient and changes nothing."""
    def __init__(self, model):
        self.model = model

    def step(self, clip):
        self.gradient = torch.cat([p.grad.flatten().clone() for p in self.model.parameters()])
        self.model.zero_grad()
        return self.gradient.norm().item()


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_gradient_does_not_depend_on_micro_batches(tiny, batch, norm):
    """Bugs: a mean of micro-batch means, a forgotten short last group, advantages in another order than the rows."""
    reference, gradients = tiny(1).model, {}
    for micro_tokens in (1, 200, 500, 10**9):
        policy = tiny()
        recorder = Recorder(policy.model)
        row = grpo.train_step(policy, reference, recorder, *batch, arguments(norm=norm, micro_tokens=micro_tokens))
        gradients[micro_tokens] = recorder.gradient
        assert row["drift_max"] < 1e-4 and row["clip_frac"] == 0 and row["kl"] > 0 and row["entropy"] > 0
    truth = gradients.pop(10**9)
    assert truth.norm() > 0 and all((g - truth).norm() / truth.norm() < 1e-5 for g in gradients.values())


def test_a_second_epoch_makes_the_clip_act(tiny, batch):
    """Bug: old log-probs taken after the update, so that the ratio is 1 for ever and the clip inert."""
    policy = tiny()
    row = grpo.train_step(policy, None, sft.Optimizer(policy.model, lr=0.05), *batch, arguments(epochs=2, beta=0))
    assert row["clip_frac"] > 0.05


def test_temperature_reaches_the_trainer(tiny):
    """Bug: rollouts at temperature 0.5 scored at temperature 1: sampler and trainer drift apart."""
    policy = tiny()
    prompts = [sample.encode_prompt(policy.tokenizer, "Compute.")]
    rollouts, = sample.generate(policy, prompts, n=4, max_new_tokens=8, temperature=0.5, seed=1)
    parts = [(prompts[0], r.tokens) for r in rollouts], [r.logprobs for r in rollouts], torch.tensor([[1., 0, 0, 0]])
    drift = [grpo.train_step(policy, None, Recorder(policy.model), *parts, arguments(beta=0, temperature=t))["drift_mean"] for t in (0.5, 1.0)]
    assert drift[0] < 1e-5 < 0.01 < drift[1]


@pytest.mark.parametrize("options", [{}, {"std": False}, {"norm": "token"}, {"norm": "constant"}, {"kl": "k2"}, {"clip_high": 0.28}])
def test_two_armed_bandit(options):
    """A policy of one token over two arms; arm 1 pays with 0.8, arm 0 with 0.2. Bug: a sign, or rewards that do not reach
    their own rollouts: with rewards shuffled the policy must not find the arm."""
    def final(shuffled):
        generator = torch.Generator().manual_seed(0)
        logits = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=0.5)
        for _ in range(150):
            p = logits.softmax(0).detach()
            arms = torch.multinomial(p, 64, replacement=True, generator=generator).view(8, 8)
            rewards = (torch.rand(8, 8, generator=generator) < torch.tensor([0.2, 0.8])[arms]).float()
            if shuffled:
                rewards = rewards.flatten()[torch.randperm(64, generator=generator)].view(8, 8)
            advantages = grpo.group_advantages(rewards, std=options.get("std", True)).flatten()
            logprob = logits.log_softmax(0)[arms.flatten()][:, None]
            loss = grpo.grpo_loss(logprob, logprob.detach(), torch.full_like(logprob, math.log(0.5)), advantages, torch.ones_like(logprob),
                                  **{k: v for k, v in options.items() if k != "std"})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return logits.softmax(0)[1].item()
    assert final(shuffled=False) > 0.95
    assert final(shuffled=True) < 0.9


# --------------------------------------------------------------------------------------------------- the run
SMALL = ["--prompts", 2, "--n", 2, "--max-new-tokens", 12, "--ops", 1, 1, "--eval-every", 4, "--eval-n", 3, "--patience", 99]
TIMES = ("tokens_per_s", "s_sample", "s_score", "s_train")


def outcome(folder, name):
    weights = torch.load(folder / f"{name}.pt", weights_only=True)["weights"]
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(open(folder / f"{name}.csv"))]
    return weights, rows


def test_resume_after_a_kill_is_bit_for_bit(process, script, tmp_path, tiny_file):
    """Bugs: resume without the optimizer's state, with a replayed or skipped problem, with doubled CSV rows."""
    base = ["--ckpt", tiny_file, "--steps", 10, *SMALL]
    assert script("grpo.py", *base, "--out", "whole.pt").returncode == 0
    run = process("grpo.py", *base, "--out", "killed.pt", "--save-every", 1)
    for _ in range(600):
        if (tmp_path / "killed.state.pt").exists() and len((tmp_path / "killed.csv").read_text().split("\n")) > 5:
            break
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed.pt").exists()
    refused = script("grpo.py", *base, "--out", "killed.pt")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    assert script("grpo.py", *base, "--out", "killed.pt", "--resume").returncode == 0
    (weights, rows), (weights2, rows2) = outcome(tmp_path, "whole"), outcome(tmp_path, "killed")
    assert rows == rows2 and len(rows) == 10
    assert all(torch.equal(weights[k], weights2[k]) for k in weights)
    assert "nothing to resume" in script("grpo.py", *base, "--out", "killed.pt", "--resume").stdout
    assert not (tmp_path / "killed.state.pt").exists()


def test_a_run_without_signal_stops_and_says_why(script, tiny_file):
    """Bug: hours of steps in which every rollout is wrong and nothing can be learned."""
    result = script("grpo.py", "--ckpt", tiny_file, "--steps", 50, *SMALL[:-1], 3)
    assert result.returncode == 2 and "no mixed group in 3 steps" in result.stderr and "--ops" in result.stderr
    assert "were cut at --max-new-tokens 12" in result.stderr + result.stdout


@pytest.mark.parametrize("row, words", [({"loss": float("nan")}, "not a finite number"), ({"grad_norm": float("inf")}, "not a finite number"),
                                        ({"drift_mean": 0.5}, "disagree"), ({"grad_norm": 0.0}, "gradient is 0")])
def test_guard_rails(row, words):
    """Bugs: training on after a NaN, after sampler and trainer have parted, or with a gradient that never arrives."""
    healthy = dict(step=3, loss=0.0, grad_norm=0.1, drift_mean=1e-6, cut_rate=0.0, mixed=0.5)
    assert grpo.watch(healthy, arguments(), None, None, False) is True
    with pytest.raises(data.InputError, match=words):
        grpo.watch(healthy | row, arguments(), None, None, False)


@pytest.mark.parametrize("flags, words", [
    (["--ckpt", "nowhere.pt"], ["nowhere.pt"]), (["--ops", "9", "3"], ["--ops 9 3"]), (["--n", "1"], ["--n 1"]), (["--steps", "0"], ["--steps"]),
    (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]), (["--max-new-tokens", "3000"], ["--max-new-tokens", "2048"]),
    (["--out", "grpo"], ["--out"]), (["--prompt", "3"], ["--prompt"])])
def test_bad_input_is_one_sentence(script, tmp_path, tiny_file, flags, words):
    """Bug: a traceback, or a run that fails at its last step for what was known at its first."""
    result = script("grpo.py", *(() if "--ckpt" in flags else ("--ckpt", tiny_file)), *flags)
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr and all(word in last for word in words), result.stderr
    assert not (tmp_path / "grpo.pt").exists()
