"""Problems per second: ours by operations and workers, and beside the released generator where its folder is given.

    python tests/bench_data.py [--released PATH/iGSM-reasoning] [--seconds 4] [--out results/benchmarks.md]

Accepted problems with injected answers, one core unless said otherwise; rounds of both are interleaved and the median
of five is printed, since machines are noisy and only a ratio counts."""
import argparse
import datetime
import itertools
import os
import platform
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import inject


def ours(ops, workers=1, injected=True):
    rejected = Counter()
    for problem in data.generate(ops=ops, split=None, workers=workers, rejected=rejected, seed=next(SEEDS)):
        if injected:
            inject.inject(problem, problem.response, rng=Random(0))
        yield rejected


def released(ops):
    from igsm_reasoning.generation import ProblemGenerator
    generator = ProblemGenerator({
        "max_operations": ops[1], "min_operations": ops[0], "force": False, "calculate_mod": False, "rng_range": 10, "debug": False,
        "reflection_prob": 0.1, "analysis_prob_list": [0, 0.1, 0.4, 0.8, 1, 1, 1, 1, 1, 1, 1], "shuffle_query": True,
        "redundant_query": True, "detailed_computation": True, "content_mask": False, "dataset_size": 10**9}, seed=100)
    while True:
        if generator.draw_question():
            generator.generate_question(), generator.generate_cot_answer()
            if abs(generator.Gd.topo[-1].value) < 1000:
                yield None


SEEDS = itertools.count()


def rate(stream, seconds):
    next(stream)  # warm-up
    start, n = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        next(stream)
        n += 1
    stream.close()
    return n / passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--released", help="the folder iGSM-reasoning of the released code")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--out", help="append the table to this file")
    args = parser.parse_args()
    lines = [f"## Problems per second ({platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
             f"{datetime.date.today()})", "", "| what | accepted problems/s (median of 5) | ratio |", "|---|---|---|"]
    if args.released:
        sys.path.insert(0, args.released)
        pairs = [(rate(ours((15, 20)), args.seconds), rate(released((15, 20)), args.seconds)) for _ in range(5)]
        lines += [f"| ours, ops 15-20, injected | {statistics.median(a for a, _ in pairs):.0f} | "
                  f"{statistics.median(a / b for a, b in pairs):.2f} x released |",
                  f"| released generator, ops 15-20, injected | {statistics.median(b for _, b in pairs):.0f} | 1 |"]
    pairs = [(rate(ours((15, 20), 2, False), args.seconds), rate(ours((15, 20), 1, False), args.seconds)) for _ in range(5)]
    lines += [f"| ours, ops 15-20, plain answers, --workers 2 | {statistics.median(a for a, _ in pairs):.0f} | "
              f"{statistics.median(a / b for a, b in pairs):.2f} x one worker |"]
    for ops in (5, 10, 15, 20, 25):
        stream, rates = ours((ops, ops)), []
        rejected = next(stream)
        for _ in range(5):
            start = time.perf_counter()
            n = sum(1 for _ in itertools.takewhile(lambda _: time.perf_counter() - start < args.seconds / 4, stream))
            rates.append(n / (time.perf_counter() - start))
        lines += [f"| ours, ops {ops}, injected | {statistics.median(rates):.0f} | rejected: "
                  + ", ".join(f"{reason} {k}" for reason, k in rejected.most_common()) + " |"]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        with open(args.out, "a") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
