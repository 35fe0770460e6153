"""The exercises as data: what is blanked, what it is worth, what to read, and how it is checked.

A check runs twice, once over the reference chapters and once over a submission's function among reference
chapters. It draws its inputs from a seed, calls the function and returns what came out, {label: values};
grade.py compares the two. So no check holds a solution, and no verdict is made where a submission runs.

A new exercise is one more entry of EXERCISES, its check, and a file of wrong versions in wrong/.
"""
import csv, itertools, json, math
from dataclasses import dataclass
from pathlib import Path
from random import Random


@dataclass
class Exercise:
    title: str
    chapter: str             # the script that holds the functions, without .py; "" for an experiment
    names: tuple             # the functions whose bodies are blanked: "draw", "Decoder.step"
    points: int
    hours: float             # expected, for a student who knows PyTorch
    formula: str             # what is to be computed, and its source
    read: str
    hint: str
    check: object            # (chapter, seed) -> {label: values}; of an experiment: (folder) -> two of them
    hides: tuple = ()        # functions blanked as well, because they would show the answer
    tolerance: float = 1e-3  # of the largest number among those that are compared together

    @property
    def questions(self):
        """What answers.json must answer; none but for an experiment."""
        return getattr(self.check, "questions", [])

    @property
    def wrong(self):
        """The file of wrong versions, named after the first function."""
        name = self.names[0].split(".")[-1].strip("_")
        return Path(__file__).parent / "wrong" / f"{name}.txt"


def error_of(function, *arguments):
    """The kind of exception that a call raises, under Python's own name for it, "" if none."""
    try:
        function(*arguments)
    except Exception as error:
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return ""


def generator(seed):
    import torch
    return torch.Generator().manual_seed(seed)


def problems(data, seed, count, ops=(4, 9)):
    return list(itertools.islice(data.generate(ops=ops, seed=seed % 2**30), count))


def sharp_policy(sft, seed):
    """A small random policy whose probabilities differ, so that a mistake shows."""
    policy = sft.tiny_policy(width=32, layers=2, heads=2, seed=seed)
    for p in policy.model.parameters():
        if p.ndim == 2:
            p.data *= 8
    return policy


def random_tokens(rng, vocabulary, low, high):
    return [rng.randrange(4, vocabulary) for _ in range(rng.randint(low, high))]


# ------------------------------------------------------------------------------------------------- data.py
def check_graph(data, seed):
    rng, out = Random(seed), {}
    for i, problem in enumerate(problems(data, seed, 4)):
        nodes = dict(rng.sample(sorted(problem.nodes.items()), len(problem.nodes)))
        out[f"values {i}"] = dict(sorted(data.read_values(nodes, "line 1").items()))
        out[f"operations {i}"] = {name: data.count_operations(nodes, name) for name in sorted(nodes)}
    circle = {a: data.Node(a, (rng.randint(1, 9), "+", b), "") for a, b in ("ab", "bc", "ca")}
    squares = {"x0": data.Node("x0", (9,), "")}
    for i in range(1, 9):
        squares[f"x{i}"] = data.Node(f"x{i}", (f"x{i - 1}", "*", f"x{i - 1}"), "")
    wide = {"w": data.Node("w", (1,) + ("+", 1) * 200, "")}
    many = {f"x{i}": data.Node(f"x{i}", (1,), "") for i in range(401)}
    out["error"] = [error_of(data.read_values, nodes, "line 1") for nodes in (circle, squares, wide, many)]
    return out


def check_answer(data, seed):
    n, other = Random(seed).sample(range(10, 999), 2)
    box, think = f"\\boxed{{{n}}}", "<think>\nx = 4.\n</think>\n"
    arabic = "".join(chr(0x660 + int(digit)) for digit in str(n))
    texts = [f"{think}<answer>\nThe final answer is {box}.\n</answer>",
             f"x = 4.</think><answer>{box}</answer>\n", f"{think}<answer>\\boxed{{-{n}}}</answer>",
             f"{think}<answer>{box} or \\boxed{{{other}}}</answer>", f"{think}<answer>{box}{box}</answer>",
             f"{think}{box}", f"<answer>{box}</answer>", f"{think}<answer>{n}</answer>",
             f"{think}{box}<answer></answer>",
             f"<think>{box}</think><answer>{box}</answer>", f"{think}<answer>{box}</answer> so {box}",
             f"{think}<answer>{box}</answer> at last",
             f"{think}<answer>{box}</answer><answer>{box}</answer>", f"{think}<answer>{box}",
             f"{think}<answer>\\boxed{{{n}.0}}</answer>", f"{think}<answer>\\boxed{{+{n}}}</answer>",
             f"{think}<answer>\\boxed{{{arabic}}}</answer>", f"{think}<answer>\\boxed{{ {n}}}</answer>",
             f"<think>\n<think>x</think><answer>{box}</answer>", f"{think}</think><answer>{box}</answer>",
             f"{think}<answer>\\boxed{{9**9**9}}</answer>", "", "</think>", f"{think}<answer>\\boxed{{{n}",
             f"{think}{box}<answer>{box}</answer>", f"{think}so <answer>{box}</answer>",
             f"<think><answer>x</think><answer>{box}</answer>", f"so <think>x</think><answer>{box}</answer>",
             f"{think}<answer>\\boxed{{{'1' * 101}}}</answer>"]
    return {f"read_answer({text!r})": data.read_answer(text) for text in texts}


def check_chain(data, seed):
    rng, out = Random(seed), {}
    formulas = [node.formula for problem in problems(data, seed, 3) for node in problem.nodes.values()]
    formulas += [(3, "-", 5, "-", 4), (2, "+", 3, "*", 4, "-", 1), (9, "*", "(", 0, "-", 3, ")"), (7,)]
    for i, formula in enumerate(formulas):
        numbers = tuple(t if t in data.SYMBOLS else rng.randint(0, 20) for t in formula)
        out[data.show(numbers)] = [data.show(side) for side in data.subgoal_chain(numbers)]
    return out


# ----------------------------------------------------------------------------------------------- inject.py
def check_locked(inject, seed):
    data, rng, out = inject.data, Random(seed), {}
    for i, problem in enumerate(problems(data, seed, 4, ops=(7, 12))):
        order = data.needed_nodes(problem.nodes, problem.target)
        solved = set(order[:rng.randrange(len(order))])
        locked = inject.locked_nodes(problem.nodes, solved)
        out[f"locked {i}"] = list(locked)
        for node in rng.sample(order, 3):
            out[f"reflection on {node}, {i}"] = list(inject.reflect(problem, node, "x", solved, Random(i)))
        out[f"answer {i}"] = inject.inject(problem, problem.response, p=0.5, rng=Random(seed + i))
    return out


# ----------------------------------------------------------------------------------------------- sample.py
def check_draw(sample, seed):
    import torch
    g, out = generator(seed), {}
    logits = 3 * torch.randn(64, 50, generator=g)
    logits[:, 7] = -math.inf
    key = sample.row_keys(seed, 8, 8).flatten()
    position = torch.randint(0, 500, (64,), generator=g)
    for temperature in (0, 0.7, 1.0, 1.6):
        token, logprob = sample.draw(logits, key, position, temperature)
        out |= {f"token, temperature {temperature}": token, f"logprob, temperature {temperature}": logprob}
    return out


def check_step(sample, seed):
    import sft
    rng, policy = Random(seed), sharp_policy(sft, seed)
    prompts = [random_tokens(rng, 1000, 2, 12) for _ in range(4)]
    engine = sample.Decoder(policy.model, 12, 32, 4, 128)
    # four steps between two looks of the host, as on CUDA
    engine.sync, engine.out_token = 4, engine.out_token.repeat(4, 1)
    engine.out_logprob, out = engine.out_logprob.repeat(4, 1), {}
    for label, policy.engine in ("one step at a time", None), ("four", engine):
        groups = sample.generate(policy, prompts, n=3, max_new_tokens=10, temperature=1.0, seed=seed)
        rollouts = [rollout for group in groups for rollout in group]
        out |= {f"tokens, {label}": [r.tokens for r in rollouts],
                f"logprobs, {label}": [r.logprobs for r in rollouts]}
    return out


def logit_rows(sample, seed, V):
    import torch
    g = generator(seed)
    x = 3 * torch.randn(6, V, generator=g)
    x[0, V // 2:] = -math.inf
    x[[1, 5]] += 1e7  # after which the digits of log d are lost, if it is added to m
    x[2] = x[2].sort().values  # the maximum comes last
    targets = torch.randint(0, V // 2, (6,), generator=g)
    targets[4] = sample.IGNORE
    return x, targets, torch.randn(6, generator=g), torch.randn(6, generator=g)


def statistics(forward, backward, sample, seed, V):
    """The four statistics of each row, and the gradient; a large offset has a label of its own."""
    out = {}
    x, targets, g_logprob, g_entropy = logit_rows(sample, seed, V)
    for scale in (1.0, 0.5):
        stats = forward(x, targets, scale)
        for name, column in zip(("logprob", "entropy", "m", "log d"), stats.T):
            out[f"{name} of rows with an offset, scale {scale}"] = column[[1, 5]]
            out[f"{name}, scale {scale}"] = column[[0, 2, 3, 4]]
        gradient = backward(x, targets, stats, g_logprob, g_entropy, scale)
        out[f"gradient, scale {scale}"] = gradient[:, ::max(1, V // 100)]
        out[f"gradient at the target, scale {scale}"] = gradient.gather(1, targets.clamp(min=0)[:, None])
    return out


def check_rows(sample, seed):
    return statistics(sample.rows_forward, sample.rows_backward, sample, seed, V=40)


def check_kernels(sample, seed):
    import torch

    def backward(x, *arguments):
        out = torch.zeros_like(x)
        sample.backward_triton(x, *arguments, out)
        return out
    return statistics(sample.forward_triton, backward, sample, seed, V=5000)


# -------------------------------------------------------------------------------------------------- sft.py
def check_collate(sft, seed):
    rng, out = Random(seed), {}
    for pad in (0, 1):
        examples = [(random_tokens(rng, 90, 1, 9), random_tokens(rng, 90, 1, 9) + [1]) for _ in range(5)]
        examples[0][0][-1] = examples[1][1][0] = pad  # token values say nothing about what is padding
        inputs, targets = sft.collate(examples, "cpu", pad)
        out |= {f"inputs, pad {pad}": inputs, f"targets, pad {pad}": targets}
    return out


def check_accumulation(sft, seed):
    import torch
    rng, out = Random(seed), {}
    policy = sharp_policy(sft, seed)
    batch = [(random_tokens(rng, 1000, 2, 20), random_tokens(rng, 1000, 1, 30) + [1]) for _ in range(7)]
    sizes, longest = [], max(len(prompt) + len(response) for prompt, response in batch)
    policy.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs.get("input_ids", *args).numel()), with_kwargs=True)
    for micro_tokens in (1, 64, 100_000):
        policy.model.zero_grad()
        sizes.clear()
        out[f"loss, {micro_tokens} tokens at a time"] = sft.add_gradient(policy, batch, micro_tokens)
        out[f"at most {micro_tokens} tokens, or one example"] = max(sizes) <= max(micro_tokens, longest)
        grads = [p.grad.flatten()[:200] for p in policy.model.parameters() if p.grad is not None]
        out[f"gradient, {micro_tokens} tokens at a time"] = torch.cat(grads or [torch.zeros(0)])[::7]
    sft.add_gradient(policy, batch[:3], 64)
    out["added to a gradient"] = torch.cat([p.grad.flatten()[:200] for p in policy.model.parameters()])[::7]
    return out


# ------------------------------------------------------------------------------------------------- grpo.py
def check_advantages(grpo, seed):
    import torch
    right = torch.rand(9, 8, generator=generator(seed)).lt(torch.linspace(0.2, 0.8, 9)[:, None]).float()
    right[3], right[5] = 0, 1
    right[0] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    out = {"rewards 0 and 1": grpo.group_advantages(right), "no std": grpo.group_advantages(right, std=False)}
    out["rewards of all kinds"] = grpo.group_advantages(torch.rand(3, 5, generator=generator(seed)), eps=0.1)
    out["one group"] = grpo.group_advantages(right[:1])
    out["groups of one"] = grpo.group_advantages(right[:, :1])
    return out


def check_kl(grpo, seed):
    import torch
    g, out = generator(seed), {}
    logprob = -3 * torch.rand(40, generator=g)
    ref, upstream = logprob + 0.8 * torch.randn(40, generator=g), torch.randn(40, generator=g)
    for kind in ("k1", "k2", "k3"):
        x = logprob.clone().requires_grad_()
        value = grpo.kl_estimate(x, ref, kind)
        value.backward(upstream)
        out |= {kind: value, f"gradient of {kind}": x.grad}
    return out | {"kind k4": error_of(grpo.kl_estimate, logprob, ref, "k4")}


def check_loss(grpo, seed):
    import torch
    g, out = generator(seed), {}
    B, T = 6, 9
    mask = torch.arange(T) < torch.randint(2, T + 1, (B, 1), generator=g)
    mask[0], mask[1:3] = torch.arange(T) < 1, True
    logprob = -2 * torch.rand(B, T, generator=g)
    old, ref = (logprob + 0.4 * torch.randn(B, T, generator=g) for _ in range(2))
    weight, entropy = (torch.rand(B, T, generator=g) + 0.5 for _ in range(2))
    advantages = torch.randn(B, generator=g)
    old[1:3] = logprob[1:3] - torch.linspace(-0.6, 0.6, T)  # ratios on both sides of every clip ...
    advantages[1:3] = torch.tensor([1.0, -1.0])  # ... pushed both ways
    behind = [x.masked_fill(~mask, math.nan) for x in (logprob, old, ref)]
    norms = itertools.product(("sequence", "token", "constant"), (None, 50))
    settings = [dict(norm=norm, denom=denom) for norm, denom in norms]
    settings += [dict(beta=0.3), dict(beta=0.3, kl="k1"), dict(clip=0.1, clip_high=0.3),
                 dict(clip=0.5, beta=0.0), dict(weight=weight), dict(entropy=entropy, entropy_bonus=0.2)]
    for options in settings:
        x = behind[0].clone().requires_grad_()
        reference = None if options.get("beta") == 0 else behind[2]
        loss = grpo.grpo_loss(x, behind[1], reference, advantages, mask.float(), **options)
        loss.backward()
        label = ", ".join(f"{k} {v}" for k, v in options.items() if not torch.is_tensor(v)) or "weight"
        out |= {f"loss, {label}": loss, f"gradient, {label}": x.grad.masked_fill(~mask, 0)}
    return out


# ------------------------------------------------------------------------------------------------- eval.py
def check_chance(eval_, seed):
    rng, out = Random(seed), {}
    for n in (5, 100, 300):
        for correct in (0, n, rng.randint(1, n - 1)):
            out[f"wilson({correct}, {n})"] = eval_.wilson(correct, n)
    out["wilson, z 2.58"] = eval_.wilson(rng.randint(1, 99), 100, z=2.58)
    for i in range(6):
        before = [int(rng.random() < 0.4) for _ in range(40)]
        after = [int(rng.random() < 0.4 + 0.08 * i) for _ in before]
        out[f"mcnemar {i}"] = eval_.mcnemar(before, after)
        out[f"mcnemar {i}, turned"] = eval_.mcnemar(after, before)
    out["mcnemar, no difference"] = eval_.mcnemar(before, before)
    return out


def check_influence(eval_, seed):
    import sft, torch
    rng, out = Random(seed), {}
    policy = sharp_policy(sft, seed)
    groups = []
    for _ in range(5):
        prompt = random_tokens(rng, 1000, 2, 8)
        groups.append([(prompt, random_tokens(rng, 1000, 1, 8)) for _ in range(6)])
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1] * 6, [0] * 6, [1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 0, 1]])
    for options in (dict(), dict(temperature=1.4), dict(leave_one_out=True)):
        alpha, delta = eval_.influence(policy, groups, rewards, **options)
        out |= {f"alpha, {options}": alpha, f"delta, {options}": delta, f"exactly 0, {options}": delta == 0}
    return out


# ------------------------------------------------------------------------------------- the three experiments
def read_log(folder, name):
    """The columns of a log of grpo.py, as numbers. Raises ValueError where it cannot be one."""
    with open(folder / name, newline="") as file:
        rows = list(csv.DictReader(file))
    log = {column: [float(row[column] or "nan") for row in rows] for column in rows[0]}
    if log["step"] != list(range(1, len(rows) + 1)) or len(rows) < 20:
        raise ValueError(f"{name}: fewer than 20 steps, or not all of them")
    shares = zip(log["all_wrong"], log["mixed"], log["all_right"])
    sound = all(abs(sum(share) - 1) < 1e-4 and min(share) >= 0 for share in shares)
    if not sound or len(set(log["grad_norm"])) < 15:
        raise ValueError(f"{name}: not a log that grpo.py wrote")
    return log


def mean(values):
    """Of what was measured: a step without a mixed group leaves cells of the log empty."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def compare_runs(name, a, b, questions):
    """A check of two logs: what answers.json says beside what the logs say, and the figure."""
    def check(folder):
        logs = [read_log(folder, name) for name in (a, b)]
        if len(logs[0]["step"]) != len(logs[1]["step"]):
            raise ValueError(f"{a} and {b} have not as many steps")
        if logs[0]["grad_norm"] == logs[1]["grad_norm"]:
            raise ValueError(f"{a} and {b} are the same log")
        given = json.loads((folder / "answers.json").read_text()).get(name, {})
        expected = {question: answer(*logs) for question, answer in questions.items()}
        yours = {question: given.get(question) for question in questions}
        figure = (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        why = len(str(given.get("why", "")).split()) >= 15
        return (yours | {"a figure": figure, "why, 15 words or more": why},
                expected | {"a figure": True, "why, 15 words or more": True})
    check.questions = list(questions)
    return check


def larger(a, b, names):
    return names[0] if a > b else names[1]


def end(column):
    return mean(column[-10:])


def gain(column):
    return end(column) - mean(column[:10])


def largest_at(column):
    return max(range(len(column)), key=lambda i: -1 if math.isnan(column[i]) else column[i])


def same_start(a, b):
    first = a["reward"][0], b["reward"][0]
    return list(first) if first[0] == first[1] else "not equal: other flags or seeds differ"


STD = {"grad_norm with std": lambda a, b: mean(a["grad_norm"]),
       "grad_norm without": lambda a, b: mean(b["grad_norm"]),
       "ratio": lambda a, b: mean(a["grad_norm"]) / mean(b["grad_norm"]),
       "first step's reward in both": same_start,
       "higher reward in the last 10 steps": lambda a, b: larger(end(a["reward"]), end(b["reward"]),
                                                                 ("std", "no-std"))}
CLIP = {"clip_frac, one epoch": lambda a, b: mean(a["clip_frac"]),
        "clip_frac, two": lambda a, b: mean(b["clip_frac"]),
        "first step's reward in both": same_start,
        "largest clip_frac, at step": lambda a, b: largest_at(b["clip_frac"]) + 1,
        "higher KL in the last 10 steps": lambda a, b: larger(end(a["kl"]), end(b["kl"]), ("one", "two"))}
BEHAVIORS = {"mixed in the first 10 steps, bridge": lambda a, b: mean(a["mixed"][:10]),
             "mixed in the first 10 steps, vanilla": lambda a, b: mean(b["mixed"][:10]),
             "tokens, bridge / vanilla": lambda a, b: mean(a["mean_tokens"]) / mean(b["mean_tokens"]),
             "gain in reward, bridge": lambda a, b: gain(a["reward"]),
             "gain in reward, vanilla": lambda a, b: gain(b["reward"])}


# -------------------------------------------------------------------------------------------------- the table
EXERCISES = [
    Exercise(
        "Evaluate a graph and count its operations",
        "data", ("read_values", "count_operations"), points=4, hours=1.0,
        formula="Values: parents first. Operations: those of all nodes that the target depends on, itself "
                "included, each once. Source: Ye et al. 2024, arXiv 2407.20311.",
        read="data.py, top and section 1",
        hint="`needed_nodes(nodes, *nodes)` gives an order; `evaluate` does one node. Refuse by ValueError:"
             " a circle, over MOST_NODES or MOST_PARENTS, a value of LARGEST or more.",
        check=check_graph),
    Exercise(
        "A formula, one operation at a time", "data", ("subgoal_chain",), points=4, hours=0.5,
        formula="13 + 5 + 6 = 18 + 6 = 24. Source: BRIDGE, arXiv 2505.18917, section 4.1.",
        read="data.py, `reduce_once`; inject.py, top",
        hint="The given formula is not part of the result; its value is.",
        check=check_chain),
    Exercise(
        "A reward that cannot be gamed", "data", ("read_answer",), points=6, hours=1.5,
        formula="The integer of the one `\\boxed{...}`, ASCII digits with an optional minus, inside the one "
                "`<answer>...</answer>` that follows the one `</think>` directly and ends the text (white "
                "space aside); else None. No `<answer>` and no `\\boxed` before `</think>`; `<think>` may "
                "stand at the very beginning and nowhere else, or be missing. A number has at most 100 "
                "digits. Source: deviation 3 in README.",
        read="data.py, section 8",
        hint="Cut at the first `</think>`; then say what either part must not hold.",
        check=check_answer),
    Exercise(
        "Locked nodes and reflection", "inject", ("locked_nodes", "reflect"), points=5, hours=1.0,
        formula="Locked: at least one parent is not solved. Source: BRIDGE, Algorithm 1 and appendix B.3.",
        read="inject.py, top",
        hint="`data.open_step(...)` makes the step; `._replace(missing=...)` a copy. Keep the order of "
             "`node.parents`.",
        check=check_locked),
    Exercise(
        "Draw a token, with its log-prob", "sample", ("draw",), points=6, hours=2.0,
        formula="P(ends[v-1] <= point < ends[v]) = p_v with ends = cumsum(floor(2^40 p)); p = softmax(x / "
                "temperature). Source: the comment above `draw`.",
        read="sample.py, section 3, to `draw`",
        hint="Two draws of 22 bits are hash_of(key, 2 position + {0, 1}) >> 10: number 2 position gives "
             "high, 2 position + 1 low, and the point is the share high / 2^22 + low / 2^44 of the line, "
             "whose length is ends[-1], rounded down, in whole numbers below 2^63.",
        check=check_draw),
    Exercise(
        "One decode step over a KV cache", "sample", ("Decoder.step",), points=7, hours=3.0,
        formula="softmax(q K / sqrt(D)) V over the prompt's cached tokens and the row's own columns 0 ... "
                "column. Source: Vaswani et al. 2017, eq. 1; the shapes are in the comments of section 3.",
        read="sample.py, section 3: `Decoder`, `transformer`, `attention`",
        hint="Write this token's keys and values before you attend. A row's position is its prompt's cached"
             " length plus its column. What a row draws goes to out_token and out_logprob at `count`, and "
             "is its next token; count and column move on.",
        check=check_step),
    Exercise(
        "Log-prob and entropy, forward and backward, in PyTorch",
        "sample", ("rows_forward", "rows_backward"), points=7, hours=2.5,
        formula="logprob = (x_y - m) - log d, H = log d - s / d; d logprob / dx = onehot(y) - p, dH / dx = "
                '-p (log p + H). Source: README, "The log-prob kernel"; Milakov and Gimelshein 2018, arXiv '
                "1805.02867.",
        read="sample.py, section 5",
        hint="Everything in fp32. x is logits times scale, and the gradient is with respect to the logits. "
             "e^-inf is 0, but 0 * -inf is NaN. A masked target: zeros.",
        check=check_rows, hides=("_forward_kernel", "_backward_kernel")),
    Exercise(
        "The same online, in Triton", "sample", ("_forward_kernel", "_backward_kernel"), points=7, hours=3.5,
        formula="m' = max(m, max x_block); d' = d e^(m-m') + sum e^(x-m'); s' = e^(m-m') (s + (m-m') d) + "
                "sum e^(x-m') (x-m'). stats[row] = logprob, entropy, m, log d. Source: README, \"The "
                'log-prob kernel".',
        read="sample.py, section 5; `forward_triton` and `backward_triton` launch the kernels. Triton's "
             "interpreter runs them without a GPU (on Linux: pip install triton)",
        hint="One program a row forward, one a row and block backward. A masked row (-100) leaves its "
             "stats, and gets a gradient of 0. Load outside of the vocabulary as -inf.",
        check=check_kernels),
    Exercise(
        "The prompt's mask in SFT", "sft", ("collate",), points=5, hours=1.0,
        formula="targets[b, t] = token t + 1 where that belongs to the response, else -100.",
        read="sft.py, top and section 1",
        hint="Decide by lengths, never by token values. The last token of an example is no input: T is the "
             "length of the longest example less 1.",
        check=check_collate),
    Exercise(
        "Micro-batches that add up exactly", "sft", ("add_gradient",), points=6, hours=1.0,
        formula="loss = -sum over the batch of log pi / answer tokens of the batch, whatever the "
                "micro-batches.",
        read="sft.py, `micro_batches`",
        hint="Which denominator is the same for all parts? `micro_batches` says which rows a part has.",
        check=check_accumulation),
    Exercise(
        "Advantages of a group", "grpo", ("group_advantages",), points=5, hours=0.5,
        formula="A_i = (r_i - mean r) / (std r + eps), N - 1 in std. Source: Shao et al. 2024, arXiv "
                "2402.03300, section 4.1.2; without std: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783.",
        read="grpo.py, top",
        hint="A group of one has no std.",
        check=check_advantages),
    Exercise(
        "Three estimators of the KL, and what their gradients do",
        "grpo", ("kl_estimate",), points=4, hours=1.0,
        formula="d = log pi_ref - log pi: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1. Source: Schulman 2020, "
                "joschu.net/blog/kl-approx.html.",
        read="grpo.py, top",
        hint="All are differentiated through log pi. Then work out: which gradient is 0 on average, and "
             "which is the KL's?",
        check=check_kl),
    Exercise(
        "The loss, with its three normalisers", "grpo", ("grpo_loss",), points=7, hours=2.5,
        formula="The docstring's; sequence, token or constant. Source: Shao et al. 2024, eq. 3; Yu et al. "
                "2025 (DAPO), arXiv 2503.14476, eq. 8; Liu et al. 2025.",
        read="grpo.py, top and section 1",
        hint="What lies behind the mask may be NaN, and NaN * 0 is NaN. `constant` without denom divides by "
             "B T.",
        check=check_loss),
    Exercise(
        "Wilson's interval and a paired test", "eval", ("wilson", "mcnemar"), points=4, hours=1.0,
        formula="middle = (p + z^2/2n) / (1 + z^2/n), half = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n). "
                "Source: Wilson 1927; McNemar 1947, the exact binomial form.",
        read="eval.py, top",
        hint="Only the problems on which the two differ count, and 2 P can exceed 1.",
        check=check_chance),
    Exercise(
        "Influence without a pair", "eval", ("influence", "influence_with_own"), points=8, hours=3.0,
        formula="dJ(q) = sqrt(alpha (1 - alpha)) (mean of <grad log pi(o+|q), G> - mean of <grad log "
                "pi(o-|q), G>), G = mean over all queries and rollouts of A grad log pi. Source: BRIDGE, "
                "Proposition 3.1 and appendix B.7.",
        read='README, "The method in one page"; eval.py, section 3; grpo.py, sections 1 and 3',
        hint="An inner product with a mean is a mean of inner products, so no pair is formed. A query's own"
             " rollouts are a part of G, with the weight 1 / Q: leave_one_out takes them out.",
        check=check_influence, tolerance=0.01),
    Exercise(
        "Experiment: advantages without std", "", ("std",), points=5, hours=1.0,
        formula="std.csv and no-std.csv, of two runs from one SFT policy:\n\n"
                "    python sft.py --n 500\n"
                "    python grpo.py --ckpt sft.pt --steps 24 --prompts 6 --eval-every 0 --out std.pt\n"
                "    python grpo.py --ckpt sft.pt --steps 24 --prompts 6 --eval-every 0 --no-std "
                "--out no-std.pt",
        read="grpo.py, `group_advantages`",
        hint="Which groups weigh more with std, and what would that do to lr?",
        check=compare_runs("std", "std.csv", "no-std.csv", STD)),
    Exercise(
        "Experiment: the clip, with two epochs", "", ("clip",), points=5, hours=1.0,
        formula="std.csv (one epoch, as above) and two-epochs.csv:\n\n"
                "    python grpo.py --ckpt sft.pt --steps 24 --prompts 6 --eval-every 0 --epochs 2 "
                "--out two-epochs.pt",
        read="grpo.py, departure 1, `update`",
        hint="Why is the first exactly 0?",
        check=compare_runs("clip", "std.csv", "two-epochs.csv", CLIP)),
    Exercise(
        "Experiment: behaviors on and off, at equal questions", "", ("behaviors",), points=5, hours=1.5,
        formula="std.csv (bridge, as above) and vanilla.csv:\n\n"
                "    python sft.py --n 500 --method vanilla --out vanilla-sft.pt\n"
                "    python grpo.py --ckpt vanilla-sft.pt --steps 24 --prompts 6 --eval-every 0 "
                "--out vanilla.pt",
        read='README, "Does BRIDGE help at this size?"',
        hint="Gain: mean of the last 10 steps less that of the first 10, from the log (`--curves` takes "
             "others). One seed proves nothing: say what would.",
        check=compare_runs("behaviors", "std.csv", "vanilla.csv", BEHAVIORS)),
]
