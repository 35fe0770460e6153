"""One GRPO step beside TRL's, which samples with transformers' generate; equal settings, in turns in one process.

    python tests/bench_step.py [--ckpt sft.pt] [--steps 8] [--out results/benchmarks.md]

Needs trl, datasets and accelerate. Both start from the same policy, at the tiny default's settings: 16 problems x
8 rollouts, at most 400 new tokens, beta 1e-3, fp32. TRL runs from what `grpo.py --hand-over` wrote; after each of
its steps one of ours is timed, once with flat groups (as TRL does) and once without them (our default). The first
two steps warm up; each side learns on its own, so that lengths drift alike. Ratios of one run count.
"""
import argparse, copy, datetime, itertools, os, statistics, sys, tempfile, time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import torch
from transformers import TrainerCallback

import bench_gpu, bench_logprob, data, grpo, sample, sft

WARMUP = 2


class Ours:
    """grpo.py's steps, one at a time."""
    def __init__(self, ckpt, steps, *words):
        self.policy = sample.load_policy(ckpt)
        self.args, options = bench_gpu.grpo_args(self.policy, "--steps", str(steps), *words)
        self.problems = data.generate(seed=self.args.seed + 1_000_000, **options)
        self.reference = copy.deepcopy(self.policy.model).requires_grad_(False)
        self.optimizer = sft.Optimizer(self.policy.model, self.args.lr, self.args.weight_decay)
        self.number, self.seconds, self.tokens = 0, [], []

    def step(self):
        self.number += 1
        some = list(itertools.islice(self.problems, self.args.prompts))
        start = time.perf_counter()
        _, row = grpo.take_step(self.policy, self.reference, self.optimizer, some, self.number, None, self.args)
        self.seconds.append(time.perf_counter() - start)
        self.tokens.append(row["mean_tokens"])


class Turns(TrainerCallback):
    """Times each step of TRL's trainer, and lets the others take theirs between two of them."""
    def __init__(self, others):
        self.others, self.seconds = others, []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)
        for other in self.others:
            other.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="sft.pt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", help="append the table to this file")
    args = parser.parse_args()
    from trl import GRPOTrainer
    from trl.scripts import grpo as command
    steps = str(args.steps + WARMUP)
    ours = [Ours(args.ckpt, steps, "--no-drop-flat"), Ours(args.ckpt, steps)]
    turns, out = Turns(ours), os.path.abspath(args.out) if args.out else None
    with tempfile.TemporaryDirectory() as folder:
        policy = sample.load_policy(args.ckpt)
        handed, options = bench_gpu.grpo_args(policy, "--steps", steps, "--hand-over", f"{folder}/run")
        problems = data.generate(seed=handed.seed + 1_000_000, **options)
        grpo.hand_over(policy, list(itertools.islice(problems, int(steps) * handed.prompts)), handed)
        os.chdir(f"{folder}/run")
        init = GRPOTrainer.__init__

        def with_turns(self, *words, **named):
            init(self, *words, **named)
            self.add_callback(turns)

        GRPOTrainer.__init__ = with_turns
        cpu = ["--use_cpu", "true"] if ours[0].policy.device.type == "cpu" else []
        command.main(*command.make_parser().parse_args_and_config(["--config", "trl-grpo.yaml", *cpu]))
        os.chdir("/")
    trl = turns.seconds[WARMUP:]
    lines = [f"## One GRPO step beside TRL ({bench_logprob.machine(ours[0].policy.device.type)}, "
             f"torch {torch.__version__}, {datetime.date.today()})", "",
             f"Medians of {len(trl)} steps after {WARMUP}; `python tests/bench_step.py --ckpt sft.pt`.", "",
             "| who | seconds a step | TRL's time / this one | tokens a rollout |", "|---|---|---|---|",
             f"| TRL, transformers' generate | {statistics.median(trl):.2f} | 1 | |"]
    for name, one in zip(("ours, flat groups too", "ours, the tiny default: without them"), ours):
        seconds = one.seconds[WARMUP:]
        ratio = statistics.median(a / b for a, b in zip(trl, seconds))
        lines.append(f"| {name} | {statistics.median(seconds):.2f} | {ratio:.1f} | {statistics.median(one.tokens):.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        with open(out, "a") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
