"""Chapter 6. Evaluation: how often is the policy right, and how sure can we be?

    python eval.py --ckpt sft.pt grpo.pt                    # accuracy, in distribution and on harder problems
    python eval.py --ckpt sft.pt grpo.pt --samples 8 --plot rollouts.png --json scores.json
    python eval.py --ckpt sft.pt grpo.pt --data test.jsonl
    python eval.py --curves grpo.csv --plot reward.png      # the training log as a figure
    python eval.py --ckpt sft.pt grpo.pt --results results.csv && python eval.py --report results.csv

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

Twenty minutes to read. Parts 1, 2 and 4 are the idea; the figures (3) and the command (5) can wait.
"""
import csv, importlib.util, itertools, json, math, os, re, statistics, sys
from collections import Counter, defaultdict

import data, sample


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
    return max(0.0, middle - half), min(1.0, middle + half)


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
    return counts | {"sound": sum(r.ok for r in reports) / len(reports),
                     "first_fault": dict(Counter(r.error.kind for r in reports if r.error).most_common())}


def measure_rollouts(policy, problems, max_new_tokens, samples, seed):
    """`samples` rollouts a problem at temperature 1. correct, process: of all rollouts; mean: share right;
    histogram[c]: the share of problems with c right rollouts, c = 0 ... samples."""
    prompts = [sample.encode_prompt(policy.tokenizer, p.question) for p in problems]
    groups = sample.generate(policy, prompts, samples, max_new_tokens, 1.0, seed)
    texts = [sample.decode(policy.tokenizer, rollout.tokens) for group in groups for rollout in group]
    asked = [p for p in problems for _ in range(samples)]  # the problem of each text
    hits = [data.reward(t, p.answer) == 1 for p, t in zip(asked, texts)]
    right = [sum(hits[i:i + samples]) for i in range(0, len(hits), samples)]  # for each problem
    tries = [k for k in sorted({1, 2, 4, 8, samples}) if k <= samples]
    return {"samples": samples, "correct": sum(hits), "process": process_verified(hits, check(asked, texts)),
            "mean": sum(hits) / len(hits),
            "histogram": [right.count(c) / len(right) for c in range(samples + 1)],
            "pass_at": {k: pass_at_k(right, samples, k) for k in tries}}


def measure(policy, problems, max_new_tokens=512, samples=0, seed=0):
    """All figures of one policy on one set of problems, as --json writes them.

    n, correct, process: counts (greedy; process is None where problems have no graph); hits: 0 or 1 for each
    problem; accuracy, ci95, majority, format_rate, cut_rate: shares; mean_tokens: tokens a response."""
    greedy = sample.greedy_accuracy(policy, problems, max_new_tokens)
    reports = check(problems, greedy["texts"])
    copied = ("n", "correct", "accuracy", "format_rate", "cut_rate", "mean_tokens")
    scores = {name: greedy[name] for name in copied} | {
        "process": process_verified(greedy["hits"], reports), "ci95": wilson(greedy["correct"], greedy["n"]),
        "majority": majority(problems), "hits": [int(hit) for hit in greedy["hits"]]}
    if reports:
        scores["behaviors"] = behaviors(reports)
    if samples:
        scores["rollouts"] = measure_rollouts(policy, problems, max_new_tokens, samples, seed)
    return scores


def compare(results):
    """McNemar's p for every two checkpoints, split by split."""
    return [{"before": a["path"], "after": b["path"], "split": split,
             "p": mcnemar(a["splits"][split]["hits"], b["splits"][split]["hits"])}
            for a, b in itertools.combinations(results, 2) for split in a["splits"]]


# ------------------------------------------------------------------------------------------------- 3. Figures
def run_of(name):
    """The run that a file belongs to, without its seed: "logs/bridge-rl-3.csv" -> "bridge-rl"."""
    return re.sub(r"-\d+$", "", os.path.splitext(os.path.basename(name))[0])


def by_run(pairs):
    """(file name, value) pairs -> {run: [values of its seeds]}, in order."""
    runs = defaultdict(list)
    for name, value in pairs:
        runs[run_of(name)].append(value)
    return runs


def new_figure(width, height, panels=1):
    """A figure and its panels, side by side."""
    from matplotlib.figure import Figure  # here, because nothing else needs matplotlib
    figure = Figure(figsize=(width * panels, height), layout="tight")
    return figure, figure.subplots(1, panels, sharey=True, squeeze=False)[0]


def save_figure(figure, path):
    """The name's ending decides the format: .png, .pdf, .svg."""
    with data.replacing(path, "wb") as file:
        figure.savefig(file, format=os.path.splitext(path)[1][1:] or None, dpi=150)


def draw_histograms(axis, runs):
    """Rollout accuracy per problem. The seeds of one run are one bar (their mean) with a dot for each."""
    width = 0.8 / len(runs)
    for i, (run, seeds) in enumerate(runs.items()):
        x = [right + (i - (len(runs) - 1) / 2) * width for right in range(len(seeds[0]))]
        shade = str(0.3 + 0.5 * i / max(1, len(runs) - 1))
        axis.bar(x, [statistics.mean(column) for column in zip(*seeds)], width=width, label=run, color=shade)
        if len(seeds) > 1:
            for histogram in seeds:
                axis.plot(x, histogram, "k.", markersize=3)
    axis.set_xlabel(f"right rollouts of {len(seeds[0]) - 1}")


def plot(results, path):
    """The histograms of all checkpoints, one panel a split."""
    splits = list(results[0]["splits"])
    figure, axes = new_figure(4.5, 3.2, len(splits))
    for axis, split in zip(axes, splits):
        histograms = [(r["path"], r["splits"][split]["rollouts"]["histogram"]) for r in results]
        draw_histograms(axis, by_run(histograms))
        axis.set_title({"id": "in distribution", "ood": "out of distribution"}.get(split, split))
    axes[0].set_ylabel("share of problems")
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def read_curve(path):
    """(rewards, steps with a held-out accuracy, those accuracies) of a CSV file that grpo.py wrote."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        held_out = [row for row in rows if row["val_accuracy"]]
        return ([float(row["reward"]) for row in rows], [int(row["step"]) for row in held_out],
                [float(row["val_accuracy"]) for row in held_out])
    except (OSError, KeyError, ValueError):
        raise data.InputError(f"{path}: not a CSV file that grpo.py wrote") from None


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


def plot_curves(paths, path):
    """Reward against step. A single log also shows its greedy accuracy on held-out problems."""
    figure, (axis,) = new_figure(6, 3.4)
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
    axis.set_ylabel("share right")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    save_figure(figure, path)


# ----------------------------------------------------------- 4. Many seeds: results.csv, and the report on it
KEY = ("task", "method", "seed", "stage", "split", "ops")  # names a row; ops: operations, promptbench: depth
COLUMNS = (*KEY, "n", "correct", "process")  # process: empty where no steps were checked


def origin(policy, name):
    """(method of the SFT answers, seed, stage) of a checkpoint, from the arguments that are kept in it."""
    info = policy.info or {}
    seed, stage = info.get("seed", 0), "rl" if info.get("stage") == "grpo" else "sft"
    while info.get("stage") == "grpo":
        info = info.get("base") or {}
    if info.get("data"):  # the answers came from a file, and sft.py's --method says nothing about it
        return run_of(info["data"]), seed, stage
    return info.get("method", run_of(name)), seed, stage


def cells(policy, name, splits, scores):
    """The rows of results.csv for one checkpoint, each with the majority answer's beside it."""
    method, seed, stage = origin(policy, name)
    for split, problems in splits.items():
        score, n = scores[split], len(problems)
        sizes = [p.depth if p.task == "promptbench" else p.ops for p in problems]
        tasks = "+".join(sorted({p.task for p in problems}))
        row = dict(task=tasks, seed=seed, split=split, ops=f"{min(sizes)}-{max(sizes)}", n=n)
        yield row | dict(method=method, stage=stage, correct=score["correct"], process=score["process"])
        yield row | dict(method="majority", stage="", correct=round(score["majority"] * n), process=None)


def read_results(path):
    """The rows of results.csv. Older files have no column task (then igsm) and no process (then None)."""
    try:
        with open(path, newline="") as file:
            rows = [{"task": "igsm", "process": ""} | row for row in csv.DictReader(file)]
        for row in rows:
            row |= {name: int(row[name]) for name in ("seed", "n", "correct")}
            row["process"] = int(row["process"]) if row["process"] else None
        return [{name: row[name] for name in COLUMNS} for row in rows]
    except (OSError, KeyError, ValueError, TypeError):
        columns = ", ".join(COLUMNS)
        raise data.InputError(f"{path}: not a file that --results wrote (columns {columns})") from None


def write_results(path, new):
    """Put rows into results.csv: a cell that is there already is replaced, all others stay."""
    old = read_results(path) if os.path.exists(path) else []
    rows = {tuple(str(row[name]) for name in KEY): row for row in [*old, *new]}
    with data.replacing(path) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def shares(rows):
    """{(task, split): {(method, stage): {seed: share right}}}; stage "process": process-verified after RL."""
    found = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cell = found[row["task"], row["split"]]
        cell[row["method"], row["stage"]][row["seed"]] = row["correct"] / row["n"]
        if row["stage"] == "rl" and row["process"] is not None:
            cell[row["method"], "process"][row["seed"]] = row["process"] / row["n"]
    return found


def minus(a, b):
    """Paired differences: {seed: value} - {seed: value} for the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def percent(values, seeds, sign=""):
    """Mean and t-interval of {seed: value} over `seeds`, as text; sign "+" writes a plus before a gain."""
    if any(seed not in values for seed in seeds):  # rows from before process was counted
        return "not counted"
    mean, low, high = t_interval([values[seed] for seed in seeds])
    return f"{mean:{sign}.1%} [{low:{sign}.1%}, {high:{sign}.1%}]"


def report(path):
    """results.csv as a table of means over seeds, then bridge against vanilla. Only paired seeds count: those
    with both stages in the table, those with both methods in the comparison."""
    lines = ["| task | split | method | seeds | SFT | RL | gain | process-verified after RL | majority |",
             "|---|---|---|---|---|---|---|---|---|"]
    comparisons = []
    for (task, split), cell in sorted(shares(read_results(path)).items()):
        guess = statistics.mean(cell["majority", ""].values() or [math.nan])
        for method in sorted({method for method, stage in cell if stage == "rl"}):
            gain = cell[method, "gain"] = minus(cell[method, "rl"], cell[method, "sft"])
            if gain:
                sft, rl, process = (percent(cell[method, stage], gain) for stage in ("sft", "rl", "process"))
                lines.append(f"| {task} | {split} | {method} | {len(gain)} | {sft} | {rl} | "
                             f"{percent(gain, gain, '+')} | {process} | {guess:.1%} |")
        seeds = minus(cell["bridge", "gain"], cell["vanilla", "gain"]).keys()
        if seeds:
            gain, rl, process = (percent(minus(cell["bridge", stage], cell["vanilla", stage]), seeds, "+")
                                 for stage in ("gain", "rl", "process"))
            ratio = sum(cell["bridge", "rl"][s] for s in seeds) / sum(cell["vanilla", "rl"][s] for s in seeds)
            comparisons += ["", f"{task} {split}, paired over {len(seeds)} seeds: "
                                f"gain of bridge - gain of vanilla {gain}; "
                                f"accuracy after RL, bridge - vanilla {rl}, bridge / vanilla {ratio:.2f}; "
                                f"process-verified after RL, bridge - vanilla {process}"]
    return "\n".join(lines + comparisons)


# ------------------------------------------------------------------------------------------------- 5. Command
def read_arguments():
    """The command line, with what can be checked before hours of measuring."""
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", help="checkpoints, one row each; default: sft.pt, else the tiny base")
    add("--data", nargs="+", help="JSONL files; default: fresh ones, in (id) and out of (ood) distribution")
    data.add_problem_flags(parser)
    add("--ood", type=data.natural, nargs=2, metavar=("LO", "HI"),
        help="what is harder out of distribution: igsm, operations (default: up to 3 more); "
             "promptbench, redundancy (default: 20 22)")
    add("--n", type=data.positive_int, default=300, help="fresh problems a split")
    add("--max-new-tokens", type=data.positive_int, default=512, help="longer responses are cut")
    add("--samples", type=data.natural, default=0, help="also k rollouts a problem at temperature 1")
    add("--seed", type=data.natural, default=0, help="of the fresh problems and the rollouts")
    add("--json", metavar="FILE", help="write all figures there")
    add("--plot", metavar="FILE.png", help="draw the histogram of --samples, or --curves (needs matplotlib)")
    add("--curves", nargs="+", metavar="FILE.csv",
        help="draw these training logs into --plot and stop; NAME-1.csv, NAME-2.csv ... are seeds of one run")
    add("--results", metavar="FILE.csv", help="put one row a checkpoint and split into this file")
    add("--report", metavar="FILE.csv", help="print such a file as a table over seeds and stop")
    args = parser.parse_args()
    if args.plot and not args.samples and not args.curves:
        raise data.InputError("--plot draws rollouts: give --samples 8 as well")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise data.InputError("--plot: drawing needs matplotlib; pip install matplotlib")
    if args.curves and not args.plot:
        raise data.InputError("--curves needs --plot FILE.png to draw into")
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        raise data.InputError(f"--plot {args.plot}: must end in .png, .pdf or .svg")
    read = [*(args.ckpt or ()), *(args.data or ()), *(args.curves or ()), args.report]
    data.claim([("--json", args.json, (b'{"checkpoints"',)),
                ("--results", args.results, (b"task,", b"method,")),
                ("--plot", args.plot, (b"\x89PNG", b"%PDF", b"<?xml"))],
               [("a file to read", path) for path in read])
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
    options = data.problem_options(args)
    if args.data:
        return {path: read_file(path) for path in args.data}
    if args.task == "promptbench":
        harder = {"redundancy": args.ood or (20, 22)}
    elif args.ood or not args.ops:
        harder = {"ops": args.ood or data.TINY_OOD}
    else:
        harder = {"ops": [min(30, args.ops[1] + more) for more in (1, 3)]}  # data.py draws up to 30
    splits = {"id": options, "ood": options | harder}
    return {name: list(itertools.islice(data.generate(seed=args.seed, split="test", **chosen), args.n))
            for name, chosen in splits.items()}


def table(results):
    """One row a checkpoint and split."""
    rows = [("checkpoint", "split", "accuracy", "95% interval", "process", "majority", "format", "cut",
             "tokens")]
    for result in results:
        for split, s in result["splits"].items():
            low, high = s["ci95"]
            process = "-" if s["process"] is None else f"{s['process'] / s['n']:.1%}"
            rates = [f"{s[name]:.1%}" for name in ("majority", "format_rate", "cut_rate")]
            rows.append((result["path"], split, f"{s['accuracy']:.1%}", f"{low:.1%} - {high:.1%}", process,
                         *rates, f"{s['mean_tokens']:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    pad = [str.ljust] * 2 + [str.rjust] * 7  # names to the left, numbers to the right
    return "\n".join("  ".join(f(cell, w) for f, cell, w in zip(pad, row, widths)) for row in rows)


def details(scores):
    """Behaviors and rollouts, a sentence each."""
    if "behaviors" in scores:
        b = scores["behaviors"]
        faults = ", ".join(f"{kind} {times}" for kind, times in b["first_fault"].items()) or "none"
        yield (f"a response has {b['steps']:.1f} sound steps, {b['reflections']:.2f} reflections, "
               f"{b['analyses']:.2f} analyses, {b['subgoals']:.2f} subgoal chains; first fault: {faults}")
    if "rollouts" in scores:
        r = scores["rollouts"]
        none, every = r["histogram"][0], r["histogram"][-1]
        passes = ", ".join(f"pass@{k} {chance:.1%}" for k, chance in r["pass_at"].items())
        process = "" if r["process"] is None else f"; process {r['process'] / r['samples'] / scores['n']:.1%}"
        yield (f"of {r['samples']} rollouts at temperature 1, none right {none:.1%}, "
               f"some {1 - none - every:.1%}, all {every:.1%}; {passes}{process}")


def main():
    args = read_arguments()
    if args.curves:
        return plot_curves(args.curves, args.plot)
    if args.report:
        return print(report(args.report))
    splits = read_splits(args)
    results = []
    for name in [sample.default_checkpoint(name) for name in args.ckpt or [None]]:
        policy = sample.load_policy(name)
        if not results:
            print(sample.describe(policy))
        scores = {split: measure(policy, problems, args.max_new_tokens, args.samples, args.seed)
                  for split, problems in splits.items()}
        results.append({"path": name, "splits": scores})
        if args.results:
            write_results(args.results, cells(policy, name, splits, scores))
    print(table(results))
    for result in results:
        for split, scores in result["splits"].items():
            for sentence in details(scores):
                print(f"{result['path']} {split}: {sentence}")
    comparisons = compare(results)
    for c in comparisons:
        print(f"{c['before']} -> {c['after']}, {c['split']}: McNemar's exact test on the same problems, "
              f"p = {c['p']:.2g}")
    if args.json:
        with data.replacing(args.json) as file:
            json.dump({"checkpoints": results, "mcnemar": comparisons}, file)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    data.run_cli(main)
