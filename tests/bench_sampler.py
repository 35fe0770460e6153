"""Tokens per second of the sampler beside Hugging Face's generate, and its share of the machine's limit on CUDA.

    python tests/bench_sampler.py [--reps 5] [--sequences 512 1024] [--out results/benchmarks.md]

CPU, and wherever it runs: the tiny base, 8 prompts of 64-200 tokens x 8 rollouts, and a shape in which our lead is smallest
(4 layers, 128 wide, 512 in the MLP, 4 heads and 4 key-value heads, 512 tokens in the vocabulary; prompts of 120). With a GPU also random weights in the shapes
of real models, prompts of 256 tokens: 1024 new ones for every row (fixed), or seeded lengths (ragged). Every row ends at its
own seeded length in every peer, whatever it draws; ragged throughput counts the tokens up to there. Peers take turns in one
process; before any timing, greedy tokens of both are compared. Ratios of one run count, absolute times do not."""
import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, StoppingCriteria

import sample
import sft

QWEN = dict(num_key_value_heads=2, max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
SHAPES = {
    "Qwen2.5-0.5B": lambda: Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                        num_attention_heads=14, tie_word_embeddings=True, **QWEN),
    "Qwen2.5-1.5B": lambda: Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                        num_attention_heads=12, tie_word_embeddings=True, **QWEN),
    "Qwen2.5-3B": lambda: Qwen2Config(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                                      num_attention_heads=16, tie_word_embeddings=True, **QWEN),
    "Llama-3.2-1B": lambda: LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                                        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
                                        tie_word_embeddings=True, rope_parameters={
                                            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                                            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})}


SMALL = Qwen2Config(vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True)


def random_policy(config, device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return sample.Policy(model, sft.tiny_tokenizer(), torch.device(device))


def draw_lengths(rows, mean, cap):
    """Lognormal lengths (sigma 0.7) with about this mean, 1 ... cap."""
    rng = Random(0)
    return [max(1, min(cap, round(rng.lognormvariate(0, 0.7) * mean / 1.278))) for _ in range(rows)]  # e^(0.7^2 / 2) = 1.278


def ours(policy, prompts, n, lengths, temperature=1.0):
    """generate(), with the end token put where the row's length is reached and nowhere else."""
    eos = policy.tokenizer.eos_token_id
    length_of = dict(zip(sample.row_keys(0, len(prompts), n).flatten().tolist(), lengths))
    run = sample.Decoder.run

    def timed_run(self, rows, temperature):
        tokens, logprobs = run(self, rows, temperature)
        ends = [length_of[row.key] - len(row.rollout.tokens) - 1 for row in rows]
        return [[eos if step == end else token if token != eos else 0 for token, end in zip(new, ends)]
                for step, new in enumerate(tokens)], logprobs

    sample.Decoder.run, closes, sample.closes = timed_run, sample.closes, lambda *_: False    # random weights may say </answer>
    try:
        return sample.generate(policy, prompts, n, max(lengths), temperature)
    finally:
        sample.Decoder.run, sample.closes = run, closes


class AtLength(StoppingCriteria):
    def __init__(self, prompt_length, lengths, device):
        self.ends = prompt_length + torch.tensor(lengths, device=device)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


@torch.no_grad()
def hugging_face(policy, prompts, n, lengths, temperature=1.0, **options):
    """transformers' generate on all rows at once, padded on the left. Returns the tokens (rows, steps)."""
    rows = [prompt for prompt in prompts for _ in range(n)]
    T = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.int64)
    for i, prompt in enumerate(rows):
        ids[i, T - len(prompt):], mask[i, T - len(prompt):] = torch.tensor(prompt), 1
    drawing = dict(do_sample=True, top_k=0, temperature=temperature) if temperature else dict(do_sample=False)
    policy.model.generation_config.eos_token_id = None  # no row ends by what it draws
    try:
        return policy.model.generate(input_ids=ids.to(policy.device), attention_mask=mask.to(policy.device), max_new_tokens=max(lengths),
                                     pad_token_id=0, stopping_criteria=[AtLength(T, lengths, policy.device)], **drawing, **options)[:, T:]
    finally:
        policy.model.generation_config.eos_token_id = policy.tokenizer.eos_token_id


def clock(function, *args, **kwargs):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(policy, name, prompts, n, lengths, reps, peers):
    """Time ours and the peers in turn -> table rows."""
    tokens, times, memory, limit, too_large = sum(lengths), {}, "", None, []
    for rep in range(reps + 1):  # the first round warms up; our cache and graphs stay for the next one, as in a run of grpo.py
        for peer, function in {"ours": ours, **peers}.items():
            first = policy.device.type == "cuda" and peer == "ours" and not rep
            if first:  # what graphs hold for themselves is allocated while they are captured
                torch.cuda.reset_peak_memory_stats()
            if peer in too_large:
                continue
            try:
                seconds, result = clock(function, policy, prompts, n, lengths)
            except torch.OutOfMemoryError:
                if peer == "ours":
                    raise
                too_large.append(peer)
                torch.cuda.empty_cache()
                continue
            if peer == "ours":
                assert [len(rollout.tokens) for group in result for rollout in group] == lengths, "a row did not end at its length"
                if first:
                    engine = policy.engine
                    expected = sum(p.nbytes for p in policy.model.parameters()) + engine.kv.nbytes + engine.prompt_kv.nbytes
                    memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB (weights and cache: {expected / 2**30:.1f})"
            if rep:
                times.setdefault(peer, []).append(seconds)
    if policy.device.type == "cuda":
        groups = [lengths[i:i + n] for i in range(0, len(lengths), n)]
        limit = sample.limit_seconds(policy, [len(p) for p in prompts], groups, *sample.machine_ceilings(policy.device))
    rows = []
    for peer, seconds in times.items():
        ratio, middle = statistics.median(b / a for a, b in zip(times["ours"], seconds)), statistics.median(seconds)
        share = f"{limit / middle:.0%} of the limit" + memory * (peer == "ours") if limit else ""
        rows.append(f"| {name}, {peer} | {tokens / middle:,.0f} | {ratio:.2f} x ours' time | {share} |")
    return rows + [f"| {name}, {peer} | out of memory | | |" for peer in too_large]


def check(policy, prompts, steps):
    """Greedy tokens of both samplers agree up to ties; one prompt at a time for Hugging Face, in fp32."""
    for prompt, (rollout,) in zip(prompts, ours(policy, prompts, 1, [steps] * len(prompts), 0.0)):
        other = hugging_face(policy, [prompt], 1, [steps], 0.0)[0].tolist()
        same = next((i for i, (a, b) in enumerate(zip(rollout.tokens[:-1], other)) if a != b), steps)
        assert same == steps or other[same] == policy.tokenizer.eos_token_id, f"greedy tokens differ at {same}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--sequences", type=int, nargs="+", default=[512, 1024], help="rows of the GPU benchmarks")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", help="append the table to this file")
    args = parser.parse_args()
    device = sample.default_device()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"

    def write(*lines):  # at once: a run that is cut short leaves its rows
        print(*lines, sep="\n", flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write("\n".join([*lines, ""]))

    write("", f"## Tokens per second of the sampler ({machine}, torch {torch.__version__}, {datetime.date.today()})", "",
          f"Median of {args.reps} rounds after one that warms up; `python tests/bench_sampler.py --reps {args.reps}`.", "",
          "| what | useful tokens/s | time (median ratio) | |", "|---|---|---|---|")
    policy, rng = sample.load_policy(sample.TINY_BASE), Random(0)
    prompts = [[rng.randrange(4, 1000) for _ in range(rng.randint(64, 200))] for _ in range(8)]
    check(sample.load_policy(sample.TINY_BASE, dtype=torch.float32), prompts, 64)
    for name, lengths in (("fixed, 128 new", [128] * 64), ("ragged, mean 32 of 128", draw_lengths(64, 32, 128))):
        write(*compare(policy, f"tiny, 8 x 8, {name}", prompts, 8, lengths, args.reps, {"Hugging Face generate": hugging_face}))
    prompts = [[rng.randrange(4, 500) for _ in range(120)] for _ in range(8)]
    write(*compare(random_policy(SMALL, device, torch.float32), "second shape, 8 x 8, fixed, 128 new", prompts, 8, [128] * 64,
                   args.reps, {"Hugging Face generate": hugging_face}))
    if device.type == "cuda":
        for shape in args.shapes:
            policy = random_policy(SHAPES[shape](), device)
            for rows in args.sequences:
                prompts = [[rng.randrange(4, 1000) for _ in range(256)] for _ in range(rows // 32)]
                peers = {"Hugging Face generate": hugging_face} if rows == args.sequences[0] else {}
                for name, lengths in (("fixed, 1024 new", [1024] * rows), ("ragged, mean 600, cap 2560", draw_lengths(rows, 600, 2560))):
                    write(*compare(policy, f"{shape}, {rows} rows, {name}", prompts, 32, lengths, max(1, args.reps // 2), peers))
            del policy
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
