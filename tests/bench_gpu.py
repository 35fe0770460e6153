"""Everything that needs a CUDA GPU, in one command of at most 25 minutes; the tables go into results/.

    python tests/bench_gpu.py [--only PART ...] [--minutes 25]

tests     the sampler's and the kernel's tests, among them the one of CUDA graphs, with Triton compiled
bf16      sampler against trainer against fp32: what rounding does to a log-prob
step      T1: one GRPO step of 32 x 32 rollouts, split into sample, score and train, and its memory against
          the prediction
logprob   K1, K2: the log-prob kernel beside torch, torch.compile and Liger (tests/bench_logprob.py)
sampler   S1, S2: the sampler beside Hugging Face generate (tests/bench_sampler.py)
main      the README's first command, its output and its time, in results/gpu-main.txt

`pip install liger-kernel` first, for its rows. Weights are random, in the shapes of real models: nothing is
downloaded. What the minutes do not suffice for is named and left out. On a machine without a GPU the parts
bf16 and step run on the tiny base: a check of this script, not a measurement.
"""
import argparse, copy, datetime, gc, itertools, os, re, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import torch

import bench_sampler, data, grpo, sample, sft

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "benchmarks.md"
PARTS = ("tests", "bf16", "step", "logprob", "sampler", "main")


def policy_of(shape):
    device = sample.default_device()
    if device.type == "cuda":
        return bench_sampler.random_policy(bench_sampler.SHAPES[shape](), device)
    return sample.load_policy(sample.TINY_BASE, dtype=torch.float32)


def grpo_args(policy, *words):
    """grpo.py's flags as it would have them for this policy."""
    parser = data.Parser("")
    grpo.add_flags(parser)
    args = parser.parse_args(words)
    options = data.problem_options(args)
    sft.fill_in(args, policy.model, grpo.PRESETS)
    return args, options


def bf16(shape="Qwen2.5-0.5B", prompts=16, n=8, new_tokens=256):
    """Log-probs of the same rollouts three times: by the sampler, by the trainer, by the trainer in fp32 -> rows."""
    policy = policy_of(shape)
    args, options = grpo_args(policy, "--max-new-tokens", str(new_tokens))
    problems = list(itertools.islice(data.generate(seed=1, **options), prompts))
    rollouts = grpo.roll_out(policy, problems, args, 1, n)
    exact = copy.deepcopy(policy.model).float()
    gaps = {"sampler - trainer": [], "trainer - fp32": [], "sampler - fp32": []}
    with torch.no_grad():
        for rows in grpo.pack(rollouts.examples, args.micro_tokens):
            batch = grpo.make_batch([rollouts.examples[row] for row in rows],
                                    [rollouts.logprobs[row] for row in rows],
                                    torch.zeros(len(rows)), policy.device)
            trainer, truth = batch.logprobs(policy.model, 1.0)[0], batch.logprobs(exact, 1.0)[0]
            for gap, (a, b) in zip(gaps.values(), ((batch.sampled, trainer), (trainer, truth),
                                                   (batch.sampled, truth))):
                gap.append((a - b)[batch.mask].abs())
    name = shape if policy.device.type == "cuda" else "tiny base, fp32, no GPU"
    lines = ["| model | log-probs of rollouts | mean gap, nats | largest |", "|---|---|---|---|"]
    for what, gap in gaps.items():
        gap = torch.cat(gap)
        lines.append(f"| {name}, {len(gap):,} tokens | {what} | {gap.mean():.1e} | {gap.max():.1e} |")
    return lines


def step(shape="Qwen2.5-1.5B", prompts=32, n=32, new_tokens=512, steps=3):
    """GRPO steps on the same problems of 15-20 operations; random weights never end an answer, so each has all
    its tokens -> rows: medians without the first step, which captures graphs."""
    policy = policy_of(shape)
    cuda = policy.device.type == "cuda"
    size = ("--ops", "15", "20") if cuda else ()
    args, options = grpo_args(policy, *size, "--prompts", str(prompts), "--n", str(n),
                              "--max-new-tokens", str(new_tokens), "--steps", str(steps))
    problems = list(itertools.islice(data.generate(seed=1, **options), prompts))
    longest = max(len(sample.encode_prompt(policy.tokenizer, problem.question)) for problem in problems)
    limit = grpo.sampler_rows(policy, args, longest)
    predicted = sum(grpo.memory(policy, args, longest, rows=limit).values())
    reference = copy.deepcopy(policy.model).requires_grad_(False)
    optimizer = sft.Optimizer(policy.model, args.lr, args.weight_decay)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rows = [grpo.take_step(policy, reference, optimizer, problems, number, limit, args)[1]
            for number in range(1, steps + 1)]
    sampled, scored, trained = (statistics.median(row[key] for row in rows[1:] or rows)
                                for key in ("s_sample", "s_score", "s_train"))
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else "not measured"
    return ["| shape, rollouts, new tokens | sample s | score s | train s | step s | peak memory | predicted |",
            "|---|---|---|---|---|---|---|",
            f"| {shape if cuda else 'tiny base, no GPU'}, {prompts} x {n}, {new_tokens} | {sampled:.2f} | "
            f"{scored:.2f} | {trained:.2f} | {sampled + scored + trained:.2f} | {peak} | "
            f"{predicted / 1e9:.1f} GB |"]


def command(words, seconds, folder=ROOT):
    """Run a command, its output passed on -> (seconds, output). Raises subprocess.TimeoutExpired."""
    start = time.time()
    process = subprocess.Popen(words, cwd=folder, text=True, shell=isinstance(words, str), start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a shell's children, too, which would keep the GPU
        print(process.communicate()[0][-4000:])
        raise
    print(output[-4000:])
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")
    return time.time() - start, output


def main_command(seconds):
    """The README's first command, without the installation, in a folder of its own."""
    first = re.search(r"^pip install .*? && (python .*)$", (ROOT / "README.md").read_text(), re.M)[1]
    with tempfile.TemporaryDirectory() as folder:
        took, output = command(re.sub(r"python (\w+\.py)", rf"{sys.executable} {ROOT}/\1", first), seconds, folder)
    (ROOT / "results" / "gpu-main.txt").write_text(output)
    return [f"`{first}`: {took / 60:.1f} min; [what it printed](gpu-main.txt)."]


def run_part(part, seconds):
    """One part -> lines for results/benchmarks.md; the two benchmarks write their own."""
    python = sys.executable
    if part == "bf16":
        return bf16()
    if part == "step":
        return step()
    if part == "main":
        return main_command(seconds)
    if part == "tests":
        _, output = command([python, "-m", "pytest", "-q", "tests/test_sample.py", "tests/test_logprob.py"], seconds)
        return [output.strip().splitlines()[-1]]
    if part == "logprob":
        command([python, "tests/bench_logprob.py", "--only", "K1", "K2", "--write"], seconds)
    if part == "sampler":
        command([python, "tests/bench_sampler.py", "--reps", "2", "--shapes", "Qwen2.5-0.5B", "Qwen2.5-1.5B",
                 "--sequences", "512", "--out", str(RESULTS)], seconds)
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=25)
    args = parser.parse_args()
    cuda, end, failed = torch.cuda.is_available(), time.time() + 60 * args.minutes, []
    machine = torch.cuda.get_device_name() if cuda else "no GPU"
    for part in args.only or (PARTS if cuda else ("bf16", "step")):
        try:
            lines = run_part(part, max(1.0, end - time.time()))
        except Exception as problem:  # whatever it is, the other parts go on
            failed.append(f"{part}: {sample.one_line(problem)}")
            continue
        finally:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()  # the next part may be another process
        if lines:
            text = "\n".join([f"## GPU: {part} ({machine}, PyTorch {torch.__version__}, {datetime.date.today()})", "",
                              *lines]) + "\n"
            print(text)
            if cuda:
                with open(RESULTS, "a") as file:
                    file.write("\n" + text)
    sys.exit("left out or failed: " + "; ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
