"""Chapter 6. Evaluation: how often is the policy right, and how sure can we be?

    python eval.py --ckpt sft.pt grpo.pt                    # accuracy, in distribution and on harder problems
    python eval.py --ckpt sft.pt grpo.pt --samples 8 --plot rollouts.png --json scores.json
    python eval.py --ckpt sft.pt grpo.pt --data test.jsonl
    python eval.py --curves grpo.csv --plot reward.png      # the training log as a figure
    python eval.py --ckpt sft.pt grpo.pt --results results.csv && python eval.py --report results.csv
    python eval.py --ckpt sft.pt grpo.pt --html report.html # all of it on one page, with answers to look at
    python eval.py --ckpt sft.pt half.pt grpo.pt --influence

Accuracy is exact match of the boxed integer, greedy, on held-out problems (a hash of the text keeps them
apart from everything trained on). Beside it stand its 95% interval and the score of a policy that always
gives the most frequent answer: iGSM's answers are so skewed that this alone can look like a trained model.
A right answer can be luck, or two faults that cancel. *Process-verified* accuracy counts only the answers
that are right and sound in every step.

With --samples k, k rollouts of each problem at temperature 1 show what GRPO will find: the shares of problems
where all rollouts fail, some succeed, or all succeed. Only the middle ones carry a gradient.

Two kinds of chance are kept apart. Between two checkpoints on the same problems, McNemar's exact test asks
whether the *problems* could explain the difference. Between two methods only fresh *seeds* count: every seed
trains both, and the report gives the mean of the paired differences with its t-interval.

Why does RL lift one policy and not another? --influence computes, before a step is taken, what it would
change (section 3), for several checkpoints of a run side by side.

Half an hour to read. Sections 1, 2, 3 and 5 are the idea; figures (4), page (6) and command (7) can wait.
"""
import base64, csv, html, importlib.util, io, itertools, json, math, os, re, statistics, string
import subprocess, sys
from collections import Counter, defaultdict

import torch

import data, inject, sample, sft, grpo


# --------------------------------------------------------------------------- 1. How sure? Intervals and tests
def wilson(correct, n, z=1.96):
    """Wilson's 95% interval, (low, high), of the accuracy on all problems of a kind, of which n were drawn.

    Its chance is which problems were drawn; what another seed of the training would change is not in it.
    Unlike p +- z sqrt(p(1-p)/n) it stays in [0, 1] and has width at 0 and n.

    >>> [round(x, 3) for x in wilson(0, 100)]
    [0.0, 0.037]
    """
    p = correct / n
    s = z * z / n
    middle = (p + s / 2) / (1 + s)
    half = z * math.sqrt(p * (1 - p) / n + s / n / 4) / (1 + s)
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # p: rounding, at 0 and n


def pass_at_k(right, samples, k):
    """The chance that at least one of k rollouts is right, without bias (Chen et al., 2021, eq. 1).

    right: the number of right ones among the `samples` >= k rollouts of each problem. Where c are right,
    C(samples - c, k) of the C(samples, k) ways to choose k hold none. 1 - (1 - c/samples)^k would be too low:
    it puts each rollout back before it draws the next, so it may draw the same wrong one twice.

    >>> pass_at_k([1, 0], samples=2, k=1), pass_at_k([1, 0], samples=2, k=2)
    (0.25, 0.5)
    """
    return sum(1 - math.comb(samples - c, k) / math.comb(samples, k) for c in right) / len(right)


def mcnemar(before, after):
    """Exact two-sided p-value of "both policies are equally good".

    before, after: their hits (0 or 1) on the same problems, in the same order. Only problems on which they
    differ count: were both equally good, each would be gained or lost by the toss of a coin.

    >>> mcnemar([0, 0, 0, 0, 1], [1, 1, 1, 1, 1])           # 4 gained, none lost: 2 / 2^4
    0.125
    """
    gained = sum(b < a for b, a in zip(before, after))
    lost = sum(b > a for b, a in zip(before, after))
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2 ** n)


# 97.5% points of Student's t for 1, 2, ... degrees of freedom; beyond 20 the last one, a little too wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
         2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def t_interval(values):
    """Mean and 95% interval, (mean, low, high), of what all seeds would give on average; one value a seed.

    Its chance is the seed of a training: data, order, rollouts. One value has no interval (NaN).

    >>> [round(x, 2) for x in t_interval([1., 2., 3.])]
    [2.0, -0.48, 4.48]
    """
    mean, n = statistics.mean(values), len(values)
    half = T_975[min(n - 1, 20) - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


# ----------------------------------------------------------------------- 2. One policy on one set of problems
def majority(problems):
    """The score of always giving the most frequent answer."""
    return Counter(p.answer for p in problems).most_common(1)[0][1] / len(problems)


def check(problems, texts):
    """data.check_trace on each text (the prompt ends with <think>), or None where a problem has no graph."""
    if not all(p.nodes for p in problems):
        return None
    return [data.check_trace(p, f"<think>{t}") for p, t in zip(problems, texts)]


def process_verified(hits, reports):
    """How many answers are right *and* sound in every step, or None where no steps were checked."""
    if reports is None:
        return None
    return sum(hit == 1 and report.ok for hit, report in zip(hits, reports))


def behaviors(reports):
    """Mean number per response of what check_trace counts up to the first fault; share without a fault."""
    names = ("steps", "reflections", "analyses", "subgoals", "redundant")
    counts = {name: sum(getattr(r, name) for r in reports) / len(reports) for name in names}
    return counts | {"reliable": reliability(reports), "sound": sum(r.ok for r in reports) / len(reports),
                     "first_fault": dict(Counter(r.error.kind for r in reports if r.error).most_common())}


def reliability(reports):
    """How often a behavior does its work: {what: [times it did, of how many]}, up to the first fault of each.

    locked: reflections with exactly the right names, of all lines on a locked quantity; ready: equations, of
    all lines on a ready one (the rest are false reflections); analysed, not_analysed: right equations, of
    those with and without an analysis; arithmetic: right equations, of those without another fault; premises:
    right restatements, of all analyses."""
    def total(name):
        return sum(getattr(r, name) for r in reports)

    wrong = [r for r in reports if r.error]
    # check_line counts a locked start before it can fail: wrong names leave locked = reflections + 1, a
    # reflection on a ready quantity leaves the two equal
    false = sum(r.error.behavior == "reflection" and r.locked == r.reflections for r in wrong)
    other_premise = sum(r.error.behavior == "analysis" for r in wrong)
    miscounted = sum(r.error.kind == "arithmetic" for r in wrong)
    steps, analysed, equations, restated = map(total, ("steps", "analysed", "equations", "restated"))
    analyses = total("analyses")  # those on a reflection's line too, where the released code puts some
    return {"locked": [total("reflections"), total("locked")], "ready": [equations, equations + false],
            "analysed": [analysed, restated], "not_analysed": [steps - analysed, equations - restated],
            "arithmetic": [steps, steps + miscounted], "premises": [analyses, analyses + other_premise]}


RELIABLE = ("locked quantities reflected on rightly", "ready ones without a false reflection",
            "equations right after an analysis", "equations right without one", "arithmetic right",
            "analyses that restate the right premise")  # the same in words


def score_rollouts(hits, samples):
    """hits: whether each rollout is right, those of a problem together. correct: of all rollouts; mean: share
    right; histogram[c]: the share of problems with c right rollouts, c = 0 ... samples; pass_at[k]."""
    right = [sum(hits[i:i + samples]) for i in range(0, len(hits), samples)]  # for each problem
    tries = [k for k in sorted({1, 2, 4, 8, samples}) if k <= samples]
    return {"samples": samples, "correct": sum(hits), "mean": sum(hits) / len(hits),
            "histogram": [right.count(c) / len(right) for c in range(samples + 1)],
            "pass_at": {k: pass_at_k(right, samples, k) for k in tries}}


def measure_rollouts(policy, problems, max_new_tokens, samples, seed):
    """`samples` rollouts a problem at temperature 1 -> (scores, groups, rewards), the last two as `influence`
    takes them. process: right and sound, of all; shown: the rollouts of the first problems as text."""
    prompts = [sample.encode_prompt(policy.tokenizer, p.question) for p in problems]
    groups = sample.generate(policy, prompts, samples, max_new_tokens, 1.0, seed)
    texts = [sample.decode(policy.tokenizer, rollout.tokens) for group in groups for rollout in group]
    asked = [p for p in problems for _ in range(samples)]  # the problem of each text
    hits = [data.reward(t, p.answer) == 1 for p, t in zip(asked, texts)]
    reports = check(asked, texts)
    scores = score_rollouts(hits, samples) | {
        "process": process_verified(hits, reports),
        "shown": [texts[i:i + samples] for i in range(0, len(texts), samples)][:SHOWN]}
    if reports:
        scores["behaviors"] = behaviors(reports)
    pairs = [[(prompt, r.tokens) for r in group] for prompt, group in zip(prompts, groups)]
    return scores, pairs, torch.tensor(hits).view(len(problems), samples).float()


def measure(policy, problems, max_new_tokens=512, samples=0, seed=0, extra=(), micro_tokens=4096):
    """All figures of one policy on one set of problems, as --json writes them.

    n, correct, process: counts (greedy; process is None where problems have no graph); hits: 0 or 1 for each
    problem; accuracy, ci95, majority, format_rate, cut_rate: shares; mean_tokens: tokens a response.
    extra: what else to measure on the rollouts, of "influence" and "entropy"."""
    greedy = sample.greedy_accuracy(policy, problems, max_new_tokens)
    reports = check(problems, greedy["texts"])
    copied = ("n", "correct", "accuracy", "format_rate", "cut_rate", "mean_tokens")
    scores = {name: greedy[name] for name in copied} | {
        "process": process_verified(greedy["hits"], reports), "ci95": wilson(greedy["correct"], greedy["n"]),
        "majority": majority(problems), "hits": [int(hit) for hit in greedy["hits"]]}
    if reports:
        scores["behaviors"] = behaviors(reports)
    if samples:
        scores["rollouts"], groups, rewards = measure_rollouts(policy, problems, max_new_tokens, samples,
                                                               seed)
        policy.engine = None  # the sampler's cache: its memory is needed now
    if "influence" in extra:
        scores["influence"] = measure_influence(policy, groups, rewards, micro_tokens)
    if "entropy" in extra:
        scores |= measure_entropy(policy, problems, itertools.chain(*groups), seed, micro_tokens)
    return scores


def compare(results):
    """McNemar's p for every two checkpoints, split by split."""
    return [{"before": a["path"], "after": b["path"], "split": split,
             "p": mcnemar(a["splits"][split]["hits"], b["splits"][split]["hits"])}
            for a, b in itertools.combinations(results, 2) for split in a["splits"]]


# -------------------------------------------- 3. What a step of GRPO would change: influence; and the entropy
# A step on the rollouts of one query q changes the expected reward of all queries by (Proposition 3.1, per
# unit of learning rate; o+ and o- are right and wrong rollouts of q, alpha is the share of right ones)
#
#     dJ(q) = mean over (q', o') of sqrt(alpha (1 - alpha)) A(q', o') (mean of K(o', o+) - mean of K(o', o-))
#     K(o', o) = <grad log pi(o'|q'), grad log pi(o|q)>                                      (co-influence)
#
# Q N rollouts make (Q N)^2 pairs, but an inner product is linear: the mean over (q', o') moves inside,
#
#     dJ(q) = <own(q), G>        G = mean over (q', o') of A(q', o') grad log pi(o'|q')
#     own(q) = sqrt(alpha (1 - alpha)) (mean of grad log pi(o+|q) - mean of grad log pi(o-|q))
#
# G is one backward pass over everything, own(q) one over the rollouts of q: no pair is formed, nothing is
# projected. (The paper projects 16,000 gradients to 8,192 random dimensions, App. B.7, to estimate this.) G
# is the direction in which GRPO moves and own(q), but for a constant, what q adds to it. So the mean of dJ is
# about |G|^2, and a query is among those that it influences: with few queries most of dJ can be that.
def make_batches(policy, examples, weights, micro_tokens):
    """(prompt tokens, response tokens) pairs and a number for each, as grpo.py's micro-batches."""
    for rows in grpo.pack(examples, micro_tokens):
        some = [examples[row] for row in rows]
        unused = [[0.0] * len(response) for _, response in some]  # log-probs of the sampler
        yield grpo.make_batch(some, unused, weights[rows], policy.device)


def gradient(policy, examples, weights, temperature, micro_tokens):
    """sum_i weights[i] grad log pi(o_i|q_i) as one vector (P,), summed in fp32 at least."""
    params = [p for p in policy.model.parameters() if p.requires_grad]
    sizes, dtype = [p.numel() for p in params], torch.promote_types(params[0].dtype, torch.float32)
    total = torch.zeros(sum(sizes), dtype=dtype, device=policy.device)
    for batch in make_batches(policy, examples, weights, micro_tokens):
        logprob, _ = batch.logprobs(policy.model, temperature)  # (B, T), 0 behind a response's end
        parts = torch.autograd.grad(batch.advantages @ logprob.sum(dim=1), params)
        for slot, part in zip(total.split(sizes), parts):
            slot += part.flatten()
    return total


def influence_with_own(policy, groups, rewards, temperature, micro_tokens):
    """alpha, dJ, and the part of dJ that is a query's influence on itself, (Q,) each."""
    Q, N = rewards.shape
    alpha, delta, itself = rewards.mean(dim=1), torch.zeros(Q), torch.zeros(Q)
    signal, advantages = (alpha * (1 - alpha)).sqrt(), grpo.group_advantages(rewards)
    mixed = signal.nonzero().flatten().tolist()  # in all others the advantages and the signal are 0
    rollouts = [pair for q in mixed for pair in groups[q]]
    G = gradient(policy, rollouts, advantages[mixed].flatten() / (Q * N), temperature, micro_tokens)
    for q in mixed:
        right, wrong = rewards[q], 1 - rewards[q]
        weights = signal[q] * (right / right.sum() - wrong / wrong.sum())  # (N,)
        own = gradient(policy, groups[q], weights, temperature, micro_tokens)
        delta[q] = own @ G
        in_G = advantages[q, 0] / (Q * N) / weights[0]  # the advantages are these weights times a constant
        itself[q] = in_G * (own @ own)
    return alpha, delta, itself


def influence(policy, groups, rewards, temperature=1.0, leave_one_out=False, micro_tokens=4096):
    """Influence of a GRPO step on each of Q queries (Proposition 3.1) -> (alpha (Q,), delta (Q,)).

    groups[q]: N pairs (prompt ids, response ids), rollouts of query q at this temperature; rewards (Q, N):
    1.0 where right, else 0.0. alpha: share of right rollouts. delta: dJ above, in reward per unit of learning
    rate; exactly 0 where all rollouts are right or all wrong. leave_one_out: G is the mean over the other
    queries. log pi(o|q) is the sum over the response's tokens, A is grpo.group_advantages. micro_tokens:
    tokens in one forward pass. Beside the weights it holds three gradients: not more than sft.py's AdamW.
    Raises ValueError for other shapes. (For your own code and the tests: `measure_influence` below needs both
    parts of `influence_with_own`.)"""
    Q, N = rewards.shape
    if [len(group) for group in groups] != [N] * Q or Q < 1 + leave_one_out:
        raise ValueError("rewards must be (queries, rollouts), one for each pair of groups; "
                         "leave_one_out needs two queries")
    alpha, delta, itself = influence_with_own(policy, groups, rewards.float(), temperature, micro_tokens)
    return alpha, (delta - itself) * Q / (Q - 1) if leave_one_out else delta


def measure_influence(policy, groups, rewards, micro_tokens):
    """alpha, delta, itself: of each query, as above; mean, signal: means over all queries of dJ and
    sqrt(alpha (1 - alpha)); on_others: mean dJ with leave_one_out, since what a query is to itself is never
    negative; co_influence: mean of dJ / signal over mixed queries; by_right[c]: mean dJ of the queries with c
    right rollouts, None where there is none."""
    alpha, delta, itself = influence_with_own(policy, groups, rewards, 1.0, micro_tokens)
    signal, right = (alpha * (1 - alpha)).sqrt(), rewards.sum(dim=1)
    by_right = [delta[right == c].tolist() for c in range(rewards.shape[1] + 1)]
    mixed, others = signal > 0, len(groups) / max(1, len(groups) - 1)
    return {"mean": delta.mean().item(), "on_others": (delta - itself).mean().item() * others,
            "signal": signal.mean().item(),
            "co_influence": (delta / signal)[mixed].mean().item() if mixed.any() else None,
            "by_right": [statistics.mean(values) if values else None for values in by_right],
            "alpha": alpha.tolist(), "delta": delta.tolist(), "itself": itself.tolist()}


@torch.no_grad()
def token_values(policy, examples, micro_tokens):
    """Log-prob and entropy of every response token, (tokens,) each, in nats."""
    values = []
    for batch in make_batches(policy, examples, torch.zeros(len(examples)), micro_tokens):
        values.append([value[batch.mask] for value in batch.logprobs(policy.model, 1.0)])
    return [torch.cat(parts) for parts in zip(*values)]


def sft_answers(policy, problems, seed):
    """(method, [(question, answer)]): these problems with answers like those that the policy was fine-tuned
    on. Where nobody knows what these were like, or a problem comes without a plain answer that holds, the
    problems' own answers."""
    info = sft_info(policy)
    if "method" not in info or info.get("data") or not all(map(inject.is_plain, problems)):
        return "the problems' own", [(p.question, p.response) for p in problems if p.response]
    answers = [inject.augment(p, info["method"], info["behaviors"], info["p"], seed=seed) for p in problems]
    return method_name(policy), list(itertools.chain(*answers))


def measure_entropy(policy, problems, rollouts, seed, micro_tokens):
    """entropy: median over the tokens of rollouts (nats); perplexity: of the policy on answers (whose:
    answers) like those of its fine-tuning, to these problems; None where there are none."""
    whose, answers = sft_answers(policy, problems, seed)
    encoded = [(sample.encode_prompt(policy.tokenizer, question),
                sample.encode_response(policy.tokenizer, answer)) for question, answer in answers]
    perplexity = math.exp(-token_values(policy, encoded, micro_tokens)[0].mean()) if encoded else None
    return {"entropy": token_values(policy, list(rollouts), micro_tokens)[1].median().item(),
            "perplexity": perplexity, "answers": whose}


# ------------------------------------------------------------------------------------------------- 4. Figures
def run_of(name):
    """The run that a file belongs to, without its seed: "logs/bridge-rl-3.csv" -> "bridge-rl"."""
    return re.sub(r"(-\d+)?(\.(pt|csv|jsonl))?$", "", os.path.basename(os.path.normpath(name)), count=1)


def by_run(pairs):
    """(file name, value) pairs -> {run: [values of its seeds]}, in order."""
    runs = defaultdict(list)
    for name, value in pairs:
        runs[run_of(name).lstrip("_")].append(value)  # Matplotlib hides a label "_name"
    return runs


def new_figure(width, height, panels=1, rows=1, sharey="row"):
    """A figure and its panels, (rows, panels); those of a row share their y-axis."""
    from matplotlib.figure import Figure  # here, because nothing else needs matplotlib
    figure = Figure(figsize=(width * panels, height * rows), layout="constrained")
    return figure, figure.subplots(rows, panels, sharey=sharey, squeeze=False)


def add_legend(figure, axis):
    """The legend of one panel, above all of them, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 30 else 3
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8)


def save_figure(figure, path):
    """The name's ending decides the format: .png, .pdf, .svg."""
    with data.replacing(path, "wb") as file:
        figure.savefig(file, format=os.path.splitext(path)[1][1:] or None, dpi=150)


def draw_bars(axis, runs, labels=None):
    """One group of bars for each entry of {run: [a list for each seed]}; None draws nothing. The seeds of a
    run are one bar (their mean) with a dot for each."""
    width = 0.8 / len(runs)
    for i, (run, seeds) in enumerate(runs.items()):
        seeds = [[math.nan if value is None else value for value in values] for values in seeds]
        x = [place + (i - (len(runs) - 1) / 2) * width for place in range(len(seeds[0]))]
        shade = str(0.3 + 0.5 * i / max(1, len(runs) - 1))
        axis.bar(x, [statistics.mean(column) for column in zip(*seeds)], width=width, label=run, color=shade)
        if len(seeds) > 1:
            for values in seeds:
                axis.plot(x, values, "k.", markersize=3)
    axis.set_xticks(range(len(seeds[0])), labels)


SPLITS = {"id": "in distribution", "ood": "out of distribution"}


def draw_by_right(axis, results, split, kind):
    """kind: "histogram", the share of problems by their right rollouts; "influence", their mean dJ."""
    scores = [(r["path"], r["splits"][split]) for r in results]
    if kind == "histogram":
        draw_bars(axis, by_run((path, score["rollouts"]["histogram"]) for path, score in scores))
    else:
        draw_bars(axis, by_run((path, score["influence"]["by_right"]) for path, score in scores))
        axis.axhline(0, color="0", linewidth=0.5)
    axis.set_xlabel(f"right rollouts of {scores[0][1]['rollouts']['samples']}")
    axis.set_ylabel({"histogram": "share of problems", "influence": "influence on the reward"}[kind])
    axis.set_title(SPLITS.get(split, split))


def plot(results, path):
    """The histograms of all checkpoints, one panel a split; below them the influence, where it was measured.
    """
    splits = list(results[0]["splits"])
    kinds = ["histogram"] + ["influence"] * ("influence" in results[0]["splits"][splits[0]])
    figure, axes = new_figure(4.5, 3.2, len(splits), len(kinds))
    for kind, row in zip(kinds, axes):
        for axis, split in zip(row, splits):
            draw_by_right(axis, results, split, kind)
            axis.label_outer()
    add_legend(figure, axes[0][0])
    save_figure(figure, path)


def read_curve(path):
    """(rewards, steps with a held-out accuracy, those accuracies) of a CSV file that grpo.py wrote."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        held_out = [row for row in rows if row["val_accuracy"]]
        return ([float(row["reward"]) for row in rows], [int(row["step"]) for row in held_out],
                [float(row["val_accuracy"]) for row in held_out])
    except (OSError, KeyError, ValueError, TypeError, csv.Error):
        raise data.InputError(f"{path}: not a CSV file that grpo.py wrote") from None


def is_curve(path):
    """Whether there is such a file at `path`."""
    try:
        return bool(read_curve(path)[0])
    except data.InputError:
        return False


def draw_rewards(axis, run, seeds, shade, style):
    """Each seed is a thin line (mean of 10 steps), all of them a band with their mean in it."""
    curves = [[statistics.mean(rewards[max(0, k - 10):k]) for k in range(1, len(rewards) + 1)]
              for rewards in seeds]
    columns = list(zip(*curves))  # one for each step that all seeds have reached
    low, mean, high = (list(map(f, columns)) for f in (min, statistics.mean, max))
    steps = range(1, len(columns) + 1)
    label = f"{run}: reward (mean of 10 steps)"
    if len(seeds) > 1:
        label = f"{run}: reward, {len(seeds)} seeds (mean of 10 steps)"
        for curve in curves:
            axis.plot(range(1, len(curve) + 1), curve, color=shade, linewidth=0.4)
    axis.fill_between(steps, low, high, color=shade, alpha=0.15, linewidth=0)
    axis.plot(steps, mean, style, color=shade, linewidth=2, label=label)


def draw_curves(axis, paths):
    """Reward against step. A single log also shows its greedy accuracy on held-out problems."""
    runs = by_run((name, read_curve(name)) for name in paths)
    for i, (run, logs) in enumerate(runs.items()):
        shade, style = str(0.55 * i / max(1, len(runs) - 1)), ("-", "--", ":")[i % 3]
        draw_rewards(axis, run, [rewards for rewards, _, _ in logs], shade, style)
    if len(paths) == 1:
        rewards, steps, accuracies = logs[0]  # of the only run
        axis.plot(range(1, len(rewards) + 1), rewards, color="0", linewidth=0.5, alpha=0.5)
        axis.plot(steps, accuracies, "o--", color="0.4", markersize=4,
                  label=f"{run}: greedy accuracy, held-out problems")
    axis.set_xlabel("GRPO step")
    most = max((reward for logs in runs.values() for rewards, _, _ in logs for reward in rewards), default=0)
    axis.set_ylabel("share right" if most <= 1 else "reward")  # --format-reward adds to it
    axis.set_ylim(0, max(1, most))


def curve_rows(paths, steps=20):
    """The same in numbers, rows of text: each run's reward, the mean of its first and of its last `steps`
    steps (of half of them where a log is shorter than both), and the gain, over its seeds; where there are
    two runs, their difference, paired by seed."""
    first, last = defaultdict(dict), defaultdict(dict)  # {run: {seed: reward}}
    curves = {path: read_curve(path)[0] for path in paths}
    for path, rewards in curves.items():
        if not rewards:
            raise data.InputError(f"{path}: a log without a step; name one of a run that has begun")
        steps = min(steps, max(1, len(rewards) // 2))
    for path, rewards in curves.items():
        run = run_of(path)
        seed = os.path.basename(path).removeprefix(run)
        first[run][seed] = statistics.mean(rewards[:steps])
        last[run][seed] = statistics.mean(rewards[-steps:])
    yield ["run", "seeds", f"first {steps} steps", f"last {steps} steps", "gain"]
    for run in first:
        gain = minus(last[run], first[run])
        yield [run, f"{len(gain)}", percent(first[run], gain), percent(last[run], gain),
               percent(gain, gain, "+")]
    if len(first) == 2:
        a, b = first
        change = [minus(stage[b], stage[a]) for stage in (first, last)]
        change.append(minus(change[1], change[0]))
        if change[2]:
            yield [f"{b} - {a}", f"{len(change[2])}", *(percent(values, values, "+") for values in change)]


def plot_curves(paths, path):
    """The training logs as one figure."""
    figure, axes = new_figure(6, 3.4)
    draw_curves(axes[0][0], paths)
    add_legend(figure, axes[0][0])
    save_figure(figure, path)


def draw_intervals(axis, rows, names):
    """names and rows: {label: [(mean, low, high) for each name]}, one line each, the first on top. NaN, where
    there is no interval or no value, draws nothing."""
    for i, name in enumerate(names):
        mean, low, high = zip(*(intervals[i] for intervals in rows.values()))
        y = [place + 0.25 * (i - (len(names) - 1) / 2) for place in range(len(rows))]
        # a mean without an interval is drawn, one without a value is not
        spread = [[m - x for m, x in zip(mean, low)], [x - m for m, x in zip(mean, high)]]
        axis.errorbar(mean, y, xerr=spread, fmt="os^"[i % 3], label=name, color="0.2", capsize=3,
                      markerfacecolor="0.2" if i == 0 else "1")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("share right")


# ----------------------------------------------------------- 5. Many seeds: results.csv, and the report on it
KEY = ("task", "method", "seed", "stage", "split", "ops")  # names a row; ops: operations, promptbench: depth
# behaviors in all n answers, up to the first fault of each, those that did their work; and first faults
COUNTS = ("reflections", "analyses", "subgoals", "locked", "false_reflections", "order", "retrieval",
          "arithmetic", "format", "answer")
# process: empty where no steps were checked; p: of injection, empty where nothing was or nobody knows;
# commit: of the scripts that evaluated
COLUMNS = (*KEY, "n", "correct", "process", "p", *COUNTS, "commit")
SFT_N = 2000  # sft.py's --n if nobody says otherwise
RL_FLAGS = ("steps", "beta", "prompts", "n", "max_new_tokens", "temperature", "format_reward", "lr",
            "lr_decay", "kl", "max_kl", "clip", "clip_high", "norm", "no_std", "drop_flat", "entropy", "tis",
            "epochs", "max_grad_norm", "weight_decay")


def sft_info(policy):
    """The arguments of the SFT run that a checkpoint goes back to; empty for a pretrained base."""
    info = policy.info or {}
    while info.get("stage") == "grpo":
        info = info.get("base") or {}
    return {} if info.get("model") == "scratch" else info


BRIDGE = {"subgoal", "analysis", "reflection"}  # the paper's


def method_name(policy, name=""):
    """The method of the SFT answers: "vanilla", "bridge", "subgoal" (a behavior alone), "bridge-p0.1" (with
    another p than the preset's), "vanilla-n3000" (with another number of problems)."""
    info = sft_info(policy)
    if info.get("data"):  # the answers came from a file, and sft.py's --method says nothing about it
        return run_of(info["data"])
    method, behaviors = info.get("method", run_of(name)), info.get("behaviors", inject.BEHAVIORS)
    number = "" if info.get("n", SFT_N) == SFT_N else f"-n{info['n']}"
    if method != "bridge" or "p" not in info:
        return method + number
    if set(behaviors) != BRIDGE:
        method = "+".join(behavior for behavior in inject.BEHAVIORS if behavior in behaviors) or "vanilla"
    preset = sft.preset(policy.model, sft.PRESETS, info.get("task"))
    used = set(behaviors) - {"subgoal"} and info["p"] != preset["p"]
    return (f"{method}-p{info['p']:g}" if used else method) + number


def injection_p(policy):
    """p of the SFT answers, 0 for subgoals alone; None where nothing was injected or a file was read."""
    info = sft_info(policy)
    if info.get("method") != "bridge" or info.get("data") or not info.get("behaviors"):
        return None
    return 0.0 if info["behaviors"] == ["subgoal"] else info.get("p")


def origin(policy, name):
    """(method, seed, stage) of a checkpoint, from the arguments kept in it. The method is that of the SFT
    answers and, behind colons, how GRPO's rollouts and loss differ from the default: "bridge:filter" (1 7),
    "vanilla:400-steps", "bridge:beta-0.01", "bridge:no-std"; on which problems it trained is not said."""
    info, method = policy.info or {}, method_name(policy, name)
    if info.get("stage") != "grpo":
        return method, info.get("seed", 0), "sft"
    if info.get("filter"):
        low, high = info["filter"]
        method += ":filter" if (low, high) == (1, 7) else f":filter-{low}-{high}"
    usual = grpo.defaults(policy.model, info.get("task")) if "steps" in info else {}
    for name in usual and RL_FLAGS:
        value, flag = info.get(name, usual[name]), name.replace("_", "-")
        if value != usual[name]:
            shown = f"{value:g}" if isinstance(value, float) else value
            words = f"{shown}-steps" if name == "steps" else f"{flag}-{shown}"
            method += f":{flag if value is True else f'no-{flag}' if value is False else words}"
    return method, info.get("seed", 0), "rl"


def counts(score):
    """COUNTS of one checkpoint on one set of problems."""
    if "behaviors" not in score:
        return {}
    found, n = score["behaviors"], score["n"]
    reliable, faults = found["reliable"], found["first_fault"]
    return {name: round(found[name] * n) for name in COUNTS[:COUNTS.index("locked")]} | {
        "locked": reliable["locked"][1], "false_reflections": reliable["ready"][1] - reliable["ready"][0]} | {
        kind: faults.get(kind, 0) for kind in COUNTS[COUNTS.index("order"):]}


def commit():
    """The last commit that changed these scripts, "+" behind it where they differ from it; "" without git."""
    def git(*command):
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), *command, "--", ":(glob)*.py"]
        return subprocess.run(command, text=True, capture_output=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + "+" * bool(git("diff", "--name-only", "HEAD"))
    except OSError:  # git is not installed
        return ""


def cells(policy, name, splits, scores):
    """The rows of results.csv for one checkpoint, each with the majority answer's beside it."""
    (method, seed, stage), code = origin(policy, name), commit()
    for split, problems in splits.items():
        score, n = scores[split], len(problems)
        sizes = [getattr(p, data.TASKS[p.task].level) for p in problems]
        tasks = "+".join(sorted({p.task for p in problems}))
        row = dict(task=tasks, seed=seed, split=split, ops=f"{min(sizes)}-{max(sizes)}", n=n, commit=code)
        yield row | dict(method=method, stage=stage, correct=score["correct"], process=score["process"],
                         p=injection_p(policy), **counts(score))
        yield row | dict(method="majority", stage="", correct=round(score["majority"] * n), process=None)


def read_results(path):
    """The rows of results.csv. Older files have no task (then igsm), commit, process, p and counts (None)."""
    unknown = dict.fromkeys(("process", "p", *COUNTS, "commit"), "")
    try:
        with open(path, newline="") as file:
            rows = [{"task": "igsm"} | unknown | row for row in csv.DictReader(file)]
        for row in rows:
            row |= {name: int(row[name]) for name in ("seed", "n", "correct")}
            row |= {name: int(row[name]) if row[name] else None for name in ("process", *COUNTS)}
            row["p"] = float(row["p"]) if row["p"] else None
            if row["n"] < 1 or not set(row) <= set(COLUMNS):  # what we do not know we would lose
                raise ValueError
        return [{name: row[name] for name in COLUMNS} for row in rows]
    except (OSError, KeyError, ValueError, TypeError, csv.Error):
        columns = ", ".join(COLUMNS)
        raise data.InputError(f"{path}: not a file that --results wrote (columns {columns})") from None


def write_results(path, new):
    """Put rows into results.csv: a cell that is there already is replaced, all others stay."""
    old = read_results(path) if os.path.exists(path) else []
    rows = {tuple(str(row[name]) for name in KEY): row for row in [*old, *new]}  # DictWriter fills in ""
    with data.replacing(path) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def shares(rows):
    """{(task, split): {(method, stage): {seed: share right}}}; stages "sft-process", "rl-process":
    process-verified."""
    found, numbers = defaultdict(lambda: defaultdict(dict)), {}
    for row in rows:
        cell = found[row["task"], row["split"]]
        where = ", ".join(f"{row[name]}" for name in KEY[:-1] if row[name] != "")
        n = numbers.setdefault((row["task"], row["split"], row["seed"]), row["n"])
        if n != row["n"]:
            raise data.InputError(f"{where}: measured on {row['n']} problems, another of this seed on {n}: "
                                  "measure both on the same problems")
        if row["seed"] in cell[row["method"], row["stage"]]:
            raise data.InputError(f"{where}: two rows that differ in ops alone; keep one --results file for "
                                  "each")
        cell[row["method"], row["stage"]][row["seed"]] = row["correct"] / row["n"]
        if row["process"] is not None:
            cell[row["method"], row["stage"] + "-process"][row["seed"]] = row["process"] / row["n"]
    return found


def minus(a, b):
    """Paired differences: {seed: value} - {seed: value} for the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def percent(values, seeds, sign=""):
    """Mean of {seed: value} over `seeds`, and from two on their t-interval; sign "+" for a gain."""
    if any(seed not in values for seed in seeds):  # rows from before process was counted
        return "not counted"
    mean, low, high = t_interval([values[seed] for seed in seeds])
    return f"{mean:{sign}.1%}" + (f" [{low:{sign}.1%}, {high:{sign}.1%}]" if len(seeds) > 1 else "")


def behavior_rows(rows):
    """What RL did to the answers, a row for each task, split, method and seed, each cell before → after: of n
    greedy answers the right ones, the right and sound ones, then COUNTS (behaviors up to an answer's first
    fault, and first faults)."""
    names = ("correct", "process", *COUNTS)
    of = {tuple(row[name] for name in KEY): row for row in rows if row["order"] is not None}
    yield ["task", "split", "method", "seed", "n", *(name.replace("_", " ") for name in names)]
    for (task, method, seed, stage, *problems), after in sorted(of.items()):
        before = of.get((task, method.partition(":")[0], seed, "sft", *problems))
        if stage == "rl" and before:
            changes = [f"{before[name]} → {after[name]}" for name in names]
            yield [task, after["split"], method, f"{seed}", f"{after['n']}", *changes]


def compare_methods(cell, where, injected, plain):
    """Lines of the report on two methods whose GRPO had the same options; none without a seed of both."""
    seeds = minus(cell[injected, "gain"], cell[plain, "gain"]).keys()
    if not seeds:
        return []
    gain, rl, process = (percent(minus(cell[injected, stage], cell[plain, stage]), seeds, "+")
                         for stage in ("gain", "rl", "rl-process"))
    right, base = (sum(cell[method, "rl"][seed] for seed in seeds) for method in (injected, plain))
    ratio = right / base if base else math.nan
    return ["", f"{where}, paired over {len(seeds)} seeds: gain of {injected} - gain of {plain} {gain}; "
                f"accuracy after RL, {injected} - {plain} {rl}, {injected} / {plain} {ratio:.2f}; "
                f"process-verified after RL, {injected} - {plain} {process}"]


def report(path):
    """results.csv as a table of means over seeds, then bridge against vanilla, then behavior_rows. Only
    paired seeds count: those with both stages in the table, those with both methods in the comparison."""
    lines = ["| task | split | method | seeds | SFT | RL | gain | process-verified SFT | process-verified RL "
             "| majority |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    comparisons, rows = [], read_results(path)
    for (task, split), cell in sorted(shares(rows).items()):
        guess = statistics.mean(cell["majority", ""].values() or [math.nan])
        for method in sorted({method for method, stage in cell if stage == "rl"}):
            for stage in ("sft", "sft-process"):  # "bridge:filter" began from the SFT policy of "bridge"
                cell[method, stage] = cell[method.partition(":")[0], stage]
            gain = cell[method, "gain"] = minus(cell[method, "rl"], cell[method, "sft"])
            if gain:
                stages = ("sft", "rl", "gain", "sft-process", "rl-process")
                values = [percent(cell[method, s], gain, "+" if s == "gain" else "") for s in stages]
                lines.append(f"| {task} | {split} | {method} | {len(gain)} | {' | '.join(values)} | "
                             f"{guess:.1%} |")
        for options in sorted({m.removeprefix("bridge") for m, _ in cell if re.fullmatch("bridge(:.*)?", m)}):
            comparisons += compare_methods(cell, f"{task} {split}", "bridge" + options, "vanilla" + options)
    heading, *changes = behavior_rows(rows)
    if changes:
        changes = [heading, ["---"] * len(heading), *changes]
        comparisons += ["", *(f"| {' | '.join(row)} |" for row in changes)]
    return "\n".join(lines + comparisons)


METHODS = ("vanilla", "pp-aug", "rc-aug", "subgoal", "analysis", "reflection", "bridge")  # order in figures


def interval_or_nothing(values):
    """t_interval of {seed: value}; NaN where there is none."""
    return t_interval(list(values.values())) if values else (math.nan,) * 3


def plot_report(path, out):
    """Accuracy after RL by method and, below, by injection probability (subgoals in all answers, as in the
    paper): means over seeds with t-intervals, answers beside process-verified ones; a column for each split.
    """
    rows, names = read_results(path), ("answer right", "process-verified")
    if all(row["stage"] != "rl" for row in rows):
        raise data.InputError(f"{path}: no row of a policy after RL, so there is nothing to draw")
    chances = {(row["task"], row["method"]): row["p"] for row in rows if row["p"] is not None}
    found = [(key, cell) for key, cell in sorted(shares(rows).items())
             if any(stage == "rl" for _, stage in cell)]
    figure, axes = new_figure(4.5, 3.2, len(found), 2, sharey=False)
    for ((task, split), cell), above, below in zip(found, *axes):
        methods = sorted({method for method, stage in cell if stage == "rl"},
                         key=lambda m: (METHODS.index(m) if m in METHODS else len(METHODS), m))
        after = {m: [interval_or_nothing(cell[m, stage]) for stage in ("rl", "rl-process")] for m in methods}
        draw_intervals(above, after, names)
        above.set_title(f"{task} {split}")
        swept = [m for m in methods
                 if (task, m) in chances and re.fullmatch(r"subgoal|bridge(-p[\d.]+)?", m)]
        sweep = sorted((chances[task, m], m) for m in swept)
        if sweep:
            draw_intervals(below, {f"p = {p:g}": after[m] for p, m in sweep}, names)
        else:
            below.set_axis_off()
    add_legend(figure, axes[0][0])
    save_figure(figure, out)


# ------------------------------------------------------------------------------------------------ 6. The page
# --html: one file that needs nothing else. What came from a model or from a file is escaped where it is put
# in. Figures are pictures within the page, each with its numbers in a table below. Behaviors differ by the
# line at the left and by a word, so that they can be told apart in grey.
SHOWN = 10  # problems with their rollouts
PAGE = string.Template("""<!DOCTYPE html><!-- BRIDGE, eval.py -->
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 1rem/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: auto; padding: 0 1rem }
  h2 { border-top: 1px solid #bbb; padding-top: 1rem; margin-top: 2.5rem }
  .side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem }
  .side > * { min-width: 0 }
  figure, h3, h4 { margin: 0 0 .5rem }
  img { width: 100%; max-width: 32rem }
  .scroll { overflow-x: auto; margin: .5rem 0 1rem }
  table { border-collapse: collapse; font-size: .9rem }
  th, td { padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
  th:first-child, td:first-child { text-align: left }
  pre { font-size: .8rem; overflow-x: auto; background: #f4f4f4; padding: .5rem }
  pre.question { white-space: pre-wrap }
  ol { font: .8rem/1.5 ui-monospace, monospace; padding-left: 2.2rem; margin: .2rem 0 1rem }
  li { border-left: 4px solid transparent; padding-left: .4rem; overflow-wrap: anywhere }
  li b { font: italic .75rem system-ui; border: 1px solid; border-radius: .5rem; padding: 0 .4rem }
  .subgoal { border-left: 4px solid #178a3c } .subgoal b { color: #116b2e }
  .analysis { border-left: 4px dotted #1470b8 } .analysis b { color: #105a94 }
  .reflection { border-left: 4px dashed #b07a00; background: #fff7e0 } .reflection b { color: #7a5500 }
  .fault { outline: 2px solid #b00020; background: #fdecee }
  strong.reason { display: block; color: #b00020; font-family: system-ui, sans-serif }
  details { border: 1px solid #ccc; border-radius: .3rem; padding: .3rem .6rem; margin: .5rem 0 }
  summary { cursor: pointer } :focus-visible { outline: 3px solid #1470b8; outline-offset: 2px }
</style>
<main>
<h1>$title</h1>
$body
</main>
</html>
""")
INTRODUCTION = """A language model answers word problems step by step. Supervised fine-tuning (SFT) showed it
answers to imitate; reinforcement learning (RL) then let it try, and made what led to right results likelier.
This page compares its checkpoints on the same problems. <em>Right</em>: the final number is right.
<em>Process-verified</em>: right, and every step is sound. <em>Rollouts</em> are answers drawn at random
(temperature 1); accuracy is that of the likeliest answer (greedy)."""
INFLUENCE = """Influence: how much a step of RL on one problem would raise the reward of all (Proposition 3.1
of the BRIDGE paper, per unit of learning rate), computed before that step is taken. Problems that are always
or never solved teach nothing. It is a signal, largest where half of the rollouts are right, times the
agreement of gradients (co-influence). A problem is one of those that it influences, and with few problems
that is most of it: <em>on others</em> leaves it out."""
ANSWERS = """The first problems, as they came; open one to see its premises, its graph from the answer down to
what is given, and the answers. A marked line shows a behavior: <em>reflection</em> (start on a quantity too
early, notice, go back), <em>analysis</em> (restate a premise), <em>subgoal</em> (one operation per "="). The
first unsound line is framed, with the reason; what follows it was not checked."""


def html_table(rows):
    """Rows of plain text, the first one the heading."""
    head, *body = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th scope=col>{cell}</th>" for cell in head)]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) for row in body]
    return f"<div class=scroll tabindex=0><table>{''.join(lines)}</table></div>"


def html_figure(alt, draw, *arguments, height=3.2):
    """What draw(axis, *arguments) draws, as a picture; alt says what it shows to who cannot see it."""
    figure, axes = new_figure(4.8, height)
    draw(axes[0][0], *arguments)
    add_legend(figure, axes[0][0])
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    code = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{code}"></figure>'


def html_answer(number, problem, text):
    """A rollout line by line, behaviors and the first unsound line marked."""
    verdict = "right" if data.reward(text, problem.answer) else "wrong"
    fault = check([problem], [text])[0].error if problem.nodes else None
    lines = []
    for place, line in enumerate(f"<think>{text}".split("\n"), 1):
        kind, reason = data.line_kind(line), ""
        tag = f" <b>{kind}</b>" if kind else ""
        if fault and place == fault.line:
            reason = f"<strong class=reason>first fault ({fault.kind}): {html.escape(fault.reason)}</strong>"
            kind += " fault"
        lines.append(f'<li class="{kind}">{html.escape(line)}{tag}{reason}</li>')
    but = ", but a step is unsound" if fault and verdict == "right" else ""
    return f"<p>Rollout {number}: {verdict}{but}</p><ol>{''.join(lines)}</ol>"


def html_problem(problem, texts, opened):
    """A problem with its graph, and {checkpoint: its rollouts} side by side: the first one and, folded, the
    others."""
    columns = []
    for name, answers in texts.items():
        right = sum(data.reward(text, problem.answer) for text in answers)
        first, *others = [html_answer(i, problem, text) for i, text in enumerate(answers, 1)]
        columns.append(f"<section><h4>{html.escape(name)}: {right:.0f} of {len(answers)} rollouts right</h4>"
                       f"{first}<details><summary>{len(others)} more</summary>{''.join(others)}</details>"
                       "</section>")
    graph = f"<pre tabindex=0>{html.escape(data.draw_picture(problem))}</pre>" if problem.nodes else ""
    asked = html.escape(problem.question.split("\n")[-1])
    return (f"<details{' open' if opened else ''}><summary>{asked} (answer: {problem.answer})</summary>"
            f"<pre class=question>{html.escape(problem.question)}</pre>{graph}"
            f"<div class=side>{''.join(columns)}</div></details>")


def html_accuracy(results, comparisons):
    """Accuracy with its intervals: figure, table and the tests of the differences."""
    rows = {}
    for result in results:
        for split, s in result["splits"].items():
            rows[f"{result['path']}, {split}"] = [
                (count / s["n"], *wilson(count, s["n"])) if count is not None else (math.nan,) * 3
                for count in (s["correct"], s["process"])]
    chart = html_figure("accuracy of each checkpoint with its 95% interval", draw_intervals, rows,
                        ("right", "process-verified"), height=1.2 + 0.5 * len(rows))
    items, found = "", {(r["path"], split): s for r in results for split, s in r["splits"].items()}
    for c in comparisons:
        before, after = (f"{path} {found[path, c['split']]['accuracy']:.1%}"
                         for path in (c["before"], c["after"]))
        items += html.escape(f"{SPLITS.get(c['split'], c['split'])}: {before} right, {after}; were both "
                             f"equally good, so large a difference would have a chance of {c['p']:.2g} "
                             "(McNemar)")
        items += "<br>"
    return f"<h2>How often is it right?</h2><p>{items}</p>{chart}{html_table(table_rows(results))}"


def html_behaviors(results, split):
    """Behaviors in a rollout, and how often each kind of fault came first."""
    found = {r["path"]: r["splits"][split]["rollouts"].get("behaviors") for r in results}
    if None in found.values():
        return ""
    names = ("reflections", "analyses", "subgoals", "redundant")
    columns = [("a rollout has", *found)]
    for name in ("steps", *names):
        columns.append((name, *(f"{b[name]:.2f}" for b in found.values())))
    columns.append(("no fault", *(f"{b['sound']:.1%}" for b in found.values())))
    for kind in sorted(set().union(*(b["first_fault"] for b in found.values()))):
        columns.append((f"first fault: {kind}", *(
            f"{b['first_fault'].get(kind, 0) / sum(b['first_fault'].values()) * (1 - b['sound']):.1%}"
            if b["first_fault"] else "0.0%" for b in found.values())))
    bars = by_run((path, [b[name] for name in names]) for path, b in found.items())
    chart = html_figure("behaviors per rollout", draw_bars, bars, names)
    return (f"<h2>What does it do, and where does it go wrong first?</h2>{chart}"
            f"<p>Counted in rollouts, up to the first fault of each.</p>{html_table(columns)}")


def html_rollouts(results):
    """Histograms and influence by right rollouts."""
    charts = [html_figure(f"{kind} by right rollouts, {split}", draw_by_right, results, split, kind)
              for kind in ("histogram", "influence") for split in results[0]["splits"]]
    return (f"<h2>What could it learn?</h2><p>{INFLUENCE}</p><div class=side>{''.join(charts)}</div>"
            f"{html_table(influence_rows(results))}")


def write_page(path, results, comparisons, splits):
    """The page on all checkpoints, as --html writes it. splits: {split: problems}."""
    first = next(iter(splits))
    logs = [log for r in results if is_curve(log := os.path.splitext(r["path"])[0] + ".csv")]
    parts = [f"<p>{INTRODUCTION}</p>", html_accuracy(results, comparisons)]
    if logs:
        parts += ["<h2>How did it get there?</h2>", html_figure("reward against step", draw_curves, logs)]
    parts += [html_behaviors(results, first), html_rollouts(results), "<h2>Answers, side by side</h2>",
              f"<p>{ANSWERS}</p>"]
    for i, problem in enumerate(splits[first][:SHOWN]):
        texts = {r["path"]: r["splits"][first]["rollouts"]["shown"][i] for r in results}
        parts.append(html_problem(problem, texts, opened=i == 0))
    title = "What reinforcement learning changed: " + html.escape(", ".join(r["path"] for r in results))
    with data.replacing(path) as file:
        file.write(PAGE.substitute(title=title, body="\n".join(parts)))


# ------------------------------------------------------------------------------------------------- 7. Command
def add_flags(parser):
    add = parser.add_argument
    add("--ckpt", nargs="+", help="checkpoints, one row each; default: sft.pt, else the tiny base")
    add("--data", nargs="+", help="JSONL files; default: fresh ones, in (id) and out of (ood) distribution")
    data.add_problem_flags(parser)
    add("--ood", type=data.natural, nargs=2, metavar=("LO", "HI"),
        help="what is harder out of distribution: igsm, operations (default: up to 3 more); promptbench, "
             "redundancy (20 22); for the tiny models' problems " +
             " and ".join(map(data.as_flags, data.TINY_OOD.values())))
    add("--n", type=data.positive_int, default=300, help="fresh problems a split")
    add("--max-new-tokens", type=data.positive_int, default=512, help="longer responses are cut")
    add("--samples", type=data.natural, default=0, help="also k rollouts a problem at temperature 1")
    add("--seed", type=data.natural, default=0, help="of the fresh problems and the rollouts")
    add("--influence", action="store_true",
        help="from the rollouts (8 unless --samples): how much a step of GRPO would change (Proposition 3.1)")
    add("--entropy", action="store_true",
        help="median entropy of the rollouts' tokens, perplexity of answers like those of the fine-tuning")
    add("--micro-tokens", type=data.positive_int, default=4096, help="of these two: tokens in a forward pass")
    add("--html", metavar="FILE.html", help="write one page with all of this (needs matplotlib)")
    add("--json", metavar="FILE", help="write all figures there")
    add("--plot", metavar="FILE.png",
        help="draw the histogram of --samples, and --influence; or --curves; or --report (needs matplotlib)")
    add("--curves", nargs="+", metavar="FILE.csv",
        help="print the rewards of these training logs, draw them into --plot and stop; NAME-1.csv, "
             "NAME-2.csv ... are seeds of one run")
    add("--results", metavar="FILE.csv",
        help="put one row a checkpoint and split into this file, and one of the majority answer")
    add("--report", metavar="FILE.csv", help="print such a file as a table over seeds and stop")


# how a figure of Matplotlib begins: .png, .pdf, .svg
FIGURES = [rb"\x89PNG.{37}Software\0Matplotlib", rb"%PDF-1\.\d\n%\xac\xdc \xab\xba",
           rb"<\?xml.{,1000}Matplotlib"]
# what has no effect on a table or a log that is there already
MEASURING = ("ckpt", "data", *sft.DRAWING, "ood", "n", "max_new_tokens", "samples", "seed", "influence",
             "entropy", "micro_tokens", "html", "json", "results")


def read_arguments():
    """The command line, with what can be checked before hours of measuring."""
    parser = data.Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args()
    mode = "curves" if args.curves else "report" if args.report else None
    if mode:
        others = *MEASURING, "report" if args.curves else "curves"
        parser.refuse(args, others, f"with --{mode}, which measures nothing")
    if args.data:
        parser.refuse(args, (*sft.DRAWING, "ood", "n"), "with --data, which brings its problems")
        if len(set(map(data.place, args.data))) < len(args.data):
            raise data.InputError("--data: names a file twice; name each once")
    args.influence, args.entropy = args.influence or bool(args.html), args.entropy or bool(args.html)
    if (args.influence or args.entropy) and not args.samples:
        args.samples = 8
    if not mode and not (args.influence or args.entropy):
        parser.refuse(args, ["micro_tokens"], "without --influence, --entropy or --html")
    if args.data and not args.samples:
        parser.refuse(args, ["seed"], "without --samples where --data brings the problems")
    if args.influence and args.samples == 1:
        raise data.InputError("--samples 1: influence needs right and wrong rollouts; give --samples 8")
    if args.plot and not args.samples and not mode:
        raise data.InputError("--plot draws rollouts: give --samples 8 as well")
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        raise data.InputError(f"--plot {args.plot}: must end in .png, .pdf or .svg")
    drawn = args.curves or (args.plot or args.html) and args.ckpt or ()
    if len({os.path.basename(os.path.normpath(path)) for path in drawn}) < len(drawn):
        raise data.InputError("--curves, --plot and --html tell runs apart by their files' names: rename one "
                              "of those that are named alike")
    read = [*(args.ckpt or ()), *(args.data or ()), *(args.curves or ()), args.report]
    data.claim([("--json", args.json, [rb'\{"checkpoints"']), ("--plot", args.plot, FIGURES),
                ("--results", args.results, [b"task,", b"method,"]),
                ("--html", args.html, [re.escape(PAGE.template[:40].encode())])],
               [("a file to read", path) for path in read])
    if (args.plot or args.html) and importlib.util.find_spec("matplotlib") is None:
        raise data.InputError("--plot, --html: drawing needs matplotlib; pip install matplotlib")
    if args.results and os.path.exists(args.results):
        read_results(args.results)  # it will get more rows: can they be added?
    return args


def read_file(path):
    """The problems of a JSONL file, with their graphs where every question can be read back."""
    problems = data.read_problems(path)
    try:
        return data.read_problems(path, graph=True)
    except data.InputError as error:
        print(f"{error}; so only answers are checked, not steps", file=sys.stderr)
        return problems


def read_splits(args):
    """{split: problems}: the files of --data, or fresh held-out problems, in and out of distribution."""
    if args.data:
        splits = {path: read_file(path) for path in args.data}
        args.task = splits[args.data[0]][0].task  # of the default checkpoint
        return splits
    options, task = data.problem_options(args), data.TASKS[args.task]
    harder = data.TINY_OOD.get(args.task) if data.is_tiny(args) else None
    harder = {task.hardness: args.ood} if args.ood else harder or task.harder(options)
    for name in () if args.ood else options.keys() & harder:
        (low, high), given = harder[name], options[name]
        if not (given[1] <= low and given[1] < high):
            raise data.InputError(f"--{name} {data.show(given)}: what is drawn out of distribution, {low} to "
                                  f"{high}, is not harder: lower it, or pass --ood LO HI")
    splits = {"id": options, "ood": options | harder}
    return {name: list(itertools.islice(data.generate(seed=args.seed, split="test", **chosen), args.n))
            for name, chosen in splits.items()}


def table_rows(results):
    """One row a checkpoint and split, below a heading."""
    rows = [("checkpoint", "split", "accuracy", "95% interval", "process", "majority", "format", "cut",
             "tokens")]
    for result in results:
        for split, s in result["splits"].items():
            low, high = s["ci95"]
            process = "-" if s["process"] is None else f"{s['process'] / s['n']:.1%}"
            rates = [f"{s[name]:.1%}" for name in ("majority", "format_rate", "cut_rate")]
            rows.append((result["path"], split, f"{s['accuracy']:.1%}", f"{low:.1%} - {high:.1%}", process,
                         *rates, f"{s['mean_tokens']:.0f}"))
    return rows


def influence_rows(results):
    """The influence of each checkpoint and split, in all and by right rollouts, below a heading."""
    samples = len(next(iter(results[0]["splits"].values()))["influence"]["by_right"]) - 1
    rows = [("checkpoint", "split", "influence", "on others", "signal", "co-influence",
             *(f"{c}/{samples}" for c in range(samples + 1)))]
    for result in results:
        for split, scores in result["splits"].items():
            i = scores["influence"]
            values = [i["mean"], i["on_others"], i["signal"], i["co_influence"], *i["by_right"]]
            rows.append((result["path"], split, *("-" if x is None else f"{x:.3g}" for x in values)))
    return rows


def in_columns(rows):
    """Rows of text, one under the other: two columns of names to the left, then numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    pad = [str.ljust] * 2 + [str.rjust] * (len(widths) - 2)
    return "\n".join("  ".join(f(cell, w) for f, cell, w in zip(pad, row, widths)) for row in rows)


def table(results):
    """One row a checkpoint and split."""
    return in_columns(table_rows(results))


def describe_test(c):
    """One of `compare`'s tests as a sentence."""
    return (f"{c['before']} -> {c['after']}, {c['split']}: McNemar's exact test on the same problems, "
            f"p = {c['p']:.2g}")


def details(scores):
    """Behaviors and rollouts, a sentence each."""
    if "behaviors" in scores:
        b = scores["behaviors"]
        faults = ", ".join(f"{kind} {times}" for kind, times in b["first_fault"].items()) or "none"
        yield (f"a response has {b['steps']:.1f} sound steps, {b['reflections']:.2f} reflections, "
               f"{b['analyses']:.2f} analyses, {b['subgoals']:.2f} subgoal chains; first fault: {faults}")
        yield ", ".join(f"{words} {good / of:.1%} of {of}" for (good, of), words in
                        zip(b["reliable"].values(), RELIABLE) if of) or "no step was begun"
    if "rollouts" in scores:
        r = scores["rollouts"]
        none, every = r["histogram"][0], r["histogram"][-1]
        passes = ", ".join(f"pass@{k} {chance:.1%}" for k, chance in r["pass_at"].items())
        process = "" if r["process"] is None else f"; process {r['process'] / r['samples'] / scores['n']:.1%}"
        yield (f"of {r['samples']} rollouts at temperature 1, none right {none:.1%}, "
               f"some {1 - none - every:.1%}, all {every:.1%}; {passes}{process}")
    if "entropy" in scores:
        perplexity = "unknown" if scores["perplexity"] is None else f"{scores['perplexity']:.3f}"
        yield (f"median entropy of the rollouts' tokens {scores['entropy']:.4f} nats, "
               f"perplexity {perplexity} on answers: {scores['answers']}")


def measure_all(args, splits):
    """--ckpt's checkpoints, one after the other: [{"path", "splits": {split: scores}}]."""
    extra = [name for name in ("influence", "entropy") if getattr(args, name)]
    names = [sample.default_checkpoint(name, args.task) for name in args.ckpt or [None]]
    results, rows = [], {}
    for name in names if args.results or extra else ():  # all of them before the first is measured
        policy = sample.load_policy(name)
        if extra:
            sft.check_head(policy)
        row = ", ".join(map(str, origin(policy, name)))
        if args.results and data.place(rows.setdefault(row, name)) != data.place(name):
            raise data.InputError(f"--results: {rows[row]} and {name} would be one row ({row}): give each a "
                                  "file of its own")
    for name in names:
        policy = sample.load_policy(name)
        if not results:
            print(sample.describe(policy))
        scores = {split: measure(policy, problems, args.max_new_tokens, args.samples, args.seed,
                                 extra=extra, micro_tokens=args.micro_tokens)
                  for split, problems in splits.items()}
        results.append({"path": name, "splits": scores})
        if args.results:
            write_results(args.results, cells(policy, name, splits, scores))
    return results


def main():
    args = read_arguments()
    if args.curves:
        print(in_columns(list(curve_rows(args.curves))))
        return plot_curves(args.curves, args.plot) if args.plot else None
    if args.report:
        print(report(args.report))
        return plot_report(args.report, args.plot) if args.plot else None
    splits = read_splits(args)
    results = measure_all(args, splits)
    print(table(results))
    for result in results:
        for split, scores in result["splits"].items():
            for sentence in details(scores):
                print(f"{result['path']} {split}: {sentence}")
    if args.influence:
        print("influence of a GRPO step, per unit of learning rate, in all and by right rollouts")
        print(in_columns(influence_rows(results)))
    comparisons = compare(results)
    for test in comparisons:
        print(describe_test(test))
    if args.json:
        with data.replacing(args.json) as file:
            json.dump({"checkpoints": results, "mcnemar": comparisons}, file)
    if args.plot:
        plot(results, args.plot)
    if args.html:
        write_page(args.html, results, comparisons, splits)


if __name__ == "__main__":
    data.run_cli(main)
