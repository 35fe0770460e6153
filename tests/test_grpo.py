"""grpo.py: the formulas by hand, micro-batches, learning on a toy, resume after a kill, the guard rails."""
import argparse
import csv
import doctest
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

import data, grpo, sample, sft
from conftest import ROOT

FULL = os.environ.get("BRIDGE_FULL")  # the slow part: more trials of the same


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


def test_doctests():
    """Bug: a worked example in a docstring that the code does not give."""
    result = doctest.testmod(grpo)
    assert result.attempted >= 5 and result.failed == 0


def test_advantages():
    """Bugs: every wrong version of WRONG_ADVANTAGES; NaN in a group without variance."""
    matches = lambda f: torch.allclose(f(REWARDS), BY_HAND, atol=1e-4)
    assert matches(grpo.group_advantages)
    assert [name for name, wrong in WRONG_ADVANTAGES.items() if matches(wrong)] == []
    assert torch.allclose(grpo.group_advantages(REWARDS, std=False)[0],
                          torch.tensor([0.75, -0.25, -0.25, -0.25]))
    assert torch.equal(grpo.group_advantages(torch.ones(2, 1)), torch.zeros(2, 1))


# Two rollouts of 2 and 1 tokens. Ratios: e^0.5 = 1.6487 (clipped to 1.2), 1; e^-0.5 = 0.6065 (clipped to 0.8)
LOGPROB = torch.tensor([[-0.5, -1.0], [-2.0, -7.0]])
OLD = torch.tensor([[-1.0, -1.0], [-1.5, float("nan")]])  # what lies behind the mask must never count
REF = torch.tensor([[-0.5, -2.5], [-1.0, float("nan")]])
MASK = torch.tensor([[1, 1], [1, 0]])
ADVANTAGES = torch.tensor([2.0, -1.0])
# min(ratio A, clipped A) by token: 2.4, 2.0 and min(-0.6065, -0.8) = -0.8; d = ref - logprob = 0, -1.5, 1
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
    originals = (LOGPROB, OLD, REF, ADVANTAGES, MASK)
    assert all(torch.equal(t, u) or t.isnan().any() for t, u in zip(inputs, originals))
    others = [value for name, value in by_hand.items() if name != norm] + [-by_hand[norm], 0.0]
    assert all(abs(loss.item() - wrong) > 1e-2 for wrong in others)
    reversed_kl = grpo.grpo_loss(LOGPROB, OLD, 2 * LOGPROB - REF, ADVANTAGES, MASK, beta=0.1, kl=kl,
                                 norm=norm, denom=10 if norm == "constant" else None)
    assert kl == "k2" or abs(loss.item() - reversed_kl.item()) > 1e-3  # k2 is symmetric in d


def rows(*numbers):
    return [t[list(numbers)].nan_to_num(3.0) for t in (LOGPROB, OLD, REF, ADVANTAGES, MASK)]


def pieces(logprob, old, ref, advantages, mask):
    """Surrogate, KL and mask per token, for wrong versions to be built from."""
    ratio, A = (logprob - old).exp(), advantages[:, None]
    return torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A), grpo.kl_estimate(logprob, ref), mask


def per_sequence(loss, mask):
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def reward_maximised(logprob, old, ref, advantages, mask):
    ratio, A = (logprob - old).exp(), advantages[:, None]
    surrogate = torch.maximum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    return per_sequence(-surrogate + 0.1 * grpo.kl_estimate(logprob, ref), mask)


WRONG_LOSSES = {
    "sign": lambda *b: (lambda s, k, m: per_sequence(s + 0.1 * k, m))(*pieces(*b)),
    "KL as a reward": lambda *b: (lambda s, k, m: per_sequence(-s - 0.1 * k, m))(*pieces(*b)),
    "KL without mask": lambda *b: (lambda s, k, m: per_sequence(-s, m) + 0.1 * k.mean())(*pieces(*b)),
    "KL of the batch's tokens": lambda *b: (
        lambda s, k, m: per_sequence(-s, m) + 0.1 * (k * m).sum() / m.sum())(*pieces(*b)),
    "mask above the fraction line only": lambda *b: (
        lambda s, k, m: ((-s + 0.1 * k) * m).mean())(*pieces(*b)),
    "mask below the fraction line only": lambda *b: (
        lambda s, k, m: ((-s + 0.1 * k).sum(1) / m.sum(1)).mean())(*pieces(*b)),
    "no mask": lambda *b: (lambda s, k, m: (-s + 0.1 * k).mean())(*pieces(*b)),
    "max for min": reward_maximised,
    "no clip": lambda l, o, r, a, m: per_sequence(
        -(l - o).exp() * a[:, None] + 0.1 * grpo.kl_estimate(l, r), m),
}


def test_wrong_losses_are_rejected():
    """Bugs: each of WRONG_LOSSES, and micro-batches that are averaged in place of added."""
    truth = ((-2.4 - 2.0 + 0.1 * sum(KL["k3"][:2])) / 2 + 0.8 + 0.1 * KL["k3"][2]) / 2
    right = lambda loss: abs(float(loss) - truth) < 1e-5
    assert right(grpo.grpo_loss(*rows(0, 1), beta=0.1))
    assert [name for name, wrong in WRONG_LOSSES.items() if right(wrong(*rows(0, 1)))] == []
    # rows 0, 0, 1 in micro-batches of two and one
    for norm, denom in (("sequence", 3), ("token", 5), ("constant", 30)):
        whole = grpo.grpo_loss(*rows(0, 0, 1), norm=norm, denom=denom)
        parts = lambda denom: [grpo.grpo_loss(*rows(0, 0), norm=norm, denom=denom),
                               grpo.grpo_loss(*rows(1), norm=norm, denom=denom)]
        assert torch.allclose(sum(parts(denom)), whole)
        assert abs(sum(parts(None)) / 2 - whole) > 1e-2


def test_entropy_bonus_and_importance_weights():
    """Bugs: a bonus that lowers the entropy or counts masked tokens; the ratio upside down, without its cap,
    or on the KL too."""
    base, H = grpo.grpo_loss(*rows(0, 1), beta=0.1), torch.tensor([[1.0, 3.0], [5.0, float("nan")]])
    assert torch.allclose(grpo.grpo_loss(*rows(0, 1), beta=0.1, entropy=H, entropy_bonus=0.01),
                          base - 0.01 * (2 + 5) / 2)
    weight = grpo.importance_weight(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -2.0]),
                                    cap=2.0)
    assert torch.allclose(weight, torch.tensor([2.0, 1.0, math.exp(-1)]))  # e^1 is cut at 2
    weight = torch.tensor([[0.5, 1.0], [2.0, float("nan")]])
    by_hand = ((-0.5 * 2.4 - 2.0 + 0.1 * sum(KL["k3"][:2])) / 2 + 2 * 0.8 + 0.1 * KL["k3"][2]) / 2
    assert grpo.grpo_loss(*rows(0, 1), beta=0.1, weight=weight).item() == pytest.approx(by_hand, abs=1e-5)


def test_clip_high_and_first_update():
    """Bugs: --clip-high ignored; a ratio whose gradient vanishes at 1, where every first update happens."""
    high = grpo.grpo_loss(LOGPROB, OLD, None, ADVANTAGES, MASK, clip_high=0.5, beta=0, norm="token")
    assert high.item() == pytest.approx(-(2 * 1.5 + 2.0 - 0.8) / 3, abs=1e-5)
    logprob = LOGPROB.clone().requires_grad_()
    loss = grpo.grpo_loss(logprob, logprob.detach(), None, ADVANTAGES, MASK, beta=0)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 - 1) / 2)
    assert torch.allclose(logprob.grad, torch.tensor([[-0.5, -0.5], [0.5, 0.0]]))


def test_kl_estimates():
    """Bug: an estimator of KL(ref || pi): here k1, k2 and k3 are averaged exactly over tokens drawn from
    pi."""
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
    # unequal lengths
    groups[0][0].tokens, groups[0][0].logprobs = groups[0][0].tokens[:5], groups[0][0].logprobs[:5]
    return grpo.Rollouts(examples=[(p, r.tokens) for p, group in zip(prompts, groups) for r in group],
                         logprobs=[r.logprobs for group in groups for r in group],
                         rewards=torch.tensor([[1., 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]))


def arguments(**changes):
    defaults = dict(no_std=False, micro_tokens=10**9, norm="sequence", max_new_tokens=20, epochs=1,
                    temperature=1.0, clip=0.2, clip_high=None, beta=0.1, kl="k3", max_grad_norm=1.0,
                    drop_flat=False, max_kl=None, entropy=0.0, tis=None, format_reward=0.0)
    return SimpleNamespace(**(defaults | changes))


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
    """Bugs: a mean of micro-batch means, a forgotten short last group, advantages in another order than the
    rows."""
    reference, gradients = tiny(1).model, {}
    for micro_tokens in (1, 200, 500, 10**9):
        policy = tiny()
        recorder = Recorder(policy.model)
        row = grpo.train_step(policy, reference, recorder, batch,
                              arguments(norm=norm, micro_tokens=micro_tokens))
        gradients[micro_tokens] = recorder.gradient
        assert row["drift_max"] < 1e-4 and row["clip_frac"] == 0 and row["kl"] > 0 and row["entropy"] > 0
    truth = gradients.pop(10**9)
    assert truth.norm() > 0 and all((g - truth).norm() / truth.norm() < 1e-5 for g in gradients.values())


def step_gradient(policy, batch, monkeypatch=None, size=None, **options):
    """(gradient, log row) of one train_step; size: rows in a micro-batch."""
    if size:
        monkeypatch.setattr(grpo, "pack", lambda examples, tokens: [
            list(range(i, min(i + size, len(examples)))) for i in range(0, len(examples), size)])
    recorder = Recorder(policy.model)
    row = grpo.train_step(policy, policy.reference, recorder, batch, arguments(**options))
    return recorder.gradient, row


@pytest.mark.parametrize("options", [{}, {"norm": "token"}, {"norm": "constant"}, {"checkpointing": True},
                                     {"drop_flat": True, "max_kl": 0.0115, "entropy": 0.01, "tis": 1.0,
                                      "norm": "token"}])
def test_gradient_is_the_same_for_1_2_3_7_and_all_rows(tiny, batch, monkeypatch, options):
    """Bugs: those above, for every option; a dropped rollout that still counts in one micro-batch's
    denominator."""
    policy, options, gradients = tiny(), dict(options), {}
    policy.reference = tiny(1).model
    if options.pop("checkpointing", False):
        sft.checkpoint_layers(policy.model)
    for size in (1, 2, 3, 7, 12):
        gradients[size], row = step_gradient(policy, batch, monkeypatch, size, **options)
    truth = gradients.pop(12)
    assert 0 < row["dropped"] < 8 if "max_kl" in options else row["dropped"] == 0
    assert truth.norm() > 0
    assert max(((g - truth).norm() / truth.norm()).item() for g in gradients.values()) < 1e-6


def test_dropped_rollouts_leave_the_fraction_above_and_below_the_line(tiny, batch):
    """Bug: a dropped group that still counts in the denominator (rejected below), or whose KL still pulls."""
    policy = tiny()
    policy.reference = tiny(1).model
    dropped, _ = step_gradient(policy, batch, drop_flat=True)
    without, _ = step_gradient(policy, grpo.Rollouts(batch.examples[:8], batch.logprobs[:8],
                                                     batch.rewards[:2]))
    kept, _ = step_gradient(policy, batch)
    assert torch.allclose(dropped, without, rtol=1e-4, atol=1e-8)
    assert (dropped - without * 8 / 12).norm() > 0.1 * dropped.norm()
    assert (dropped - kept).norm() > 0.01 * dropped.norm()
    none, row = step_gradient_or_none(policy, batch, max_kl=1e-9)
    assert none is None and row["dropped"] == 12 and row["grad_norm"] == 0  # nothing left: no update at all
    flat = grpo.Rollouts(batch.examples, batch.logprobs, torch.ones_like(batch.rewards))
    none, row = step_gradient_or_none(policy, flat, drop_flat=True)
    assert none is None and row["loss"] == row["grad_norm"] == 0 and math.isnan(row["entropy"])  # not measured


def filled(model, *words):
    """grpo.py's flags as it would have them for this model."""
    parser = data.Parser("")
    grpo.add_flags(parser)
    args = parser.parse_args(words)
    sft.fill_in(args, model, grpo.PRESETS)
    return args


LARGE = SimpleNamespace(parameters=lambda: [torch.empty(60_000_000, device="meta")])


def test_a_tiny_model_drops_flat_groups_and_the_papers_does_not(tiny):
    """Bugs: a preset that overrides what was asked for; flat groups scored by default for the tiny model."""
    assert [filled(model, *words).drop_flat for model in (tiny().model, LARGE)
            for words in ((), ("--drop-flat",), ("--no-drop-flat",))] == [True, True, False, False, True, False]


def test_a_tiny_model_has_another_kl_coefficient_for_promptbench(tiny):
    """Bugs: PromptBench's coefficient on iGSM or for the paper's models; one that was asked for overridden."""
    promptbench = ("--task", "promptbench")
    assert [filled(model, *words).beta for model in (tiny().model, LARGE)
            for words in ((), promptbench, (*promptbench, "--beta", "0.5"))] == [1e-3, 5e-3, 0.5, 1e-3, 1e-3, 0.5]
    assert "0.001 (promptbench: 0.005) for a tiny model, else 0.001" in sft.describe_presets(grpo.PRESETS).beta


def step_gradient_or_none(policy, batch, **options):
    recorder = Recorder(policy.model)
    row = grpo.train_step(policy, policy.reference, recorder, batch, arguments(**options))
    return getattr(recorder, "gradient", None), row


def test_importance_weights_reach_the_gradient(tiny, batch):
    """Bugs: the sampler's log-probs of other rows; pi_sampler / pi_old; a weight that is differentiated."""
    policy = tiny()
    policy.reference = None
    plain, _ = step_gradient(policy, batch, beta=0)
    # a sampler that gave every token half the trainer's probability
    half = [[x - math.log(2) for x in row] for row in batch.logprobs]
    for cap, factor in ((10, 2.0), (1.5, 1.5)):
        weighted, _ = step_gradient(policy, grpo.Rollouts(batch.examples, half, batch.rewards), beta=0,
                                    tis=cap)
        assert torch.allclose(weighted, factor * plain, rtol=1e-3, atol=1e-6)


def by_the_book(model, reference, rollouts, args, old=None):
    """(gradient, clip_frac) of one update, spelled out: row by row, the whole vocabulary, no micro-batch.
    old: log pi_old of each row, or None in the first update."""
    centred = rollouts.rewards - rollouts.rewards.mean(1, keepdim=True)
    advantages = centred if args.no_std else centred / (rollouts.rewards.std(1, keepdim=True) + 1e-6)
    above = 1 + (args.clip if args.clip_high is None else args.clip_high)
    kept, outside, tokens = [], 0, sum(len(response) for _, response in rollouts.examples)

    def logprobs(model, prompt, response):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        return (logits / args.temperature).log_softmax(-1)  # (T, V)
    for row, (prompt, response) in enumerate(rollouts.examples):
        A, sampled = advantages.flatten()[row], torch.tensor(rollouts.logprobs[row])
        log_p, chosen = logprobs(model, prompt, response), torch.tensor(response)[:, None]
        ref = logprobs(reference, prompt, response).gather(1, chosen)[:, 0].detach()
        logp, entropy = log_p.gather(1, chosen)[:, 0], -(log_p.exp() * log_p).sum(-1)
        before = logp.detach() if old is None else old[row]
        ratio, d = (logp - before).exp(), ref - logp
        outside += ((ratio < 1 - args.clip) | (ratio > above)).sum().item()
        gain = torch.minimum(ratio * A, ratio.clamp(1 - args.clip, above) * A)
        if args.tis:
            gain = gain * (before - sampled).exp().clamp(max=args.tis)
        kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[args.kl]
        moved = ((ref - sampled).exp() - 1 - (ref - sampled)).mean()
        flat = rollouts.rewards[row // rollouts.rewards.shape[1]].unique().numel() == 1
        if not (args.drop_flat and flat) and not (args.max_kl and moved > args.max_kl):
            kept.append(-gain + args.beta * kl - args.entropy * entropy)
    losses = {"sequence": lambda: sum(loss.mean() for loss in kept) / len(kept),
              "token": lambda: torch.cat(kept).sum() / len(torch.cat(kept)),
              "constant": lambda: torch.cat(kept).sum() / (len(kept) * args.max_new_tokens)}
    model.zero_grad()
    losses[args.norm]().backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters()]), outside / tokens


def uneven(batch):
    """The batch with responses of 7 to 20 tokens, its flat group first, from a sampler that is a little off:
    --norm, --drop-flat, --tis and --max-kl have something to do."""
    noise, lengths = Random(0), [20 - 5 * i % 14 for i in range(12)]
    return replace(batch, examples=[(p, r[:length]) for (p, r), length in zip(batch.examples, lengths)],
                   logprobs=[[x + noise.gauss(0, 0.1) for x in row[:length]]
                             for row, length in zip(batch.logprobs, lengths)], rewards=batch.rewards.flip(0))


MOVED = 0.0275  # a mean KL that about half of the rollouts are above
OPTIONS = [{}, {"no_std": True}, {"temperature": 0.7}, {"beta": 0.5}, {"kl": "k1"}, {"kl": "k2"},
           {"norm": "token"}, {"norm": "constant"}, {"norm": "constant", "max_new_tokens": 77},
           {"entropy": 0.1}, {"tis": 1.1}, {"drop_flat": True}, {"max_kl": MOVED}, {"max_kl": MOVED, "norm": "token"},
           {"max_kl": MOVED, "norm": "constant"}, {"drop_flat": True, "max_kl": MOVED, "norm": "token"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_changes_the_gradient_as_its_formula_says(options, tiny, batch):
    """Bugs: an option that is read and has no effect, another effect, or one on the fraction's upper end
    alone. The wrong version: the same without the option."""
    policy, args = tiny(), arguments(**options)
    policy.reference, rollouts = tiny(1).model, uneven(batch)
    gradient, row = step_gradient(policy, rollouts, **options)
    truth, _ = by_the_book(policy.model, policy.reference, rollouts, args)
    assert (gradient - truth).norm() < 1e-5 * truth.norm()
    if options.get("max_kl"):
        assert 0 < row["dropped"] < 8
    for name in options:
        less = arguments(**{other: value for other, value in options.items() if other != name})
        wrong, _ = by_the_book(policy.model, policy.reference, rollouts, less)
        if less.norm == "constant" or name != "max_new_tokens":
            assert (gradient - wrong).norm() > 1e-3 * truth.norm(), name


class Nudge(Recorder):
    """Stands in for the optimizer: keeps every gradient and moves the weights by given noise in between."""
    def __init__(self, model):
        super().__init__(model)
        self.gradients = []

    @torch.no_grad()
    def step(self, clip):
        norm = super().step(clip)
        self.gradients.append(self.gradient)
        generator = torch.Generator().manual_seed(0)
        for p in self.model.parameters():
            p += 0.15 * torch.randn(p.shape, generator=generator)
        return norm


@pytest.mark.parametrize("options", [{}, {"clip": 0.05}, {"clip_high": 0.6}, {"tis": 1.1},
                                     {"temperature": 0.7}], ids=str)
def test_the_second_update_is_clipped_as_its_formula_says(options, tiny, batch):
    """Bugs: one clip for both sides; log pi_old of another pass or at another temperature; weights of --tis
    that follow the policy; a clip_frac of the last pass alone, or of one side."""
    policy, args, reference = tiny(), arguments(epochs=2, **options | {"beta": 0.01}), tiny(1).model
    nudge, rollouts = Nudge(policy.model), uneven(batch)
    row = grpo.train_step(policy, reference, nudge, rollouts, args)
    model, again = tiny().model, Nudge(tiny().model)
    first, _ = by_the_book(model, reference, rollouts, args)
    old = []
    for prompt, response in rollouts.examples:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        log_p = (logits / args.temperature).log_softmax(-1)
        old.append(log_p.gather(1, torch.tensor(response)[:, None])[:, 0].detach())
    again.model = model
    again.step(1.0)  # the same nudge
    second, outside = by_the_book(model, reference, rollouts, args, old)
    for gradient, truth in zip(nudge.gradients, (first, second)):
        assert (gradient - truth).norm() < 1e-5 * truth.norm()
    assert row["clip_frac"] == pytest.approx(outside / 2, abs=1e-6) and outside > 0.05
    for changed in ({"clip": 0.5, "clip_high": args.clip_high or args.clip}, {"clip_high": 0.3}):  # each side
        wrong, _ = by_the_book(model, reference, rollouts, arguments(**vars(args) | changed), old)
        assert (second - wrong).norm() > 1e-3 * second.norm()


def test_the_log_of_a_step_by_hand(tiny, batch):
    """Bugs: means over padded tokens or over rows; a KL against the policy after its update; the drift
    without its sign taken off; a loss summed over updates; a KL of 0 where no reference measured one."""
    policy, reference = tiny(), tiny(1).model
    off = replace(batch, logprobs=[[x + (0.5 if i % 2 else -0.1) for i, x in enumerate(row)]
                                   for row in batch.logprobs])
    row = grpo.train_step(policy, reference, Nudge(policy.model), off, arguments(epochs=2))
    drift = [0.5 if i % 2 else 0.1 for response in batch.logprobs for i in range(len(response))]
    assert row["drift_mean"] == pytest.approx(sum(drift) / len(drift), abs=1e-4)
    assert row["drift_max"] == pytest.approx(0.5, abs=1e-4)
    kl, entropy = [], []
    for prompt, response in batch.examples:
        tokens = torch.tensor([prompt + response])
        pi, ref = (model(input_ids=tokens).logits[0, len(prompt) - 1:-1].log_softmax(-1).detach()
                   for model in (tiny().model, reference))
        d = (ref - pi).gather(1, torch.tensor(response)[:, None])[:, 0]
        kl += (d.exp() - 1 - d).tolist()
        entropy += (-(pi.exp() * pi).sum(-1)).tolist()
    assert row["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert row["entropy"] == pytest.approx(sum(entropy) / len(entropy), rel=1e-5)
    once, twice = (grpo.train_step(policy, reference, Recorder(policy.model), off, arguments(epochs=epochs))["loss"]
                   for epochs in (1, 2))  # no weight moves in between
    assert once == pytest.approx(twice, rel=1e-5) and abs(once) > 1e-6
    assert math.isnan(grpo.train_step(policy, None, Recorder(policy.model), off, arguments(beta=0))["kl"])


def test_shares_of_groups_by_hand(monkeypatch):
    """Bugs: all_wrong and all_right swapped; groups counted by their rewards, which --format-reward moves."""
    right = torch.tensor([[0., 0.], [0., 1.], [1., 1.], [1., 1.], [0., 0.], [1., 0.], [1., 1.], [1., 1.]])
    rollouts = grpo.Rollouts([([0], [1] * 3)] * 15 + [([0], [1] * 19)], None, right + 0.05, right,
                             ["length"] * 4 + ["eos"] * 12)
    monkeypatch.setattr(grpo, "roll_out", lambda *_: rollouts)
    monkeypatch.setattr(grpo, "train_step", lambda *_: {})
    _, row = grpo.take_step(None, None, None, [], 1, None, SimpleNamespace(n=2, lr_decay=0))
    by_hand = dict(all_wrong=0.25, mixed=0.25, all_right=0.5, accuracy=10 / 16, reward=10 / 16 + 0.05,
                   mean_tokens=4, cut_rate=0.25)
    assert {name: row[name] for name in by_hand} == pytest.approx(by_hand)


def test_learning_rate_of_each_step(monkeypatch):
    """Bugs: a decay that begins with the first step, ends above or below its last share, or follows the steps
    since a resume."""
    rates, group = [], {"lr": 8.0}
    optimizer = SimpleNamespace(adam=SimpleNamespace(param_groups=[group]))
    rollouts = grpo.Rollouts([([0], [1])] * 2, None, torch.ones(1, 2), torch.ones(1, 2), ["eos"] * 2)
    monkeypatch.setattr(grpo, "roll_out", lambda *_: rollouts)
    monkeypatch.setattr(grpo, "train_step", lambda *_: rates.append(group["lr"]) or {})
    args = SimpleNamespace(n=2, lr=8.0, lr_decay=0.4, steps=10)
    for step in range(1, 11):
        grpo.take_step(None, None, optimizer, [], step, None, args)
    assert rates == [8.0] * 7 + [6.0, 4.0, 2.0]  # (10 - step + 1) / (0.4 * 10) of it
    rates.clear()
    grpo.take_step(None, None, optimizer, [], 9, None, args)  # as after a resume
    assert rates == [4.0]


def test_adamw_by_hand(tiny, batch):
    """Bugs: --max-grad-norm that scales the logged norm, or nothing; --weight-decay that is scaled by the
    gradient (Adam's L2 in place of AdamW); --lr or betas that are the library's."""
    policy = tiny()
    before = [p.detach().clone() for p in policy.model.parameters()]
    optimizer = sft.Optimizer(policy.model, lr=0.01, weight_decay=0.3)
    policy.reference = None
    gradient, row = step_gradient(policy, batch, beta=0)
    norm = gradient.norm().item()
    row = grpo.train_step(policy, None, optimizer, batch, arguments(beta=0, max_grad_norm=norm / 7))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    parts = gradient.div(7).split([p.numel() for p in before])
    for p, old, g in zip(policy.model.parameters(), before, parts):
        moments = optimizer.adam.state[p]
        assert torch.allclose(moments["exp_avg"].flatten(), 0.1 * g, rtol=1e-3, atol=1e-9)
        assert torch.allclose(moments["exp_avg_sq"].flatten(), 0.05 * g * g, rtol=1e-3, atol=1e-12)
        by_hand = old * (1 - 0.01 * 0.3) - 0.01 * (g / (g.abs() + 1e-8)).view_as(old)
        large = (g.abs() > 1e-5).view_as(old)  # below, rounding decides the sign
        assert torch.allclose(p[large], by_hand[large], rtol=1e-4, atol=1e-5)


def test_seeds_are_distinct_over_runs_and_steps(tiny, monkeypatch):
    """Bugs: seed + step, so that step 2 of seed 0 draws what step 1 of seed 1 drew; the same draws in the
    filter; a sampler at temperature 1."""
    seeds, policy = [], tiny()

    def spy(_, prompts, n, max_new_tokens, max_batch, temperature, seed):
        assert (n, max_new_tokens, max_batch, temperature) == (2, 20, 5, 0.7)
        seeds.append(seed)
        return []
    monkeypatch.setattr(sample, "generate", spy)
    for seed in range(4):
        for step in (*range(-500, 0, 20), *range(0, 1000)):
            grpo.roll_out(policy, [], arguments(seed=seed, temperature=0.7), step, 2, 5)
    assert len(set(seeds)) == len(seeds) == 4 * 1025


def test_problems_of_sft_rl_and_validation_are_disjoint(tmp_path):
    """Bugs: held-out problems that are trained on; RL on the problems that the SFT policy has learned by
    heart."""
    prints = lambda problems: {data.fingerprint(problem.question) for problem in problems}
    args = SimpleNamespace(seed=3, data=None, eval_n=100, eval_every=1, n=300, method="vanilla", behaviors=(),
                           p=0.1)
    options = dict(task="igsm", ops=(3, 4))
    source, held_out = grpo.problem_source(args, options)
    trained = prints(p for p, _ in zip(source(), range(300)))
    learned = prints(sft.answered_problems(args, options))
    assert len(trained) == len(learned) == 300 and len(prints(held_out)) == 100
    assert not trained & learned and not prints(held_out) & (trained | learned)
    assert {data.split_of(p.question) for p in held_out} == {"val"}
    data.write_records(tmp_path / "p.jsonl", ({"question": str(i), "answer": i} for i in range(37)))
    for wanted, count in ((2, 2), (99, 3)):  # at most a tenth
        source, held_out = grpo.problem_source(SimpleNamespace(data=tmp_path / "p.jsonl", eval_n=wanted,
                                                               eval_every=1), {})
        assert [p.answer for p in [*source(), *held_out]] == list(range(37)) and len(held_out) == count
    stream = lambda done: grpo.problem_stream(source, [0, 5, 7], SimpleNamespace(data="p", prompts=2), done)
    assert [p.answer for p, _ in zip(stream(0), range(7))] == [0, 5, 7, 0, 5, 7, 0]
    assert [p.answer for p, _ in zip(stream(2), range(3))] == [5, 7, 0]


def test_what_was_watched_survives_a_resume(script, tmp_path, tiny_file, monkeypatch):
    """Bugs: a run that is killed now and then waits for ever for a mixed group; a late drift that stops a
    resumed run, as if it were its first."""
    base = ["grpo.py", "--ckpt", tiny_file, "--steps", 50, *SMALL[:-1], 5]
    row, seen = sft.Log.row, []
    monkeypatch.setattr(grpo, "watch", lambda row, args, checked: seen.append(checked) or True)

    def interrupted(log, **values):
        row(log, **values)
        if values["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(sft.Log, "row", interrupted)
    assert script(*base).returncode == 130
    check_refusal(script(*base, "--resume"), ["no mixed group in 5 steps"])
    assert len(outcome_rows(tmp_path / "grpo.csv")) == 5 and seen == [False, True, True, True, True]


def outcome_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("flags, seen", [
    (["--lr", 0.5, "--weight-decay", 0.25], (0.5, 0.25)), ([], (2e-4, 0.01))])
def test_the_optimizer_gets_its_flags(flags, seen, script, tiny_file, monkeypatch):
    """Bug: a flag that ends in args, and a default that trains."""
    class Seen(Exception):
        pass

    def stop(model, lr, weight_decay):
        raise Seen(lr, weight_decay)
    monkeypatch.setattr(sft, "Optimizer", stop)
    with pytest.raises(Seen) as stopped:
        script("grpo.py", "--ckpt", tiny_file, *SMALL, *flags)
    assert stopped.value.args == seen
    with pytest.raises(Seen) as stopped:
        script("sft.py", "--model", tiny_file, "--n", 4, "--ops", 1, 1, *flags)
    assert stopped.value.args == (seen if flags else (5e-4, 0.01))


def test_gradient_checkpointing_recomputes(tiny, batch):
    """Bugs: a switch that does nothing outside training mode; one that turns dropout on."""
    policy, calls = tiny(), []
    policy.reference = None
    policy.model.eval()  # as load_policy leaves it
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, _ = step_gradient(policy, batch, beta=0)
    once = len(calls)
    sft.checkpoint_layers(policy.model)
    again, row = step_gradient(policy, batch, beta=0)
    assert len(calls) == 3 * once and torch.equal(plain, again) and row["drift_max"] < 1e-4
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "llama-3.2"])
def test_a_prompt_computed_once_is_the_same_sum(family, checkpointing):
    """Bugs: padding of a shorter prompt that is looked at, positions that start anew, keys without their gradient,
    another row's prompt, keys noted twice under checkpointing. Three wrong versions are rejected."""
    model, chance = hugging_face_model(family, 97).eval(), Random(1)
    prompts = [[chance.randrange(97) for _ in range(length)] for length in (7, 1, 23, 12)]
    examples = [(prompt, [chance.randrange(97) for _ in range(length)])
                for prompt in prompts for length in (3, 9, 1)]
    if checkpointing:
        sft.checkpoint_layers(model)

    def values(form, change=lambda batch: batch):
        """Log-probs, and the gradient of a sum of them in which every token has a weight of its own."""
        model.zero_grad()
        batch = change(grpo.make_batch(examples, [[0.0] * len(r) for _, r in examples], torch.ones(12), "cpu"))
        logprob, _ = sample.token_logprobs(form(model, batch), model.lm_head.weight, batch.targets[batch.mask])
        (logprob * torch.linspace(0.5, 2, len(logprob))).sum().backward()
        return logprob.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    logprob, gradient = values(grpo.prompt_once)
    truth, its_gradient = values(grpo.row_by_row)
    assert (logprob - truth).abs().max() < 5e-6
    assert (gradient - its_gradient).norm() < 2e-6 * its_gradient.norm()
    for wrong in (lambda b: replace(b, lengths=b.lengths.clamp(min=22)),  # padding of the prompts is seen
                  lambda b: replace(b, owner=b.owner.roll(1)),
                  lambda b: replace(b, inputs=b.inputs.roll(1, dims=1))):
        logprob, gradient = values(grpo.prompt_once, wrong)
        assert (logprob - truth).abs().max() > 1e-3
        assert (gradient - its_gradient).norm() > 1e-3 * its_gradient.norm()


def test_packing():
    """Bugs: a row lost or twice; a micro-batch above the bound; a prompt computed for each of its rows."""
    chance = Random(3)
    prompts = [[i] * chance.randrange(20, 60) for i in range(9)]
    examples = [(prompt, [0] * chance.randrange(5, 80)) for prompt in prompts for _ in range(8)]
    batches = grpo.pack(examples, 1000)
    assert sorted(row for batch in batches for row in batch) == list(range(72))
    for batch in batches:
        some = [examples[row] for row in batch]
        made = grpo.make_batch(some, [[0.0]] * len(some), torch.ones(len(some)), "cpu")
        assert made.prompts.numel() + made.inputs.numel() <= 1000
    computed = sum(len({tuple(examples[row][0]) for row in batch}) for batch in batches)
    assert computed < 9 + len(batches) and grpo.pack(examples[:1], 10) == [[0]]


def test_a_second_epoch_makes_the_clip_act(tiny, batch):
    """Bug: old log-probs taken after the update, so that the ratio is 1 for ever and the clip inert."""
    policy = tiny()
    row = grpo.train_step(policy, None, sft.Optimizer(policy.model, lr=0.05), batch,
                          arguments(epochs=2, beta=0))
    assert row["clip_frac"] > 0.05


def test_temperature_reaches_the_trainer(tiny):
    """Bug: rollouts at temperature 0.5 scored at temperature 1: sampler and trainer drift apart."""
    policy = tiny()
    prompts = [sample.encode_prompt(policy.tokenizer, "Compute.")]
    rollouts, = sample.generate(policy, prompts, n=4, max_new_tokens=8, temperature=0.5, seed=1)
    four = grpo.Rollouts([(prompts[0], r.tokens) for r in rollouts], [r.logprobs for r in rollouts],
                         torch.tensor([[1., 0, 0, 0]]))
    drift = [grpo.train_step(policy, None, Recorder(policy.model), four,
                             arguments(beta=0, temperature=t))["drift_mean"]
             for t in (0.5, 1.0)]
    assert drift[0] < 1e-5 < 0.01 < drift[1]


@pytest.mark.parametrize("options", [{}, {"std": False}, {"norm": "token"}, {"norm": "constant"},
                                     {"kl": "k2"}, {"clip_high": 0.28}])
def test_two_armed_bandit(options):
    """A policy of one token over two arms; arm 1 pays with 0.8, arm 0 with 0.2. Bug: a sign, or rewards that
    do not reach their own rollouts: with rewards shuffled the policy must not find the arm."""
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
            others = {name: value for name, value in options.items() if name != "std"}
            reference = torch.full_like(logprob, math.log(0.5))
            loss = grpo.grpo_loss(logprob, logprob.detach(), reference, advantages, torch.ones_like(logprob),
                                  **others)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return logits.softmax(0)[1].item()
    assert final(shuffled=False) > 0.95
    assert final(shuffled=True) < 0.9


class Arms(torch.nn.Module):
    """A language model of two words whose logits are its two weights, with the parts that the trainer asks
    for."""
    config = SimpleNamespace(model_type="two arms")  # it has no layers that could share a prompt

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(1, 2, bias=False)
        torch.nn.init.zeros_(self.lm_head.weight)

    def model(self, input_ids, use_cache):
        return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 1))


@pytest.mark.parametrize("options", [
    {}, {"no_std": True}, {"norm": "token"}, {"norm": "constant"}, {"kl": "k1"}, {"kl": "k2"}, {"beta": 0},
    {"clip_high": 0.28}, {"epochs": 2}, {"drop_flat": True}, {"entropy": 0.01}, {"tis": 2.0}, {"max_kl": 1.0},
    {"format_reward": 0.05}, {"clip_high": 0.28, "norm": "token", "drop_flat": True, "beta": 0}])
def test_every_option_finds_the_better_arm(options):
    """The bandit through train_step and AdamW. Bug: an option that breaks learning, or a policy that learns
    from shuffled rewards."""
    def final(shuffled):
        generator, model, reference = torch.Generator().manual_seed(1), Arms(), Arms().requires_grad_(False)
        policy = SimpleNamespace(model=model, device=torch.device("cpu"),
                                 tokenizer=SimpleNamespace(pad_token_id=0))
        args = arguments(**{"beta": 1e-3, "max_new_tokens": 1, **options})
        optimizer = sft.Optimizer(model, lr=0.1, weight_decay=0)
        for _ in range(50):
            logp = model.lm_head.weight.detach()[:, 0].log_softmax(0)
            arms = torch.multinomial(logp.exp(), 64, replacement=True, generator=generator).view(8, 8)
            rewards = (torch.rand(8, 8, generator=generator) < torch.tensor([0.2, 0.8])[arms]).float()
            rewards += args.format_reward * (arms == 0)  # the worse arm is the one with the right format
            if shuffled:
                rewards = rewards.flatten()[torch.randperm(64, generator=generator)].view(8, 8)
            drawn = arms.flatten().tolist()
            rollouts = grpo.Rollouts([([0], [a]) for a in drawn], [[logp[a].item()] for a in drawn], rewards)
            grpo.train_step(policy, reference if args.beta else None, optimizer, rollouts, args)
        return model.lm_head.weight[:, 0].softmax(0)[1].item()
    assert final(shuffled=False) > 0.9
    assert final(shuffled=True) < 0.9


def test_format_reward_pays_for_what_can_be_read(tiny, monkeypatch):
    """Bugs: paid for any text; accuracy and reward mixed up, so that a wrong answer in the right format
    counts as right."""
    texts = ["</think>\n<answer>\nThe final answer is \\boxed{7}.\n</answer>",
             "</think>\n<answer>\n\\boxed{8}\n</answer>", "\\boxed{7}"]
    group = [sample.Rollout([i], [0.0], "eos") for i in range(3)]
    monkeypatch.setattr(sample, "generate", lambda *_, **__: [group])
    monkeypatch.setattr(sample, "decode", lambda _, tokens: texts[tokens[0]])
    problem = SimpleNamespace(question="q", answer=7)
    rollouts = grpo.roll_out(tiny(), [problem], arguments(format_reward=0.05, seed=0), 1, 3)
    assert torch.allclose(rollouts.rewards, torch.tensor([[1.05, 0.05, 0.0]]))
    assert rollouts.right.tolist() == [[1, 0, 0]]


def test_filter_keeps_the_range(monkeypatch):
    """Bugs: numbers counted within a chunk; bounds left out; a file sampled only in part, fresh problems
    without end."""
    counts, asked = [0, 1, 8, 4, 7, 0, 8, 2, 1, 1], []

    def roll_out(policy, problems, args, step, n, limit):
        asked.extend(problems)
        right = torch.tensor([[1.0] * counts[p % 10] + [0.0] * (n - counts[p % 10]) for p in problems])
        return grpo.Rollouts(None, None, None, right)
    monkeypatch.setattr(grpo, "roll_out", roll_out)
    args = SimpleNamespace(filter=(1, 7), prompts=3, data="file")
    assert grpo.select(None, iter(range(10)), args, None, wanted=2) == [1, 3, 4, 7, 8, 9]
    assert asked == list(range(10))
    asked.clear()
    args.data = None
    assert grpo.select(None, iter(range(10**9)), args, None, wanted=3)[:3] == [1, 3, 4] and len(asked) == 6
    args.filter = (3, 3)
    with pytest.raises(data.InputError, match="--filter 3 3"):
        grpo.select(None, iter(range(10**9)), args, None, wanted=3)


# --------------------------------------------------------------------------------------------------- the run
# a random policy is never right, so all of its groups are flat
SMALL = ["--no-drop-flat", "--prompts", 2, "--n", 2, "--max-new-tokens", 12, "--ops", 1, 1, "--eval-every", 4,
         "--eval-n", 3, "--patience", 99]
TIMES = ("tokens_per_s", "s_sample", "s_score", "s_train")


def outcome(folder, name):
    weights = torch.load(folder / f"{name}.pt", weights_only=True)["weights"]
    rows = [{k: v for k, v in row.items() if k not in TIMES}
            for row in csv.DictReader(open(folder / f"{name}.csv"))]
    return weights, rows


# grpo.py with a save that takes its time: half of the file, a pause, the other half
SLOW_SAVES = """
import io, sys, time, torch
def slow_save(content, file, save=torch.save):
    buffer = io.BytesIO()
    save(content, buffer)
    half = len(buffer.getvalue()) // 2
    file.write(buffer.getvalue()[:half])
    file.flush()
    time.sleep(0.1)
    file.write(buffer.getvalue()[half:])
torch.save = slow_save
sys.path.insert(0, sys.argv[1])
import data, grpo
sys.argv = sys.argv[1:]
data.run_cli(grpo.main)
"""
# the entropy bonus moves it
LEARNING = ["--steps", 12, "--entropy", 0.05, "--lr", 1e-3, *SMALL]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_file):
    """12 steps in one go: weights and rows at the end, and the optimizer after step 11."""
    folder = tmp_path_factory.mktemp("whole")
    command = ["grpo.py", "--ckpt", tiny_file, *LEARNING, "--save-every", 11, "--out", "run.pt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(c) for c in command])
        patch.setattr(sft.Run, "finish", lambda run: None)  # the last saved state stays
        data.run_cli(grpo.main)
    return *outcome(folder, "run"), torch.load(folder / "run.state.pt", weights_only=True)["optimizer"]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("trial", range(24 if FULL else 3))
def test_resume_after_a_kill_is_bit_for_bit(trial, whole, script, tmp_path, tiny_file, monkeypatch):
    """Bugs: resume without the optimizer's state, with a replayed or skipped problem, with doubled CSV rows;
    half a file where a save was interrupted; draws that depend on torch's generator."""
    rng, base = Random(trial), ["--ckpt", tiny_file, *LEARNING, "--out", "run.pt"]
    command = [sys.executable, "-c", SLOW_SAVES, ROOT, *base, "--save-every", 1]
    run = subprocess.Popen([str(c) for c in command], cwd=tmp_path, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    saves, moment, during_save = set(), rng.randint(2, 10), trial % 3 == 0
    while len(saves) < moment and run.poll() is None:  # each save has a temporary name of its own
        saves |= {path.name for path in tmp_path.glob("run.state.pt*.tmp")}
        time.sleep(0.005)
    if not during_save:
        time.sleep(rng.uniform(0.1, 0.5))  # some moment between this save and the next few
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "run.pt").exists() and (not during_save or list(tmp_path.glob("*.tmp")))
    refused = script("grpo.py", *base)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    torch.manual_seed(trial)
    with monkeypatch.context() as patch:
        patch.setattr(sft.Run, "finish", lambda run: None)  # the last saved state stays
        assert script("grpo.py", *base, "--resume", "--save-every", 11).returncode == 0
    weights, rows, optimizer = whole
    weights2, rows2 = outcome(tmp_path, "run")
    assert rows == rows2 and len(rows) == 12 and float(rows[-1]["grad_norm"]) > 0
    state = torch.load(tmp_path / "run.state.pt", weights_only=True)
    assert equal(weights, weights2) and (state["step"] != 11 or equal(optimizer, state["optimizer"]))
    assert script("grpo.py", *base, "--resume").returncode == 0 and not list(tmp_path.glob("*.state.pt*"))
    assert "nothing to resume" in script("grpo.py", *base, "--resume").stdout
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("chapter, start", [("grpo", ["--ckpt"]),
                                            ("sft", ["--n", 40, "--batch", 4, "--ops", 1, 1, "--model"])])
def test_ctrl_c_saves_and_resume_goes_on(chapter, start, script, tmp_path, tiny_file, monkeypatch):
    """Bugs: Ctrl-C that throws away up to --save-every steps, or saves in the middle of one; an SFT run that
    cannot be resumed."""
    more = ["--steps", 10, "--entropy", 0.05, *SMALL] if chapter == "grpo" else []
    base = [f"{chapter}.py", *start, tiny_file, *more]
    assert script(*base, "--out", "whole.pt").returncode == 0
    row = sft.Log.row

    def interrupted(log, **values):
        row(log, **values)
        if values["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(sft.Log, "row", interrupted)
        stopped = script(*base, "--out", "run.pt")
    assert stopped.returncode == 130 and "after step 5, saved in run.state.pt" in stopped.stderr
    assert "--resume" in stopped.stderr
    before = (tmp_path / "run.state.pt").read_bytes()
    refused = script(*base, "--out", "run.pt")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    other = tmp_path / "other.pt"
    sample.save_policy(other, sft.tiny_policy(width=32, layers=2, heads=2, seed=9))
    for changed, words in ((["--lr", "0.5"], "--lr"), (["--seed", "7"], "--seed"),
                           (["--ops", "1", "2"], "--ops"), (["--weight-decay", "0.5"], "--weight-decay"),
                           ([start[-1], str(other)], "checksum")):
        refused = script(*base, "--out", "run.pt", "--resume", *changed)
        assert refused.returncode == 2, refused.stderr
        assert "begun with" in refused.stderr and words in refused.stderr, refused.stderr
    assert (tmp_path / "run.state.pt").read_bytes() == before
    assert script(*base, "--out", "run.pt", "--resume", "--save-every", 3).returncode == 0
    assert equal(outcome(tmp_path, "whole"), outcome(tmp_path, "run"))
    assert not (tmp_path / "run.state.pt").exists()


def test_a_second_ctrl_c_stops_at_once():
    """Bug: a long step that nobody can leave."""
    with sft.CtrlC() as ctrl_c:
        os.kill(os.getpid(), signal.SIGINT)
        assert ctrl_c.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_what_is_held_out_of_a_file_cannot_change(tiny, tmp_path):
    """Bug: --resume with another --eval-n, which holds other problems of --data out of the training."""
    (tmp_path / "p.jsonl").write_text("{}")
    def identity(**flags):
        return sft.identity(SimpleNamespace(**{"eval_n": 100, "eval_every": 25, "save_every": 9} | flags), model)
    model = tiny().model
    for path, same in ((str(tmp_path / "p.jsonl"), False), (None, True)):
        whole = identity(data=path)
        assert whole == identity(data=path, save_every=1)
        assert (whole == identity(data=path, eval_n=2)) == (whole == identity(data=path, eval_every=0)) == same


def test_steps_may_be_raised_where_they_shape_nothing(script, tmp_path, tiny_file, monkeypatch):
    """Bugs: a run that cannot be made longer; one that is, although its learning rate had begun to decay."""
    base = ["grpo.py", "--ckpt", tiny_file, "--entropy", 0.05, *SMALL, "--save-every", 1]
    assert script(*base, "--steps", 4, "--lr-decay", 0, "--out", "whole.pt").returncode == 0
    for decay in (0, 0.5):
        monkeypatch.setattr(sft.Run, "finish", lambda run: None)
        assert script(*base, "--steps", 2, "--lr-decay", decay, "--out", f"{decay}.pt").returncode == 0
        longer = script(*base, "--steps", 4, "--lr-decay", decay, "--out", f"{decay}.pt", "--resume")
        assert longer.returncode == (2 if decay else 0)
        assert ("--steps 2, not 4" in longer.stderr) == bool(decay)
    assert equal(outcome(tmp_path, "whole")[0], outcome(tmp_path, "0")[0])


def test_a_run_without_signal_stops_and_says_why(script, tiny_file):
    """Bug: hours of steps in which every rollout is wrong and nothing can be learned."""
    result = script("grpo.py", "--ckpt", tiny_file, "--steps", 50, *SMALL[:-1], 3)
    assert result.returncode == 2 and "no mixed group in 3 steps" in result.stderr
    assert "--ops" in result.stderr
    assert "were cut at --max-new-tokens 12" in result.stderr + result.stdout


@pytest.mark.parametrize("row, words", [
    ({"loss": float("nan")}, "not a finite number"),
    ({"grad_norm": float("inf")}, "not a finite number"),
    ({"drift_mean": 0.5}, "disagree"),
    ({"grad_norm": 0.0}, "gradient is 0")])
def test_guard_rails(row, words):
    """Bugs: training on after a NaN, after sampler and trainer have parted, or with a gradient that never
    arrives."""
    healthy = dict(step=3, loss=0.0, grad_norm=0.1, drift_mean=1e-6, cut_rate=0.0, mixed=0.5, dropped=0, rows=1)
    assert grpo.watch(healthy, arguments(), False) is True
    with pytest.raises(data.InputError, match=words):
        grpo.watch(healthy | row, arguments(), False)


def test_the_bounds_of_the_warnings(capsys):
    """Bugs: a drift of 0.0201 that passes or 0.0199 that stops; a late drift that throws a run away; one
    dropped rollout or one cut in ten that warns; dropped rollouts measured against those that left before."""
    healthy = dict(step=3, loss=0.0, grad_norm=0.1, drift_mean=0.0199, cut_rate=0.29, mixed=0.5, dropped=4, rows=10)
    assert grpo.watch(healthy, arguments(), True) is True
    assert "warning" not in "".join(capsys.readouterr())
    assert grpo.watch(healthy | {"mixed": 0, "grad_norm": 0.0}, arguments(), False) is False
    for row, words in (({"drift_mean": 0.0201}, "disagree"), ({"cut_rate": 0.3}, "30% of the rollouts"),
                       ({"dropped": 5}, "dropped 5 of 10"), ({"rows": 6}, "dropped 4 of 6")):
        assert grpo.watch(healthy | row, arguments(), True) is True
        printed = capsys.readouterr()
        assert "warning" in printed.out + printed.err and words in printed.out + printed.err
    with pytest.raises(data.InputError, match="disagree"):
        grpo.watch(healthy | {"drift_mean": 0.0201}, arguments(), False)


def test_a_stop_for_numbers_leaves_the_last_good_state(script, tmp_path, tiny_file, monkeypatch):
    """Bug: a NaN that is saved over the state that could have been resumed from."""
    calls, logprobs = [], grpo.Batch.logprobs

    def broken(batch, *arguments):
        calls.append(1)
        values, entropy = logprobs(batch, *arguments)
        # the reference and the policy, step 3
        return (values * float("nan") if len(calls) == 6 else values), entropy
    monkeypatch.setattr(grpo.Batch, "logprobs", broken)
    base = ["grpo.py", "--ckpt", tiny_file, "--steps", 9, *SMALL, "--entropy", 0.01]
    result = script(*base, "--save-every", 1)
    assert result.returncode == 2 and "step 3" in result.stderr and "not a finite number" in result.stderr
    assert "--lr" in result.stderr
    state = torch.load(tmp_path / "grpo.state.pt", weights_only=True)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["optimizer"]["master"])
    assert not (tmp_path / "grpo.pt").exists()
    assert script(*base, "--resume").returncode == 0


def test_a_run_that_is_always_right_stops_as_well(tiny):
    """Bug: the same advice for problems that are too hard and too easy; no rollout to look at."""
    tokens = tiny().tokenizer("The number of").input_ids
    row = dict(all_wrong=0.0, all_right=1.0)
    words = grpo.stuck(row, SimpleNamespace(patience=3), tiny(), [([1], tokens)])
    assert "too easy" in words and "--ops" in words and "'The number of'" in words


def test_drift_stays_small_through_whole_runs(script, tmp_path, tiny_file):
    """Bugs: a sampler with stale weights, another temperature or another order of rounding: it would show
    within some steps."""
    command = ["grpo.py", "--ckpt", tiny_file, "--steps", 8, *SMALL, "--entropy", 0.05, "--lr", 3e-3]
    assert script(*command).returncode == 0
    ours = csv.DictReader(open(tmp_path / "grpo.csv"))
    default = csv.DictReader(open(ROOT / "results" / "tiny" / "grpo.csv"))  # the README's run: 120 steps
    assert max(float(row["drift_mean"]) for row in [*ours, *default]) <= 1e-4
    policy = sample.load_policy(sample.TINY_BASE, device="cpu", dtype=torch.bfloat16)
    problems = [p for p, _ in zip(data.generate(ops=(2, 2), max_value=100), range(3))]
    optimizer = sft.Optimizer(policy.model, lr=1e-3)
    for step in range(1, 4):
        rollouts = grpo.roll_out(policy, problems, arguments(seed=0, max_new_tokens=60), step, 4)
        row = grpo.train_step(policy, None, optimizer, rollouts, arguments(beta=0, entropy=0.01))
        assert 1e-5 < row["drift_mean"] <= 0.02


def hugging_face_model(family, vocabulary):
    """A random model of the family's own shape - biases, norms, head sizes, rotary scaling - a thousand times
    smaller."""
    shape = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
                 bos_token_id=None, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    if family == "qwen2.5":
        return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=False))
    rope = dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=256)
    return LlamaForCausalLM(LlamaConfig(**shape, head_dim=8, rope_parameters=rope, tie_word_embeddings=True))


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "llama-3.2"])
def test_hugging_face_folders_in_and_out(script, tmp_path, family):
    """Bugs: shards that are not read; a tied head written twice; an export of the weights before training."""
    tokenizer = sft.tiny_tokenizer()
    hugging_face_model(family, len(tokenizer)).save_pretrained(tmp_path / "base", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    small = ["--n", 8, "--batch", 4, "--epochs", 1, "--ops", 1, 1, "--lr", 1e-2]
    for command in (["sft.py", "--model", "base", *small, "--export", "sft"],
                    ["grpo.py", "--ckpt", "sft", "--steps", 2, *SMALL, "--entropy", 0.05, "--lr", 1e-2,
                     "--gradient-checkpointing", "--export", "rl"]):
        result = script(*command)
        assert result.returncode == 0, result.stderr
    ids = torch.arange(2, 60)[None]
    logits = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits
              for name in ("base", "sft", "rl")}
    for name, file in (("sft", "sft.pt"), ("rl", "grpo.pt")):
        assert torch.equal(logits[name], sample.load_policy(tmp_path / file, device="cpu").model(ids).logits)
    assert (logits["base"] - logits["sft"]).abs().max() > 1e-3 < (logits["sft"] - logits["rl"]).abs().max()


MEASURE = """
import gc, re, sys
sys.path.insert(0, sys.argv[1])
import torch, grpo, sample, sft
from types import SimpleNamespace
args = SimpleNamespace(no_std=False, micro_tokens=1024, norm="sequence", max_new_tokens=240, epochs=1,
                       temperature=1.0, clip=0.2, clip_high=None, beta=0.1, kl="k3", max_grad_norm=1.0,
                       drop_flat=False, max_kl=None, entropy=0.0, tis=None)
prompt = list(range(5, 21))
rollouts = grpo.Rollouts([(prompt, [7] * 240)] * 4, [[-1.0] * 240] * 4, torch.tensor([[1.0, 0, 0, 0]]))

def steps(width, layers, checkpointing):
    args.gradient_checkpointing = checkpointing
    policy = sft.tiny_policy(width, layers, heads=8, seed=0)
    reference = sft.tiny_policy(width, layers, heads=8, seed=0).model.requires_grad_(False)
    optimizer = sft.Optimizer(policy.model, 1e-3)
    policy.model.eval()
    if checkpointing:
        sft.checkpoint_layers(policy.model)
    predicted = grpo.memory(policy, args, len(prompt), rows=4)
    sample.generate(policy, [prompt], 4, max_new_tokens=240, max_batch=4)
    for _ in range(2):
        grpo.train_step(policy, reference, optimizer, rollouts, args)
    return sum(predicted.values())

def resident(name):  # not getrusage: its peak is at least that of the process that started this one
    return int(re.search(name + ":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

steps(16, 1, True)  # libraries load and threads start
gc.collect()
before = resident("VmRSS")
for checkpointing in (True, False):  # the smaller peak first
    predicted = steps(512, 4, checkpointing)
    print(predicted, resident("VmHWM") - before)
    gc.collect()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_predicted_memory_is_what_a_step_takes():
    """Bugs: a part that is forgotten (the reference, AdamW, activations) or counted twice. What is measured
    is what is alive: the two variables tell glibc's allocator to give freed blocks back, of which it would
    else keep up to half as much again."""
    result = subprocess.run([sys.executable, "-c", MEASURE, ROOT], capture_output=True, text=True, check=True,
                            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000",
                                              "MALLOC_TRIM_THRESHOLD_": "1000000"})
    for line in result.stdout.splitlines():
        predicted, measured = map(int, line.split())
        assert 1 / 1.2 < predicted / measured < 1.2, result.stdout


PAPERS = {
    "Qwen2.5-1.5B": (Qwen2Config, Qwen2ForCausalLM,
                     dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                          num_attention_heads=12, num_key_value_heads=2)),
    "Qwen2.5-3B": (Qwen2Config, Qwen2ForCausalLM,
                   dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                        num_attention_heads=16, num_key_value_heads=2)),
    "Llama-3.2-1B": (LlamaConfig, LlamaForCausalLM,
                     dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                          num_attention_heads=32, num_key_value_heads=8, head_dim=64))}


@pytest.mark.parametrize("name", PAPERS)
def test_the_readmes_memory_table(name):
    """Bug: numbers in the README that the code no longer predicts: SFT and GRPO without and with
    --gradient-checkpointing, a rollout."""
    config, kind, shape = PAPERS[name]
    with torch.device("meta"):
        model = kind(config(**shape, tie_word_embeddings=True)).to(torch.bfloat16)
    billions = {"Qwen2.5-1.5B": "1.5", "Qwen2.5-3B": "3.1", "Llama-3.2-1B": "1.2"}[name]
    assert f"{sum(p.numel() for p in model.parameters()) / 1e9:.1f}" == billions
    cells = [sum(sft.predict_memory(model, 4096, reference=grpo, checkpointing=checkpointing).values()) / 1e9
             for grpo in (False, True) for checkpointing in (False, True)]
    rollout = sft.predict_memory(model, 4096, sampler=(1, 512 + 2560))["sampler"] / 1e6
    row = next(line for line in (ROOT / "README.md").read_text().split("\n")
               if line.startswith(f"| {name} |"))
    predicted = [*(f"{cell:.0f} GB" for cell in cells), f"{rollout:.0f} MB"]
    assert [cell.strip() for cell in row.split("|")[2:7]] == predicted


def test_the_start_line_names_the_flag_to_lower():
    """Bugs: no warning where it does not fit; advice that cannot help."""
    parts = {"weights": 3e9, "activations": 20e9, "sampler": 5e9, "reference": 0}
    assert "warning" not in sft.describe_memory(parts, 30e9)
    assert "warning" not in sft.describe_memory(parts, None)
    assert "--micro-tokens" in sft.describe_memory(parts, 20e9)
    assert "only 20.00 GB" in sft.describe_memory(parts, 20e9)
    assert "--max-new-tokens" in sft.describe_memory(parts | {"activations": 1e9}, 8e9)
    assert "smaller model" in sft.describe_memory(parts, 2e9)


@pytest.mark.parametrize("chapter", ["grpo", "sft"])
def test_every_flag_reaches_the_code(chapter, monkeypatch):
    """Bug: a flag that --help promises and that nothing reads."""
    class Seen(Exception):
        pass

    def parse(parser):
        raise Seen(parser)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Seen) as seen:
        __import__(chapter).main()
    text = (ROOT / f"{chapter}.py").read_text()
    # data.problem_options reads the task, and the options that the task lists
    drawn = {"task"} | {name for task in data.TASKS.values() for name in task.options}
    for action in seen.value.args[0]._actions:
        if action.dest != "help":
            assert re.search(rf"\bargs\.{action.dest}\b", text) or action.dest in drawn, action.dest


@pytest.mark.parametrize("flags, words", [
    (["--data", "p.jsonl", "--ops", "3", "4"], ["--ops", "--data"]),
    (["--data", "p.jsonl", "--task", "promptbench"], ["--task", "--data"]),
    (["--ops", "3", "4", "--task", "promptbench"], ["--ops", "promptbench"]),
    (["--depth", "5"], ["--depth", "igsm"]),
    (["--filter", "5", "3"], ["--filter 5 3"]),
    (["--filter", "1", "9"], ["--filter 1 9", "8"]),
    (["--beta", "0", "--kl", "k1"], ["--kl", "--beta 0"]),
    (["--beta", "0", "--max-kl", "0.15"], ["--max-kl", "--beta 0"]),
    (["--beta", "-1"], ["--beta"]),
    (["--clip", "0"], ["--clip"]),
    (["--clip", "1.5"], ["--clip: 1.5"]),
    (["--clip-high", "-0.1"], ["--clip-high"]),
    (["--tis", "0.5"], ["--tis: 0.5"]),
    (["--lr", "nan"], ["--lr: nan"]),
    (["--lr-decay", "2"], ["--lr-decay: 2"]),
    (["--entropy", "-1"], ["--entropy"]),
    (["--format-reward", "inf"], ["--format-reward"]),
    (["--eval-n", "0"], ["--eval-n 0", "--eval-every"]),
    (["--export", "p.jsonl"], ["--export p.jsonl"]),
    (["--seed", "-1"], ["--seed"]),
    (["--temperature", "1e-39"], ["--temperature: 1e-39"]),
    (["--max-grad-norm", "0"], ["--max-grad-norm"]),
    (["--filter", "1", "7", "--data", "p.jsonl"], ["--filter 1 7", "none of 12"])])
def test_contradictions_are_refused(script, tmp_path, tiny_file, flags, words):
    """Bug: a flag that another one silently switches off, or a value that fails hours later."""
    lines = [json.dumps({"question": f"What is 1 + {i}?", "answer": 1 + i}) for i in range(12)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    few = ["--n", 2, "--max-new-tokens", 4, "--eval-every", 0] if "--data" in flags else []
    result = script("grpo.py", "--ckpt", tiny_file, *few, *flags)
    check_refusal(result, words)


def check_refusal(result, words):
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert all(word in last for word in words), result.stderr


def test_a_run_never_starts_from_the_file_it_writes(script, tmp_path, tiny_file):
    """Bug: --out names the checkpoint: it would be renamed, and a resumed run would no longer find its
    reference."""
    for name, flag in (("grpo.py", "--ckpt"), ("sft.py", "--model")):
        check_refusal(script(name, flag, tiny_file, "--out", tiny_file), ["--out", "starts from"])
    assert tiny_file.exists()


def test_filter_then_train_then_resume(script, tmp_path, tiny_file, monkeypatch):
    """Bugs: problems outside the range in the batches; a resumed run that samples its filter again, from a
    policy that has moved on."""
    lines = [json.dumps({"question": f"What is 1 + {i}?", "answer": 1 + i}) for i in range(12)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    seen, roll_out = [], grpo.roll_out

    def spy(policy, problems, args, step, n, limit=None):
        rollouts = roll_out(policy, problems, args, step, n, limit)
        if n == grpo.FILTER_N:  # every second problem is neither too easy nor too hard
            rollouts.right = torch.tensor([[float(p.answer % 2 == 0 and i < 4) for i in range(n)]
                                           for p in problems])
        seen.append((n, [p.answer for p in problems]))
        return rollouts
    monkeypatch.setattr(grpo, "roll_out", spy)
    base = ["grpo.py", "--ckpt", tiny_file, "--data", "p.jsonl", "--filter", 1, 7, "--steps", 4,
            "--prompts", 2, "--n", 2, "--max-new-tokens", 6, "--eval-every", 0, "--entropy", 0.05]
    result = script(*base)
    assert result.returncode == 0 and "kept 6 of 12 problems after 96 rollouts" in result.stdout
    assert [answers for n, answers in seen if n == 2] == [[2, 4], [6, 8], [10, 12], [2, 4]]
    seen.clear()
    row = sft.Log.row
    with monkeypatch.context() as patch:
        patch.setattr(sft.Log, "row",
                      lambda log, **values: (row(log, **values), os.kill(os.getpid(), signal.SIGINT)))
        assert script(*base, "--out", "run.pt").returncode == 130
    assert script(*base, "--out", "run.pt", "--resume").returncode == 0
    assert [n for n, _ in seen] == [8] * 6 + [2] * 4
    assert equal(outcome(tmp_path, "grpo"), outcome(tmp_path, "run"))


@pytest.mark.parametrize("flags, words", [
    (["--ckpt", "nowhere.pt"], ["nowhere.pt"]),
    (["--ops", "9", "3"], ["--ops 9 3"]),
    (["--n", "1"], ["--n: 1"]),
    (["--steps", "0"], ["--steps"]),
    (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--max-new-tokens", "3000"], ["--max-new-tokens", "2048"]),
    (["--out", "grpo"], ["--out"]),
    (["--prompt", "3"], ["--prompt"])])
def test_bad_input_is_one_sentence(script, tmp_path, tiny_file, flags, words):
    """Bug: a traceback, or a run that fails at its last step for what was known at its first."""
    result = script("grpo.py", *(() if "--ckpt" in flags else ("--ckpt", tiny_file)), *flags)
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert all(word in last for word in words), result.stderr
    assert not (tmp_path / "grpo.pt").exists()


def test_equal_rewards_that_no_float_holds():
    """Bug: 32 rewards of 1.05, of which the mean is a rounding error away: -0.12 in place of an advantage of 0."""
    for rewards in (torch.full((3, 32), 1.05), torch.full((1, 7), 0.05), torch.full((2, 1024), 1.05)):
        assert (grpo.group_advantages(rewards) == 0).all() and (grpo.group_advantages(rewards, std=False) == 0).all()
