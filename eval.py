"""Chapter 6. Evaluation: how often is the policy right, and how sure can we be?

    python eval.py --ckpt sft.pt grpo.pt                    # greedy accuracy, in distribution and on harder problems
    python eval.py --ckpt sft.pt grpo.pt --samples 8 --plot rollouts.png --json scores.json
    python eval.py --ckpt sft.pt grpo.pt --data test.jsonl
    python eval.py --curves grpo.csv --plot reward.png      # the training log as a figure

Accuracy is exact match of the boxed integer, greedy, on held-out problems (a hash of the text keeps them apart from
everything trained on). Beside every accuracy stand its 95% interval and the score of a policy that always gives the
most frequent answer: iGSM's answers are so skewed that this alone can look like a trained model.

With --samples k, k rollouts of each problem at temperature 1 show what GRPO will find: the shares of problems where
all rollouts fail, some succeed, or all succeed. Only the middle ones carry a gradient.
"""
import argparse, csv, itertools, json, math, os
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
              "format_rate": greedy["format_rate"], "cut_rate": greedy["cut_rate"], "mean_tokens": greedy["mean_tokens"]}
    if all(p.nodes for p in problems):
        scores["behaviors"] = behaviors(problems, greedy["texts"])
    if args.samples:
        prompts = [sample.encode_prompt(policy.tokenizer, p.question) for p in problems]
        groups = sample.generate(policy, prompts, args.samples, args.max_new_tokens, 1.0, args.seed)
        right = [sum(data.reward(sample.decode(policy.tokenizer, r.tokens), p.answer) for r in group) for p, group in zip(problems, groups)]
        histogram = Counter(map(int, right))
        scores["rollouts"] = {"samples": args.samples, "mean": sum(right) / len(right) / args.samples,
                              "histogram": [histogram[k] / len(right) for k in range(args.samples + 1)]}
    return scores


def plot(results, path):
    """Rollout accuracy per problem, one panel a split, one row of bars a checkpoint."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    splits = list(results[0]["splits"])
    figure, axes = plt.subplots(1, len(splits), figsize=(4.5 * len(splits), 3.2), sharey=True, squeeze=False)
    for axis, split in zip(axes[0], splits):
        for i, result in enumerate(results):
            bars = result["splits"][split]["rollouts"]["histogram"]
            x = [k + (i - (len(results) - 1) / 2) * 0.8 / len(results) for k in range(len(bars))]
            axis.bar(x, bars, width=0.8 / len(results), label=result["path"], color=str(0.15 + 0.6 * i / max(1, len(results) - 1)))
        axis.set_title({"id": "in distribution", "ood": "out of distribution"}.get(split, split))
        axis.set_xlabel(f"right rollouts of {len(bars) - 1}")
    axes[0][0].set_ylabel("share of problems")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_curves(paths, path):
    """Reward and held-out accuracy against step, from the CSV files that grpo.py writes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for i, name in enumerate(paths):
        try:
            with open(name, newline="") as file:
                rows = list(csv.DictReader(file))
            steps, rewards = [int(row["step"]) for row in rows], [float(row["reward"]) for row in rows]
            tests = [(int(row["step"]), float(row["val_accuracy"])) for row in rows if row["val_accuracy"]]
        except (OSError, KeyError, ValueError):
            raise data.InputError(f"{name}: not a CSV file that grpo.py wrote") from None
        shade, label = str(0.6 * i / max(1, len(paths) - 1)), os.path.splitext(os.path.basename(name))[0]
        smooth = [sum(rewards[max(0, k - 9):k + 1]) / len(rewards[max(0, k - 9):k + 1]) for k in range(len(rewards))]
        axis.plot(steps, rewards, color=shade, linewidth=0.5, alpha=0.5)
        axis.plot(steps, smooth, color=shade, linewidth=2, label=f"{label}: reward of the rollouts (mean of 10 steps)")
        axis.plot(*zip(*tests), color=shade, marker="o", linestyle="--", markersize=4, label=f"{label}: greedy accuracy, held-out problems")
    axis.set_xlabel("GRPO step")
    axis.set_ylabel("share right")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


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
    add("--curves", nargs="+", metavar="FILE.csv", help="draw these training logs into --plot and stop")
    args = parser.parse_args()
    options = data.problem_options(args)
    if args.n < 1 or args.max_new_tokens < 1 or args.samples < 0:
        raise data.InputError("--n and --max-new-tokens must be at least 1, --samples at least 0")
    if args.plot and not args.samples and not args.curves:
        raise data.InputError("--plot draws rollouts: give --samples 8 as well")
    if args.curves and not args.plot:
        raise data.InputError("--curves needs --plot FILE.png to draw into")
    for path in filter(None, (args.json, args.plot)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise data.InputError(f"{path}: its folder does not exist")
    if args.curves:
        return plot_curves(args.curves, args.plot)
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
        results.append({"path": name, "splits": {split: measure(policy, problems, args) for split, problems in splits.items()}})
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
                print(f"{result['path']} {split}: of {args.samples} rollouts at temperature 1, none right {h[0]:.1%}, some {1 - h[0] - h[-1]:.1%}, all {h[-1]:.1%}")
    if args.json:
        partial = args.json + ".partial"
        with open(partial, "w") as file:
            json.dump({"checkpoints": results}, file, indent=1)
        os.replace(partial, args.json)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    data.run_cli(main)
