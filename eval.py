"""Chapter 6. Evaluation: how often is the policy right, and how sure can we be?

    python eval.py --ckpt sft.pt grpo.pt                    # greedy accuracy, in distribution and on harder problems
    python eval.py --ckpt sft.pt grpo.pt --samples 8 --plot rollouts.png --json scores.json
    python eval.py --ckpt sft.pt grpo.pt --data test.jsonl
    python eval.py --curves grpo.csv --plot reward.png      # the training log as a figure
    python eval.py --ckpt sft.pt grpo.pt --results results.csv && python eval.py --report results.csv

Accuracy is exact match of the boxed integer, greedy, on held-out problems (a hash of the text keeps them apart from
everything trained on). Beside every accuracy stand its 95% interval and the score of a policy that always gives the
most frequent answer: iGSM's answers are so skewed that this alone can look like a trained model.

With --samples k, k rollouts of each problem at temperature 1 show what GRPO will find: the shares of problems where
all rollouts fail, some succeed, or all succeed. Only the middle ones carry a gradient.

Two kinds of chance are kept apart. Between two checkpoints on the same problems, McNemar's exact test asks whether the
*problems* could explain the difference. Between two methods only fresh *seeds* count: every seed trains both, and the
report gives the mean of the paired differences with its t-interval.
"""
import argparse, csv, importlib.util, itertools, json, math, os, re, statistics
from collections import Counter

import data, sample


def wilson(correct, n, z=1.96):
    """Wilson's 95% interval of a proportion, (low, high). Unlike p +- z sqrt(p(1-p)/n) it stays in [0, 1] and has width at 0 and n.

    >>> [round(x, 3) for x in wilson(0, 100)]
    [0.0, 0.037]
    """
    p, s = correct / n, z * z / n
    middle, half = (p + s / 2) / (1 + s), z * math.sqrt(p * (1 - p) / n + s / n / 4) / (1 + s)
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(right, samples, k):
    """The chance that at least one of k rollouts is right, from `samples` >= k rollouts a problem, without bias (Chen et al.,
    2021, eq. 1). right: the number of right rollouts of each problem. 1 - (1 - c/n)^k would be too low.

    >>> pass_at_k([1, 0], samples=2, k=1), pass_at_k([1, 0], samples=2, k=2)
    (0.25, 0.5)
    """
    return sum(1 - math.comb(samples - c, k) / math.comb(samples, k) for c in right) / len(right)


def mcnemar(before, after):
    """Exact two-sided p-value that two policies are equally good, from their hits (0 or 1) on the same problems.

    Only problems on which they differ count; were both equally good, each would be gained or lost by the toss of a coin.

    >>> mcnemar([0, 0, 0, 0, 1], [1, 1, 1, 1, 1])           # 4 gained, none lost: 2 / 2^4
    0.125
    """
    gained, lost = (sum(b > a for a, b in zip(*pair)) for pair in ((before, after), (after, before)))
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2 ** n)


# 97.5% points of Student's t for 1, 2, ... degrees of freedom; beyond 20 the last one, which is a little too wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
         2.101, 2.093, 2.086)


def t_interval(values):
    """Mean and 95% interval of the mean over seeds, (mean, low, high); one value has no interval (NaN).

    >>> [round(x, 2) for x in t_interval([1., 2., 3.])]
    [2.0, -0.48, 4.48]
    """
    mean, n = statistics.mean(values), len(values)
    half = T_975[min(n - 1, 20) - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


def majority(problems):
    """The score of always giving the most frequent answer."""
    return Counter(p.answer for p in problems).most_common(1)[0][1] / len(problems)


def behaviors(problems, texts):
    """Mean number per response of what check_trace counts, up to the first fault of each, and the share without a fault."""
    names = ("steps", "reflections", "analyses", "subgoals", "redundant")
    reports = [data.check_trace(p, f"<think>{t}") for p, t in zip(problems, texts)]
    counts = {name: sum(getattr(r, name) for r in reports) / len(reports) for name in names}
    return counts | {"sound": sum(r.ok for r in reports) / len(reports),
                     "first_fault": dict(Counter(r.error.kind for r in reports if r.error).most_common())}


def measure(policy, problems, args):
    """All figures of one policy on one set of problems."""
    greedy = sample.greedy_accuracy(policy, problems, args.max_new_tokens)
    scores = {"n": greedy["n"], "correct": greedy["correct"], "accuracy": greedy["accuracy"],
              "ci95": list(wilson(greedy["correct"], greedy["n"])), "majority": majority(problems),
              "format_rate": greedy["format_rate"], "cut_rate": greedy["cut_rate"], "mean_tokens": greedy["mean_tokens"],
              "hits": [int(hit) for hit in greedy["hits"]]}
    if all(p.nodes for p in problems):
        scores["behaviors"] = behaviors(problems, greedy["texts"])
    if args.samples:
        prompts = [sample.encode_prompt(policy.tokenizer, p.question) for p in problems]
        groups = sample.generate(policy, prompts, args.samples, args.max_new_tokens, 1.0, args.seed)
        right = [sum(data.reward(sample.decode(policy.tokenizer, r.tokens), p.answer) for r in group) for p, group in zip(problems, groups)]
        histogram = Counter(map(int, right))
        scores["rollouts"] = {"samples": args.samples, "mean": sum(right) / len(right) / args.samples,
                              "histogram": [histogram[k] / len(right) for k in range(args.samples + 1)],
                              "pass_at": {k: pass_at_k(list(map(int, right)), args.samples, k)
                                          for k in sorted({1, 2, 4, 8, args.samples}) if k <= args.samples}}
    return scores


def run_of(name):
    """The run that a file belongs to, without its seed: "logs/bridge-rl-3.csv" -> "bridge-rl"."""
    return re.sub(r"-\d+$", "", os.path.splitext(os.path.basename(name))[0])


def by_run(pairs):
    """(file name, value) pairs -> {run: [values of its seeds]}, in order."""
    runs = {}
    for name, value in pairs:
        runs.setdefault(run_of(name), []).append(value)
    return runs


def new_figure(width, height, panels=1):
    """Subplots (1, panels) side by side."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(1, panels, figsize=(width * panels, height), sharey=True, squeeze=False)


def plot(results, path):
    """Rollout accuracy per problem, one panel a split; seeds of one run are one bar (their mean) with a dot for each."""
    splits = list(results[0]["splits"])
    figure, axes = new_figure(4.5, 3.2, len(splits))
    for axis, split in zip(axes[0], splits):
        runs = by_run((result["path"], result["splits"][split]["rollouts"]["histogram"]) for result in results)
        for i, (run, seeds) in enumerate(runs.items()):
            x = [k + (i - (len(runs) - 1) / 2) * 0.8 / len(runs) for k in range(len(seeds[0]))]
            shade = 0.3 + 0.5 * i / max(1, len(runs) - 1)
            axis.bar(x, [statistics.mean(column) for column in zip(*seeds)], width=0.8 / len(runs), label=run, color=str(shade))
            for bars in seeds if len(seeds) > 1 else ():
                axis.plot(x, bars, "k.", markersize=3)
        axis.set_title({"id": "in distribution", "ood": "out of distribution"}.get(split, split))
        axis.set_xlabel(f"right rollouts of {len(seeds[0]) - 1}")
    axes[0][0].set_ylabel("share of problems")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def read_curve(path):
    """(rewards, [(step, held-out accuracy)]) of a CSV file that grpo.py wrote."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return ([float(row["reward"]) for row in rows],
                [(int(row["step"]), float(row["val_accuracy"])) for row in rows if row["val_accuracy"]])
    except (OSError, KeyError, ValueError):
        raise data.InputError(f"{path}: not a CSV file that grpo.py wrote") from None


def plot_curves(paths, path):
    """Reward against step. Each seed is a thin line (mean of 10 steps), the seeds of one run a band with their mean in it.

    A single run also shows its greedy accuracy on held-out problems."""
    figure, axes = new_figure(6, 3.4)
    axis, runs = axes[0][0], by_run((name, read_curve(name)) for name in paths)
    for i, (run, seeds) in enumerate(runs.items()):
        shade, style = str(0.55 * i / max(1, len(runs) - 1)), ("-", "--", ":")[i % 3]
        curves = [[statistics.mean(rewards[max(0, k - 9):k + 1]) for k in range(len(rewards))] for rewards, _ in seeds]
        steps = range(1, min(map(len, curves)) + 1)
        columns = list(zip(*curves))  # one for each step that all seeds have reached
        for curve in curves if len(seeds) > 1 else ():
            axis.plot(range(1, len(curve) + 1), curve, color=shade, linewidth=0.4)
        axis.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=shade, alpha=0.15, linewidth=0)
        label = f"{run}: reward" + (f", {len(seeds)} seeds" if len(seeds) > 1 else "") + " (mean of 10 steps)"
        axis.plot(steps, list(map(statistics.mean, columns)), style, color=shade, linewidth=2, label=label)
        if len(paths) == 1:
            axis.plot(range(1, len(seeds[0][0]) + 1), seeds[0][0], color=shade, linewidth=0.5, alpha=0.5)
            axis.plot(*zip(*seeds[0][1]), "o--", color="0.4", markersize=4, label=f"{run}: greedy accuracy, held-out problems")
    axis.set_xlabel("GRPO step")
    axis.set_ylabel("share right")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------- many seeds: one line a cell, and the report
COLUMNS = ("method", "seed", "stage", "split", "ops", "n", "correct")


def cells(policy, name, splits, scores):
    """The rows of results.csv for one checkpoint. What made it is read from the checkpoint itself."""
    info, stage = policy.info or {}, "sft"
    if info.get("stage") == "grpo":
        info, stage = info.get("base") or {}, "rl"
    made = policy.info or {}
    for split, problems in splits.items():
        ops = [p.ops for p in problems]
        cell = dict(split=split, ops=f"{min(ops)}-{max(ops)}", n=len(problems))
        yield dict(cell, method=info.get("method", run_of(name)), seed=made.get("seed", 0), stage=stage, correct=scores[split]["correct"])
        yield dict(cell, method="majority", seed=made.get("seed", 0), stage="", correct=round(scores[split]["majority"] * len(problems)))


def read_results(path):
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return [row | {name: int(row[name]) for name in ("seed", "n", "correct")} for row in rows]
    except (OSError, KeyError, ValueError, TypeError):
        raise data.InputError(f"{path}: not a file that --results wrote (columns {', '.join(COLUMNS)})") from None


def write_results(path, new):
    """Put rows into results.csv: a cell that is there already is replaced, all others stay."""
    key = lambda row: tuple(str(row[name]) for name in COLUMNS[:5])
    rows = {key(row): row for row in [*(read_results(path) if os.path.exists(path) else ()), *new]}
    with open(path + ".partial", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(rows.items()))
    os.replace(path + ".partial", path)


def report(path):
    """results.csv as a table: accuracy by method, stage and split, and the difference of what RL gains, over seeds."""
    accuracy = {}  # (split, method, stage) -> {seed: accuracy}
    for row in read_results(path):
        accuracy.setdefault((row["split"], row["method"], row["stage"]), {})[row["seed"]] = row["correct"] / row["n"]
    show = lambda values, sign="": "{:{s}.1%} [{:{s}.1%}, {:{s}.1%}]".format(*t_interval(list(values)), s=sign)
    lines = ["| split | method | seeds | SFT | RL | gain | majority |", "|---|---|---|---|---|---|---|"]
    gains = {}
    for split, method in dict.fromkeys((s, m) for s, m, stage in accuracy if stage == "rl"):
        sft, rl = accuracy.get((split, method, "sft"), {}), accuracy[split, method, "rl"]
        seeds = sorted(sft.keys() & rl.keys())
        if not seeds:
            continue
        gains[split, method] = {seed: rl[seed] - sft[seed] for seed in seeds}
        often = statistics.mean(accuracy.get((split, "majority", ""), {0: math.nan}).values())
        lines.append(f"| {split} | {method} | {len(seeds)} | {show(sft[s] for s in seeds)} | {show(rl[s] for s in seeds)} | "
                     f"{show(gains[split, method].values(), '+')} | {often:.1%} |")
    for split in dict.fromkeys(split for split, _ in gains):
        if {(split, "vanilla"), (split, "bridge")} <= gains.keys():
            plain, bridge = gains[split, "vanilla"], gains[split, "bridge"]
            paired = sorted(plain.keys() & bridge.keys())
            if not paired:
                continue
            after = {method: [accuracy[split, method, "rl"][s] for s in paired] for method in ("vanilla", "bridge")}
            lines += ["", f"{split}, paired over {len(paired)} seeds: gain of bridge - gain of vanilla "
                          f"{show((bridge[s] - plain[s] for s in paired), '+')}; accuracy after RL, bridge - vanilla "
                          f"{show((b - a for a, b in zip(*after.values())), '+')}, bridge / vanilla "
                          f"{statistics.mean(after['bridge']) / statistics.mean(after['vanilla']):.2f}"]
    return "\n".join(lines)


def table(results):
    """One row a checkpoint and split."""
    rows = [("checkpoint", "split", "accuracy", "95% interval", "majority", "format", "cut", "tokens")]
    for result in results:
        for split, s in result["splits"].items():
            rows.append((result["path"], split, f"{s['accuracy']:.1%}", f"{s['ci95'][0]:.1%} - {s['ci95'][1]:.1%}", f"{s['majority']:.1%}",
                         f"{s['format_rate']:.1%}", f"{s['cut_rate']:.1%}", f"{s['mean_tokens']:.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", nargs="+", help="checkpoints, one row each; default: sft.pt, else the tiny base")
    add("--data", nargs="+", help="JSONL files; default: fresh held-out problems in (id) and out of (ood) distribution")
    data.add_problem_flags(parser)
    add("--ood", type=int, nargs=2, metavar=("LO", "HI"), help="what is harder in the ood split: igsm, operations (default: up to 3 more); promptbench, redundancy (20 22)")
    add("--n", type=int, default=300, help="fresh problems a split")
    add("--max-new-tokens", type=int, default=512)
    add("--samples", type=int, default=0, help="also k rollouts a problem at temperature 1")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write all figures there")
    add("--plot", metavar="FILE.png", help="draw the rollout-accuracy histogram (needs --samples and matplotlib)")
    add("--curves", nargs="+", metavar="FILE.csv", help="draw these training logs into --plot and stop; NAME-1.csv, NAME-2.csv ... are seeds of one run")
    add("--results", metavar="FILE.csv", help="put one row a checkpoint and split into this file")
    add("--report", metavar="FILE.csv", help="print such a file as a table over seeds and stop")
    args = parser.parse_args()
    options = data.problem_options(args)
    if args.n < 1 or args.max_new_tokens < 1 or args.samples < 0:
        raise data.InputError("--n and --max-new-tokens must be at least 1, --samples at least 0")
    if args.plot and not args.samples and not args.curves:
        raise data.InputError("--plot draws rollouts: give --samples 8 as well")
    if args.plot and importlib.util.find_spec("matplotlib") is None:  # said before hours of measuring, not after
        raise data.InputError("--plot: drawing needs matplotlib; pip install matplotlib")
    if args.curves and not args.plot:
        raise data.InputError("--curves needs --plot FILE.png to draw into")
    for path in filter(None, (args.json, args.plot, args.results)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise data.InputError(f"{path}: its folder does not exist")
    if args.curves:
        return plot_curves(args.curves, args.plot)
    if args.report:
        return print(report(args.report))
    if args.results and args.task != "igsm":
        raise data.InputError("--results: only igsm problems have operations to report")
    if args.data:
        splits = {path: data.read_problems(path) for path in args.data}
    else:
        if args.task == "igsm":
            ood = args.ood or (data.TINY_OOD if args.ops is None else [min(30, options["ops"][1] + more) for more in (1, 3)])
            harder = options | {"ops": tuple(ood)}
        else:
            harder = options | {"redundancy": tuple(args.ood or (20, 22))}
        splits = {name: list(itertools.islice(data.generate(seed=args.seed, split="test", **chosen), args.n))
                  for name, chosen in (("id", options), ("ood", harder))}
    names = [sample.default_checkpoint(name) for name in args.ckpt or [None]]
    results = []
    for name in names:
        policy = sample.load_policy(name)
        scores = {split: measure(policy, problems, args) for split, problems in splits.items()}
        results.append({"path": name, "splits": scores})
        if args.results:
            write_results(args.results, cells(policy, name, splits, scores))
        if len(results) == 1:
            print(sample.describe(policy))
    print(table(results))
    for result in results:
        for split, s in result["splits"].items():
            if "behaviors" in s:
                b = s["behaviors"]
                print(f"{result['path']} {split}: a response has {b['steps']:.1f} sound steps, {b['reflections']:.2f} reflections, {b['analyses']:.2f} analyses, "
                      f"{b['subgoals']:.2f} subgoal chains; first fault: " + (", ".join(f"{k} {v}" for k, v in b["first_fault"].items()) or "none"))
            if "rollouts" in s:
                h = s["rollouts"]["histogram"]
                passes = ", ".join(f"pass@{k} {share:.1%}" for k, share in s["rollouts"]["pass_at"].items())
                print(f"{result['path']} {split}: of {args.samples} rollouts at temperature 1, none right {h[0]:.1%}, some {1 - h[0] - h[-1]:.1%}, "
                      f"all {h[-1]:.1%}; {passes}")
    comparisons = [dict(before=a["path"], after=b["path"], split=split, p=mcnemar(a["splits"][split]["hits"], b["splits"][split]["hits"]))
                   for a, b in itertools.combinations(results, 2) for split in splits]
    for c in comparisons:
        print(f"{c['before']} -> {c['after']}, {c['split']}: McNemar's exact test on the same problems, p = {c['p']:.2g}")
    if args.json:
        partial = args.json + ".partial"
        with open(partial, "w") as file:
            json.dump({"checkpoints": results, "mcnemar": comparisons}, file)
        os.replace(partial, args.json)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    data.run_cli(main)
