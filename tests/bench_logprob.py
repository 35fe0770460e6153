"""The log-prob kernel beside its peers: time, memory and error. K1 and K2 need a CUDA GPU; C1 and C2 run on a CPU.

    python tests/bench_logprob.py [--only K1 K2 C1 C2] [--write]

K1  logits -> log-prob, bf16, CUDA
K2  hidden states -> log-prob, bf16, CUDA
C1  logits -> log-prob, fp32, CPU
C2  hidden states -> log-prob, fp32, CPU

What is differentiated: "logprob" sum_t g_t logprob_t with a different g for every token; "entropy" that + sum_t h_t entropy_t;
"sum" all g equal (SFT), the only thing that Liger computes. ours computes the entropy in all but "sum", the others where asked.
Each version's gradients are checked against fp64 on 64 tokens before its time is taken; then the versions take turns, and the
median is printed. GB/s: the logits read twice and their gradient written once, beside a copy of the logits in the same run; error:
of the gradients, relative to the largest entry; peak memory: on top of the inputs, gradients included. --write puts the tables into results/benchmarks.md, each in place of its own last one.
"""
import argparse
import datetime
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks.md"
LIGER = importlib.util.find_spec("liger_kernel") is not None
LOGITS = ("K1", "C1")                                        # the others start from hidden states
SHAPES = {                                                   # (tokens, vocabulary) or (tokens, hidden, vocabulary)
    "K1": [(8192, 32768), (8192, 128256), (16384, 151936), (65536, 2048), (8192, 129921)],
    "K2": [(16384, 896, 151936), (16384, 1536, 151936), (65536, 512, 2048)],
    "C1": [(4096, 2048), (1024, 32768)],
    "C2": [(4096, 256, 32768)]}
TITLES = {case: re.search(rf"^{case}  (.*)$", __doc__, re.M)[1] for case in SHAPES}
ROUNDS = {"K1": 30, "K2": 30, "C1": 30, "C2": 5}             # C2: a round of all versions takes 15 s
WARMUP = {"K1": 5, "K2": 3, "C1": 3, "C2": 0}                # rounds not counted, after one more run of each for its memory
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # gross mistakes; the strict bounds are in tests/test_logprob.py


def log_softmax(logits, targets):
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0], None


def log_softmax_entropy(logits, targets, dtype=torch.float32):
    logp = torch.log_softmax(logits.to(dtype), -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def cross_entropy(logits, targets):
    return -F.cross_entropy(logits.float(), targets, reduction="none"), None


def versions(case):
    """[(name, what is differentiated, function)]; each function takes (logits, targets) or (hidden, weight, targets)."""
    if case in LOGITS:
        found = [("ours", "logprob", sample.logits_logprobs), ("ours", "entropy", sample.logits_logprobs)]
        head = lambda function: function
    else:
        found = [("ours, token_logprobs", "logprob", sample.token_logprobs), ("ours, token_logprobs", "entropy", sample.token_logprobs),
                 ("ours, sum_logprob", "sum", sample.sum_logprob)]
        head = lambda function: lambda hidden, weight, targets: function(hidden @ weight.T, targets)
    found += [("log_softmax + gather", "logprob", head(log_softmax)), ("log_softmax + gather", "entropy", head(log_softmax_entropy))]
    if case in LOGITS:
        compiled = [torch.compile(function, dynamic=False) for function in (log_softmax, log_softmax_entropy)]
        found += [("the same, torch.compile", "logprob", compiled[0]), ("the same, torch.compile", "entropy", compiled[1]),
                  ("F.cross_entropy", "logprob", cross_entropy)]
    if case.startswith("K") and LIGER:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
        loss, fused = LigerCrossEntropyLoss(reduction="sum"), LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found += [("Liger", "sum", lambda logits, targets: -loss(logits, targets))] if case == "K1" else \
            [("Liger", "sum", lambda hidden, weight, targets: -fused(weight, hidden, targets))]
    return found


def make_inputs(case, shape, device):
    """(logits | hidden, weight) as leaves that want a gradient, targets, and a different upstream gradient for every token."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    (N, V), H = (shape[0], shape[-1]), shape[1]
    leaves = [torch.randn(N, V, device=device, dtype=dtype)] if case in LOGITS else \
        [torch.randn(N, H, device=device, dtype=dtype), torch.randn(V, H, device=device, dtype=dtype).mul_(H ** -0.5)]
    upstream = torch.randn(2, N, device=device)
    return [leaf.requires_grad_() for leaf in leaves], torch.randint(V, (N,), device=device), upstream


def objective(function, kind, leaves, targets, upstream):
    """The scalar to differentiate, see the top of this file."""
    result = function(*leaves, targets)
    if kind == "sum":
        return result
    logprob, entropy = result
    return (logprob * upstream[0]).sum() + ((entropy * upstream[1]).sum() if kind == "entropy" else 0)


def run(function, kind, leaves, targets, upstream, backward=True):
    for leaf in leaves:
        leaf.grad = None
    with torch.set_grad_enabled(backward):
        loss = objective(function, kind, leaves, targets, upstream)
    if backward:
        loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()


def error(function, kind, leaves, targets, upstream):
    """Largest error of the gradients against fp64 on the first 64 tokens, relative to the largest entry."""
    def exact(*tensors):                                     # (logits, targets) or (hidden, weight, targets)
        logits = tensors[0] if len(tensors) == 2 else tensors[0] @ tensors[1].T
        logprob, entropy = log_softmax_entropy(logits, tensors[-1], torch.float64)
        return logprob.sum() if kind == "sum" else (logprob, entropy)
    ours = [leaf.detach().clone().requires_grad_() for leaf in (leaves[0][:64], *leaves[1:])]
    theirs = [leaf.detach().double().requires_grad_() for leaf in ours]
    objective(function, kind, ours, targets[:64], upstream[:, :64]).backward()
    objective(exact, kind, theirs, targets[:64], upstream[:, :64].double()).backward()
    return max(((a.grad - b.grad).abs().max() / b.grad.abs().max()).item() for a, b in zip(ours, theirs))


def resident(word):
    """VmRSS, the memory this process holds, or VmHWM, the most it has held, in bytes (Linux)."""
    return 1024 * int(re.search(rf"{word}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_memory(kind, function, inputs):
    """Bytes that one forward + backward needs on top of its inputs, the gradients included."""
    for leaf in inputs[0]:
        leaf.grad = None
    if inputs[1].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(function, kind, *inputs)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")            # VmHWM starts again at VmRSS
    run(function, kind, *inputs)
    return resident("VmHWM") - before


def peak_memory_alone(case, shape, number):
    """The same in a fresh process on the CPU: here, memory that an earlier version has freed would be used again unseen."""
    command = [sys.executable, __file__, "--peak", case, str(SHAPES[case].index(shape)), str(number)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def copy_bandwidth(tensor):
    """Bytes a second, read and written, of tensor.clone() into memory that is there already."""
    target, seconds = torch.empty_like(tensor), []
    for _ in range(40):
        start = time.perf_counter()
        target.copy_(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * tensor.nbytes / statistics.median(seconds[10:])


def race(case, runs):
    """[function] -> [median seconds]. Every round runs each once, starting with another one each time."""
    seconds = [[] for _ in runs]
    for round in range(WARMUP[case] + ROUNDS[case]):
        for i in range(len(runs)):
            number = (i + round) % len(runs)
            start = time.perf_counter()
            runs[number]()
            if round >= WARMUP[case]:
                seconds[number].append(time.perf_counter() - start)
    return [statistics.median(values) for values in seconds]


def table(case, device):
    """The lines of one case's table."""
    header = ["shape", "version", "differentiated", *["forward ms"] * (case in LOGITS), "forward + backward ms", "x ours",
              *["GB/s (share of a copy)"] * (case in LOGITS), *["peak memory MB"] * (case != "C1"), "error"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for shape in SHAPES[case]:
        torch._dynamo.reset()                                # or torch.compile gives up after the eighth shape, silently
        inputs, rows = make_inputs(case, shape, device), []
        for number, (name, kind, function) in enumerate(versions(case)):
            try:
                wrong = error(function, kind, *inputs)
                assert wrong <= LARGEST_ERROR[inputs[0][0].dtype], f"{case} {shape} {name}: error {wrong:.1e}"
                run(function, kind, *inputs)                 # compilers and allocators warm up
                memory = (peak_memory(kind, function, inputs) if device == "cuda" else
                          peak_memory_alone(case, shape, number) if case == "C2" else 0)
            except Exception as problem:                     # a peer that runs out of memory, or finds no compiler, loses its row
                if name.startswith("ours") or isinstance(problem, AssertionError):
                    raise
                print(f"{case} {shape} {name} ({kind}): left out, {str(problem).splitlines()[0]}")
                continue
            rows.append((name, kind, function, memory, wrong))
        both = race(case, [lambda k=kind, f=function: run(f, k, *inputs) for _, kind, function, _, _ in rows])
        if case in LOGITS:
            forward = race(case, [lambda k=kind, f=function: run(f, k, *inputs, backward=False) for _, kind, function, _, _ in rows])
            copy, size = copy_bandwidth(inputs[0][0].detach()), inputs[0][0].nbytes
        for number, (name, kind, _, memory, wrong) in enumerate(rows):
            cells = [" x ".join(map(str, shape)), name, kind, f"{1000 * both[number]:.4g}", f"{both[number] / both[0]:.2f}"]
            cells += [f"{memory / 1e6:.0f}"] * (case != "C1") + [f"{wrong:.0e}"]
            if case in LOGITS:                               # the least traffic: logits read twice, gradient written once
                rate = 3 * size / both[number]
                cells[3:3] = [f"{1000 * forward[number]:.4g}"]
                cells[6:6] = [f"{rate / 1e9:.3g} ({rate / copy:.0%})"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def write(case, text):
    """Put the section into results/benchmarks.md, in place of the case's last one."""
    old = RESULTS.read_text()
    kept = re.sub(rf"\n## Log-prob {case} .*?(?=\n## |\Z)", "", old, flags=re.DOTALL)
    RESULTS.write_text(kept.rstrip("\n") + "\n\n" + text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--write", action="store_true", help=f"write the tables into {RESULTS.parent.name}/{RESULTS.name}")
    parser.add_argument("--peak", nargs=3, metavar=("CASE", "SHAPE", "VERSION"), help="print the peak memory of one version on the CPU")
    args = parser.parse_args()
    if args.peak:
        case, shape, number = args.peak[0], SHAPES[args.peak[0]][int(args.peak[1])], int(args.peak[2])
        _, kind, function = versions(case)[number]
        run(function, kind, *make_inputs(case, (64,) + shape[1:], "cpu"))         # libraries load, threads start, compilers compile
        print(peak_memory(kind, function, make_inputs(case, shape, "cpu")))
        return
    for case in args.only:
        device = "cuda" if case.startswith("K") else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            print(f"{case} needs a CUDA GPU: skipped")
            continue
        if device == "cuda" and not LIGER:
            print(f"{case}: Liger is not installed (pip install liger-kernel), left out")
        title = f"## Log-prob {case} ({machine(device)}, PyTorch {torch.__version__}, {datetime.date.today()})"
        note = f"{TITLES[case]}; median of {ROUNDS[case]} rounds. The top of tests/bench_logprob.py says what the columns mean."
        text = "\n".join([title, "", note, "", *table(case, device)]) + "\n"
        print(text)
        if args.write:
            write(case, text)


if __name__ == "__main__":
    main()
