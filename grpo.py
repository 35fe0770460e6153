"""Chapter 5. Reinforcement learning with GRPO: try N times, and lean towards what worked.

    python grpo.py --ckpt sft.pt                            # sft.py's tiny policy, with its own settings
    python grpo.py --ckpt sft.pt --resume                   # go on after a kill or Ctrl-C
    python grpo.py --ckpt qwen-sft.pt --ops 15 20           # a large policy, with the paper's
    python grpo.py --ckpt sft.pt --norm token --clip-high 0.28 --drop-flat --beta 0    # DAPO's loss

Nobody shows the policy an answer any more: it makes its own. A *rollout* is an answer sampled from the
policy; its *reward* is 1 where the boxed answer is right, else 0. A reward has no derivative with respect to
the weights, but the rollout's probability has. That is the *policy gradient*: raise log pi of a rollout's
tokens in proportion to its *advantage*, its reward against the mean of its *group*, the N rollouts of the
same problem (to be right where all are right is no merit). One step takes Q problems and lowers

    A_i = (r_i - mean(r)) / (std(r) + 1e-6)                             over the N rollouts of one problem
    ratio_t = pi(o_t) / pi_old(o_t)
    loss = - mean over rollouts of mean over tokens of [min(ratio A, clip(ratio, 1-eps, 1+eps) A) - beta KL_t]

The *old policy* pi_old is the one that sampled: pi before the step's first update. The clip ends the push on
a token once its probability has moved by eps. The *reference policy* pi_ref is a frozen copy of pi as the run
began, the SFT policy; KL_t holds pi near it (k3 estimator, Schulman 2020: exp(d) - d - 1, d = log pi_ref -
log pi). Only *mixed* groups teach: where the share alpha of right rollouts is 0 or 1, all rewards are equal,
the group is *flat*, and every advantage is 0 (with --format-reward rewards can differ where no answer does).
That is why BRIDGE prepares the model first. Half an hour of reading; at first skip `prompt_once` and
`shared_attention`, which are there for speed, and sections 4 (problems), 6 and 7 (hand-over, command).

Departures from the paper and notes on it:
1. with one update per batch of rollouts (the paper's setting, the default here) pi_old is pi: ratio is 1 at
   every token, the clip never acts, and the loss is about 0, the mean of the advantages (plus beta KL, 0 at
   the first step). Its gradient is not 0: d ratio = d log pi. `--epochs 2` makes the clip act;
2. k3 in the loss is, as in the paper, a biased estimate of the KL's gradient (low variance, small with beta);
3. flat groups carry no gradient but the KL's; the paper trains on them all the same. For the tiny model they
   are neither scored nor trained on: `--drop-flat`, as in DAPO;
4. for the tiny model, batch and learning rate are its own, and the latter decays at the end; on PromptBench
   the KL coefficient is larger (PRESETS below).
"""
import argparse, copy, itertools, math, time
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import data, sample, sft

FILTER_N = 8  # rollouts a problem with which the paper measures rollout accuracy


# ------------------------------------------------------------------------ 1. The mathematics, without a model
def group_advantages(rewards, std=True, eps=1e-6):
    """Advantage of each rollout within its group. rewards (Q, N) -> (Q, N), rows summing to 0.

    std: divide by the group's standard deviation (N - 1 in its denominator, as in the released code;
    Proposition 3.1 writes the population form, smaller by sqrt((N-1)/N), which makes advantages larger by
    sqrt(N/(N-1))). False gives Dr. GRPO. A group without variance gets exactly 0.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    uneven = rewards.amax(dim=1, keepdim=True) > rewards.amin(dim=1, keepdim=True)
    # equal rewards can miss their mean by a rounding error: 1e-7 over eps would be an advantage of 0.1
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).where(uneven, 0)
    if not std:
        return centred
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    return centred / (rewards.std(dim=1, keepdim=True) + eps)


def kl_estimate(logprob, ref_logprob, kind="k3"):
    """Per-token estimate of KL(pi || pi_ref) from tokens drawn from pi; d = log pi_ref - log pi: k1 = -d
    (unbiased, can be negative), k2 = d^2 / 2 (biased), k3 = exp(d) - d - 1 (unbiased, never negative).

    >>> pi, ref = torch.tensor(-1.0), torch.tensor(-1.5)
    >>> [round(kl_estimate(pi, ref, kind).item(), 4) for kind in ("k1", "k2", "k3")]
    [0.5, 0.125, 0.1065]
    """
    d = ref_logprob - logprob
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return d.exp() - d - 1
    raise ValueError(f"kl must be k1, k2 or k3, not {kind!r}")


def grpo_loss(logprob, old_logprob, ref_logprob, advantages, mask, *, clip=0.2, clip_high=None, beta=1e-3,
              kl="k3", norm="sequence", denom=None, entropy=None, entropy_bonus=0.0, weight=None):
    """The GRPO loss of a batch, to be minimised (arXiv 2402.03300, eq. 3). Inputs are left unchanged. One
    token adds

        - weight_t min(ratio_t A, clip(ratio_t, 1-clip, 1+clip_high) A) + beta KL_t - entropy_bonus H_t

    logprob (B, T), differentiable; old_logprob (B, T), the trainer's own value before the first update on
    this batch; ref_logprob (B, T) or None where beta is 0; advantages (B,); mask (B, T), 1 on response
    tokens. norm: "sequence" (mean over tokens, then over rollouts: the paper), "token" (mean over all tokens:
    DAPO) or "constant" (sum of tokens / denom: Dr. GRPO). denom: the denominator of the *whole* batch -
    rollouts, tokens or the constant - so that the losses of micro-batches add up to the loss of the batch;
    None: this batch alone. entropy (B, T): H_t, differentiable, needed for a bonus only; weight (B, T):
    importance_weight below, or None for 1. A rollout that was dropped has mask 0 throughout and must be
    missing from denom as well.

    >>> lp = torch.tensor([[-1., -2.]]); A = torch.tensor([2.]); one = torch.ones(1, 2)
    >>> grpo_loss(lp, lp - 0.5, lp, A, one)          # ratio e^0.5 = 1.65 is clipped to 1.2: -1.2 * 2
    tensor(-2.4000)
    """
    keep, mask = mask.bool(), mask.to(logprob.dtype)
    # what lies behind the mask becomes 0 (NaN * 0 would be NaN), and with it every term of the loss there
    logprob = logprob.where(keep, 0)
    ratio = (logprob - old_logprob.where(keep, 0)).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    advantage = advantages[:, None] * mask  # (B, T): the same at each token of a rollout
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if weight is not None:
        loss = loss * weight.where(keep, 0)
    if entropy_bonus:
        loss = loss - entropy_bonus * entropy.where(keep, 0)
    if beta:
        loss = loss + beta * kl_estimate(logprob, ref_logprob.where(keep, 0), kl)
    if norm == "sequence":
        return (loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / (denom or len(loss))
    if norm == "token":
        return loss.sum() / (denom or mask.sum().clamp(min=1))
    if norm == "constant":
        return loss.sum() / (denom or loss.numel())
    raise ValueError(f"norm must be sequence, token or constant, not {norm!r}")


def importance_weight(old_logprob, sampler_logprob, cap):
    """Truncated importance sampling: min(pi_old / pi_sampler, cap) per token, for a sampler that rounds
    differently from the trainer. Not differentiated; the cap bounds the variance that a few unlikely tokens
    would bring.

    >>> importance_weight(torch.tensor([-1.0, -1.0, -1.5]), torch.tensor([-2.0, -1.0, -1.0]), cap=2.0)
    tensor([2.0000, 1.0000, 0.6065])
    """
    return (old_logprob - sampler_logprob).exp().clamp(max=cap)


# ------------------------------------------------------------------------------ 2. Rollouts and their rewards
@dataclass
class Rollouts:
    """N rollouts of each of Q problems, in Q N rows: those of one problem, its group, stand side by side."""
    examples: list               # of each row: (prompt tokens, response tokens)
    logprobs: list               # of each row: the sampler's log-prob of every response token
    rewards: torch.Tensor        # (Q, N)
    right: torch.Tensor = None   # (Q, N): 1.0 where the answer is right
    stops: list = None           # of each row: why it ended, "eos", "closed" or "length" (cut at the limit)

    def uneven(self):
        """Which groups have rewards that differ, (Q,): in all others every advantage is 0."""
        return self.rewards.amax(dim=1) > self.rewards.amin(dim=1)


def roll_out(policy, problems, args, step, n, limit=None):
    """n rollouts of each problem, at most `limit` at a time -> Rollouts. The reward is 1 for a right answer,
    plus --format-reward for one that can be read."""
    prompts = [sample.encode_prompt(policy.tokenizer, problem.question) for problem in problems]
    groups = sample.generate(policy, prompts, n=n, max_new_tokens=args.max_new_tokens, max_batch=limit,
                             temperature=args.temperature, seed=args.seed * 1_000_003 + step)
    texts = [[sample.decode(policy.tokenizer, rollout.tokens) for rollout in group] for group in groups]
    right = torch.tensor([[data.reward(text, problem.answer) for text in group]
                          for problem, group in zip(problems, texts)])
    readable = torch.tensor([[data.read_answer(text) is not None for text in group] for group in texts])
    rows = [(prompt, rollout) for prompt, group in zip(prompts, groups) for rollout in group]
    return Rollouts(examples=[(prompt, rollout.tokens) for prompt, rollout in rows],
                    logprobs=[rollout.logprobs for _, rollout in rows],
                    rewards=right + args.format_reward * readable, right=right,
                    stops=[rollout.stop for _, rollout in rows])


# ------------------------------------------------------------------------ 3. One step: score, update, measure
@dataclass
class Batch:
    """A micro-batch: B rollouts and the Q prompts that they continue, each prompt once. Log-probs and
    entropies are 0 where mask is False."""
    prompts: torch.Tensor          # (Q, P): every prompt but for its last token, padded
    lengths: torch.Tensor          # (Q,): how many tokens that are
    owner: torch.Tensor            # (B,): the prompt that a rollout continues
    inputs: torch.Tensor           # (B, T): the prompt's last token, then the response but for its last
    targets: torch.Tensor          # (B, T): the response, its end token included; -100 where padded
    mask: torch.Tensor             # (B, T): True where not padded
    sampled: torch.Tensor          # (B, T): the sampler's log-probs
    advantages: torch.Tensor       # (B,)
    kept: torch.Tensor             # (B,): False for a rollout that --max-kl dropped
    ref: torch.Tensor = None       # (B, T): log pi_ref
    entropy: torch.Tensor = None   # (B, T): of pi before the first update
    passes: list = field(default_factory=list)  # log pi (B, T) before each update; the first is log pi_old

    def logprobs(self, model, temperature):
        """Log-prob and entropy of the targets under a model, (B, T) each."""
        hidden = row_by_row(model, self) if sample.why_not_ours(model) else prompt_once(model, self)  # (n, H)
        targets = self.targets[self.mask]  # (n,)
        values = sample.token_logprobs(hidden, model.lm_head.weight, targets, temperature=temperature)
        zeros = torch.zeros(self.mask.shape, device=hidden.device)
        return tuple(zeros.masked_scatter(self.mask, value) for value in values)

    def trained(self):
        """The tokens that the loss is made of, (B, T)."""
        return self.mask & self.kept[:, None]


def row_by_row(model, batch):
    """Hidden states (n, H) from which the n targets are predicted, row after row: each rollout read whole,
    with its prompt. For models whose layers we do not know, and what `prompt_once` must equal."""
    T = batch.inputs.shape[1]
    place = batch.lengths[batch.owner][:, None] + torch.arange(T, device=batch.inputs.device)  # (B, T)
    rows = F.pad(batch.prompts[batch.owner], (0, T)).scatter(1, place, batch.inputs)  # (B, P + T)
    hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state  # (B, P + T, H)
    return hidden.gather(1, place[:, :, None].expand(-1, -1, hidden.shape[2]))[batch.mask]


def prompt_once(model, batch):
    """As `row_by_row`, but each prompt is computed once, with gradients, and seen by all of its rollouts: for
    a prompt of P tokens and N responses of R tokens, P + N R tokens in place of N (P + R).

    The model reads one sequence, all prompts and then all rollouts end to end, so that no product works on
    padding; only attention, to which Hugging Face hands `layout` on, lays them out as (Q, P) and (B, T)."""
    if model.config._attn_implementation != SHARED:
        model.set_attn_implementation(SHARED)
    (Q, P), (B, T), device = batch.prompts.shape, batch.inputs.shape, batch.inputs.device
    place = torch.arange(max(P, T), device=device)
    length = batch.lengths[:, None]  # (Q, 1)
    real = place[:P] < length  # (Q, P): not padding
    prompt_tokens, n = real.sum(), batch.mask.sum()
    # what each token of a rollout may look at, (B, T, P + T)
    visible = torch.cat((real[batch.owner][:, None].expand(B, T, P),
                         (place[:T] <= place[:T, None]).expand(B, T, T)), dim=2)
    layout = SimpleNamespace(
        # indices, found once here and not in each layer, where CUDA would wait for them
        real=real.nonzero(as_tuple=True), mask=batch.mask.nonzero(as_tuple=True),
        owner=batch.owner, visible=visible[:, None],
        prompts=torch.zeros(Q, P, dtype=torch.int64, device=device),  # where a token is in the sequence
        rows=torch.zeros(B, T, dtype=torch.int64, device=device))
    layout.prompts[real] = torch.arange(prompt_tokens, device=device)
    layout.rows[batch.mask] = prompt_tokens + torch.arange(n, device=device)
    tokens = torch.cat((batch.prompts[real], batch.inputs[batch.mask]))
    position = torch.cat((place[:P].expand(Q, P)[real], (length[batch.owner] + place[:T])[batch.mask]))
    output = model.model(input_ids=tokens[None], position_ids=position[None], use_cache=False, layout=layout)
    return output.last_hidden_state[0, prompt_tokens:]


def shared_attention(module, query, key, value, attention_mask, *, layout=None, **options):
    """What Hugging Face calls for each layer: query (1, heads, tokens, D), key and value (1, kv heads,
    tokens, D) -> (1, tokens, heads, D). Rollouts look at their own tokens and at their prompt's."""
    if layout is None:  # any other forward
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)

    # padded places take the first token: no real one looks at them, and `real` and `mask` drop what they give
    def lay(x, index):
        return x[0][:, index].transpose(0, 1)  # (., rows, columns, D) -> (rows, ., columns, D)

    q, k, v = (lay(x, layout.prompts) for x in (query, key, value))  # (Q, heads or kv heads, P, D)
    prompts = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k = torch.cat((k[layout.owner], lay(key, layout.rows)), dim=2)  # (B, kv heads, P + T, D)
    v = torch.cat((v[layout.owner], lay(value, layout.rows)), dim=2)
    q = lay(query, layout.rows)  # (B, heads, T, D)
    if q.is_cuda:  # where the fused kernels take a mask with as many kv heads as heads only
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.visible, enable_gqa=True)
    return torch.cat((prompts.transpose(1, 2)[layout.real], rows.transpose(1, 2)[layout.mask]))[None], None


SHARED = "prompts_shared"
AttentionInterface.register(SHARED, shared_attention)


def pack(examples, tokens):
    """Row numbers in micro-batches of at most `tokens` when padded (one row at least), a prompt counting
    once. To pad little, a prompt's rows stay together, and prompts with responses of similar length."""
    prompts, lengths = [tuple(prompt) for prompt, _ in examples], [len(response) for _, response in examples]
    longest = {}
    for prompt, length in zip(prompts, lengths):
        longest[prompt] = max(length, longest.get(prompt, 0))

    def size(rows):
        unique = {prompts[row] for row in rows}
        return len(unique) * max(map(len, unique)) + len(rows) * max(lengths[row] for row in rows)

    def order(row):
        return longest[prompts[row]], prompts[row], lengths[row]

    batches = []
    for row in sorted(range(len(examples)), key=order):
        if not batches or size([*batches[-1], row]) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def make_batch(examples, logprobs, advantages, device):
    """B rows, (prompt tokens, response tokens) and the sampler's log-probs of each, as a Batch."""
    prompts, responses = zip(*examples)
    unique = list(dict.fromkeys(map(tuple, prompts)))
    tensors = dict(
        prompts=sample.padded([prompt[:-1] for prompt in unique], 0),
        lengths=torch.tensor([len(prompt) - 1 for prompt in unique]),
        owner=torch.tensor([unique.index(tuple(prompt)) for prompt in prompts]),
        inputs=sample.padded([[prompt[-1], *response[:-1]] for prompt, response in examples], 0),
        targets=sample.padded(responses, sample.IGNORE), sampled=sample.padded(logprobs, 0.0),
        advantages=advantages)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    kept = torch.ones(len(examples), dtype=torch.bool, device=device)
    return Batch(**tensors, mask=tensors["targets"] != sample.IGNORE, kept=kept)


def make_batches(policy, rollouts, args):
    """The rollouts of a step as micro-batches; with --drop-flat without those of flat groups."""
    advantages = group_advantages(rollouts.rewards, std=not args.no_std).flatten()  # (Q N,)
    rows = list(range(len(advantages)))
    if args.drop_flat:
        uneven = rollouts.uneven().repeat_interleave(rollouts.rewards.shape[1])  # (Q N,)
        rows = [row for row in rows if uneven[row]]
    batches = []
    for group in pack([rollouts.examples[row] for row in rows], args.micro_tokens):
        members = [rows[i] for i in group]
        examples = [rollouts.examples[row] for row in members]
        logprobs = [rollouts.logprobs[row] for row in members]
        batches.append(make_batch(examples, logprobs, advantages[members], policy.device))
    return batches


@torch.no_grad()
def score(reference, batches, args):
    """log pi_ref; with --max-kl, a rollout whose mean KL to the reference is above it is dropped."""
    for batch in batches:
        batch.ref, _ = batch.logprobs(reference, args.temperature)
        if args.max_kl is not None:
            # the policy that sampled is the policy before its update: no forward pass more
            kl = kl_estimate(batch.sampled, batch.ref).sum(dim=1) / batch.mask.sum(dim=1)  # (B,)
            batch.kept = kl <= args.max_kl


def update(policy, optimizer, batches, args):
    """--epochs updates, each one step of the optimizer on the gradient of all batches. No weight has moved
    before the first: its log-probs are log pi_old. Returns (loss, gradient norm) of the last one."""
    kept = sum(batch.kept.sum().item() for batch in batches)  # of the whole step, like denom
    tokens = sum(batch.trained().sum().item() for batch in batches)
    denom = {"sequence": kept, "token": tokens, "constant": kept * args.max_new_tokens}[args.norm]
    norm = 0.0
    for _ in range(args.epochs):
        loss = 0.0
        for batch in batches:
            logprob, entropy = batch.logprobs(policy.model, args.temperature)
            batch.passes.append(logprob.detach())
            if batch.entropy is None:
                batch.entropy = entropy.detach()
            if kept:
                old = batch.passes[0]  # in the first update logprob itself: ratio is 1
                weight = importance_weight(old, batch.sampled, args.tis) if args.tis else None
                part = grpo_loss(logprob, old, batch.ref, batch.advantages, batch.trained(), clip=args.clip,
                                 clip_high=args.clip_high, beta=args.beta, kl=args.kl, norm=args.norm,
                                 denom=denom, entropy=entropy, entropy_bonus=args.entropy, weight=weight)
                part.backward()
                loss += part.item()
        if kept:  # else: no update, not even of the optimizer's momentum
            norm = optimizer.step(clip=args.max_grad_norm)
    return loss, norm


@torch.no_grad()
def measure(batches, args):
    """What the log wants to know: means over the response tokens, with the rollouts that --max-kl dropped and
    without the groups that --drop-flat left out; NaN where no group was left."""
    names = ("kl", "clip_frac", "entropy", "drift_mean", "drift_max")
    row = dict.fromkeys(names, 0.0 if batches else math.nan)
    row["dropped"] = sum((~batch.kept).sum().item() for batch in batches)
    row["rows"] = sum(len(batch.kept) for batch in batches)
    tokens = sum(batch.mask.sum().item() for batch in batches)
    high = args.clip if args.clip_high is None else args.clip_high
    for batch in batches:
        old = batch.passes[0]
        drift = (old - batch.sampled).abs()  # trainer against sampler: rounding, or a bug
        row["drift_mean"] += drift.sum().item() / tokens
        row["drift_max"] = max(row["drift_max"], drift.max().item())
        row["entropy"] += batch.entropy.sum().item() / tokens
        # --beta 0 keeps no reference: no KL is measured
        row["kl"] += math.nan if batch.ref is None else kl_estimate(old, batch.ref).sum().item() / tokens
        for logprob in batch.passes:
            ratio = (logprob - old).exp()
            outside = (ratio < 1 - args.clip) | (ratio > 1 + high)
            row["clip_frac"] += outside.sum().item() / tokens / args.epochs
    return row


def train_step(policy, reference, optimizer, rollouts, args):
    """Score the rollouts, update the policy, measure. Returns a row of the log."""
    start = time.time()
    batches = make_batches(policy, rollouts, args)
    if reference is not None:
        score(reference, batches, args)
    scored = time.time()
    loss, grad_norm = update(policy, optimizer, batches, args)
    row = measure(batches, args)
    return row | dict(loss=loss, grad_norm=grad_norm, s_score=scored - start, s_train=time.time() - scored)


# -------------------------------------------------------------------------------------------- 4. The problems
def problem_source(args, options):
    """(source, held_out): source() gives the problems in a fixed order from the first one on - fresh ones
    without end, or those of --data once; held_out are for greedy accuracy."""
    wanted = args.eval_n if args.eval_every else 0
    if args.data:
        problems = data.read_problems(args.data)
        trained = len(problems) - min(wanted, len(problems) // 10)
        return lambda: iter(problems[:trained]), problems[trained:]
    held_out = list(itertools.islice(data.generate(seed=args.seed, split="val", **options), wanted))
    return lambda: data.generate(seed=args.seed + 1_000_000, **options), held_out  # not the SFT's problems


def select(policy, problems, args, limit, wanted):
    """The paper's rejection sampling: numbers of the problems that the policy answers rightly in LO ... HI of
    8 rollouts, before the first step, so it is still the SFT policy. Tried are all problems of --data, or as
    many fresh ones as it takes to find `wanted`."""
    (low, high), chosen, tried, start = args.filter, [], 0, time.time()
    bar = tqdm(desc="filter", unit="problem")
    while args.data or len(chosen) < wanted:
        some = list(itertools.islice(problems, args.prompts))
        if not some or (not chosen and tried >= 1000):
            break
        # as steps 0, -Q, -2Q ... (Q = --prompts): seeds that no step of the training uses
        rollouts = roll_out(policy, some, args, -tried, FILTER_N, limit)
        right = rollouts.right.sum(dim=1).tolist()
        chosen += [number for number, count in enumerate(right, start=tried) if low <= count <= high]
        tried += len(some)
        bar.update(len(some))
        bar.set_postfix_str(f"{len(chosen)} kept")
    bar.close()
    if not chosen:
        raise data.InputError(f"--filter {low} {high}: the policy answers none of {tried} problems rightly "
                              f"in that many of {FILTER_N} rollouts; widen the range or take other problems")
    print(f"--filter {low} {high}: kept {len(chosen)} of {tried} problems after {tried * FILTER_N} rollouts, "
          f"{time.time() - start:.0f} s")
    return chosen


def problem_stream(source, chosen, args, done):
    """The problems of the steps after `done`: what a step takes follows from its number alone."""
    problems = source()
    if chosen is not None:
        members = set(chosen)
        problems = (problem for number, problem in enumerate(problems) if number in members)
    if args.data:
        problems = itertools.cycle(problems)
    return itertools.islice(problems, done * args.prompts, None)


# ------------------------------------------------------------------------------------------------ 5. The loop
COLUMNS = ("step reward accuracy all_wrong mixed all_right kl clip_frac entropy mean_tokens cut_rate "
           "grad_norm drift_mean drift_max tokens_per_s s_sample s_score s_train val_accuracy val_n").split()
PROGRESS = ("reward {reward:.2f}, groups 0/mixed/1 {all_wrong:.2f}/{mixed:.2f}/{all_right:.2f}, KL {kl:.4f}, "
            "{mean_tokens:.0f} tokens, {tokens_per_s:,.0f} tokens/s")


def take_step(policy, reference, optimizer, problems, step, limit, args):
    """One step: roll out, then train. Returns (rollouts, the step's row of the log)."""
    start = time.time()
    rollouts = roll_out(policy, problems, args, step, args.n, limit)
    s_sample = time.time() - start
    if args.lr_decay:
        left = (args.steps - step + 1) / (args.lr_decay * args.steps)
        optimizer.adam.param_groups[0]["lr"] = args.lr * min(1.0, left)
    row = train_step(policy, reference, optimizer, rollouts, args)
    alpha = rollouts.right.mean(dim=1)  # (Q,): share of right answers in a group
    tokens = sum(len(response) for _, response in rollouts.examples)
    row.update(step=step, s_sample=s_sample, tokens_per_s=tokens / (time.time() - start),
               reward=rollouts.rewards.mean().item(), accuracy=rollouts.right.mean().item(),
               all_wrong=(alpha == 0).float().mean().item(), all_right=(alpha == 1).float().mean().item(),
               mixed=((alpha > 0) & (alpha < 1)).float().mean().item(),
               mean_tokens=tokens / len(rollouts.stops),
               cut_rate=rollouts.stops.count("length") / len(rollouts.stops))
    return rollouts, row


def watch(row, args, checked):
    """Say what a person should know about a step; stop on what cannot be right. checked: whether the first
    mixed step has been; its new value is returned."""
    step = row["step"]
    sft.check_finite(step, row["loss"], row["grad_norm"], "look at grad_norm and kl in the log, and begin "
                     "anew under another --out with a lower --lr or --max-grad-norm")
    if row["drift_mean"] > 0.02:
        words = (f"step {step}: sampler and trainer disagree by {row['drift_mean']:.3f} nats a token on "
                 "average (expected: below 0.02)")
        if not checked:  # from the start: a bug or a broken checkpoint; later: keep what the run has learned
            raise data.InputError(f"{words}; this is a bug or a broken checkpoint, not noise")
        tqdm.write(f"warning: {words}")
    if row["cut_rate"] >= 0.3:
        tqdm.write(f"warning: step {step}: {row['cut_rate']:.0%} of the rollouts were cut at "
                   f"--max-new-tokens {args.max_new_tokens}; raise it, or they cannot be right")
    if row["dropped"] and row["dropped"] >= 0.5 * row["rows"]:
        tqdm.write(f"warning: step {step}: --max-kl {args.max_kl} dropped {row['dropped']} of {row['rows']} "
                   "rollouts: the policy has moved far from its reference; raise --beta or lower --lr")
    if row["mixed"] and not checked:
        if row["grad_norm"] == 0 and not row["dropped"]:
            raise data.InputError(f"step {step}: a mixed group, yet the gradient is 0: nothing would be "
                                  "learned")
        tqdm.write(f"first mixed groups at step {step}: gradient norm {row['grad_norm']:.3g}, sampler and "
                   f"trainer agree to {row['drift_mean']:.1e} nats a token; a loss near 0 "
                   f"({row['loss']:.1e}) is expected, see the top of grpo.py")
        return True
    return checked


def stuck(row, args, policy, examples):
    """Why a run without a mixed group cannot learn, with one rollout to look at."""
    if row["all_wrong"] >= row["all_right"]:
        why = ("all rollouts are wrong: the problems are too hard or the format is not learned; take "
               "easier problems (a lower --ops or --depth) or train sft.py longer")
    else:
        why = "all rollouts are right: the problems are too easy; take harder ones (raise --ops or --depth)"
    text = sample.decode(policy.tokenizer, examples[0][1])[:400]
    return f"no mixed group in {args.patience} steps, so nothing can be learned: {why}. One rollout: {text!r}"


def validate(policy, held_out, limit, args, row):
    """Greedy accuracy on the held-out problems, for the log."""
    found = sample.greedy_accuracy(policy, held_out, max_new_tokens=args.max_new_tokens, max_batch=limit)
    tqdm.write(f"step {row['step']}: reward {row['reward']:.3f}, greedy accuracy {found['accuracy']:.1%} on "
               f"{found['n']} held-out problems")
    return dict(val_accuracy=found["accuracy"], val_n=found["n"])


def train(policy, reference, optimizer, source, held_out, limit, args, run):
    """The steps that are left: roll out and update, watch, log, save."""
    done, chosen = run.state["step"], run.state.get("chosen")
    quiet, checked = run.state.get("quiet", 0), run.state.get("checked", False)
    if args.filter and chosen is None:
        chosen = select(policy, source(), args, limit, wanted=args.steps * args.prompts)
        run.save(0, optimizer, limit=limit, chosen=chosen)
    problems = problem_stream(source, chosen, args, done)
    log = sft.Log(args.out.removesuffix(".pt") + ".csv", COLUMNS, keep=done)
    progress = tqdm(range(done + 1, args.steps + 1), "grpo", total=args.steps, initial=done, unit="step")
    with run.ctrl_c:
        for step in progress:
            some = list(itertools.islice(problems, args.prompts))
            rollouts, row = take_step(policy, reference, optimizer, some, step, limit, args)
            checked = watch(row, args, checked)
            if args.eval_every and held_out and (step % args.eval_every == 0 or step in (1, args.steps)):
                row.update(validate(policy, held_out, limit, args, row))
            log.row(**{name: value for name, value in row.items() if not math.isnan(value)})
            progress.set_postfix_str(PROGRESS.format(**row).replace("KL nan", "KL -"))
            quiet = 0 if rollouts.uneven().any() else quiet + 1
            if quiet >= args.patience:
                raise data.InputError(stuck(row, args, policy, rollouts.examples))
            run.end_of_step(step, step == args.steps, args.save_every, optimizer,
                            limit=limit, chosen=chosen, quiet=quiet, checked=checked)


# ---------------------------------------------------------------------------------- 6. Hand-over (sft.py, 8)
def hand_over(policy, problems, held_out, args):
    """--hand-over: the problems with their reward's answer, in records that serve TRL and verl, and our flags
    under their names."""
    def records(problems, split):
        return [{"prompt": [{"role": "user", "content": problem.question}], "answer": problem.answer,
                 "data_source": problem.task, "ability": "math",
                 "reward_model": {"style": "rule", "ground_truth": problem.answer},
                 "extra_info": {"split": split, "index": index}} for index, problem in enumerate(problems)]

    longest = max(len(sample.encode_prompt(policy.tokenizer, p.question)) for p in [*problems, *held_out])
    validation = {"val.jsonl": records(held_out, "val")} if held_out else {}
    sft.hand_over(args.hand_over, policy, {
        "rl.jsonl": records(problems, "train"), **validation,
        "trl-grpo.yaml": trl_settings(policy, args, longest),
        "verl-grpo.sh": verl_settings(args, longest, bool(held_out))})
    if args.drop_flat:
        print("groups without variance, which a tiny model leaves out here, stay in TRL and verl")


def trl_settings(policy, args, longest):
    """trl-grpo.yaml. longest: tokens of the longest prompt."""
    updates = args.steps * args.epochs
    settings = dict(
        output_dir="grpo", reward_funcs=["data.trl_reward"], max_steps=updates, num_iterations=args.epochs,
        num_generations=args.n, max_completion_length=args.max_new_tokens, temperature=args.temperature,
        shuffle_dataset=False, disable_dropout=True, max_grad_norm=args.max_grad_norm,
        loss_type={"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}[args.norm],
        scale_rewards="none" if args.no_std else "group", epsilon=args.clip,
        epsilon_high=args.clip if args.clip_high is None else args.clip_high, beta=args.beta,
        use_bias_correction_kl=False, entropy_coef=args.entropy,
        vllm_importance_sampling_correction=args.tis is not None)
    if args.tis:
        settings.update(vllm_importance_sampling_mode="token_truncate",
                        vllm_importance_sampling_clip_max=args.tis)
    if args.lr_decay:
        settings.update(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=dict(
            num_decay_steps=round(args.lr_decay * updates), decay_type="linear"))
    return sft.trl_settings(policy, args, "rl.jsonl", args.prompts * args.n, longest + args.max_new_tokens,
                            **settings)


def verl_settings(args, longest, validates):
    """verl-grpo.sh. longest: tokens of the longest prompt; validates: whether there is a val.jsonl (verl asks
    for a file in any case)."""
    actor, rollout, trainer = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "trainer"
    settings = {
        "data.train_files": "$PWD/rl.jsonl", "data.shuffle": False,
        "data.val_files": "$PWD/val.jsonl" if validates else "$PWD/rl.jsonl",
        f"{trainer}.test_freq": args.eval_every if validates else -1,
        "data.train_batch_size": args.prompts, "data.max_prompt_length": longest,
        "data.max_response_length": args.max_new_tokens,
        "reward.custom_reward_function.path": "$PWD/data.py",
        "reward.custom_reward_function.name": "compute_score",
        "algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": not args.no_std,
        "actor_rollout_ref.model.path": "$PWD/policy",
        "actor_rollout_ref.model.enable_gradient_checkpointing": args.gradient_checkpointing,
        f"{actor}.ppo_mini_batch_size": args.prompts, f"{actor}.ppo_epochs": args.epochs,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": max(args.micro_tokens, longest + args.max_new_tokens),
        f"{actor}.loss_agg_mode": {"sequence": "seq-mean-token-mean", "token": "token-mean",
                                   "constant": "seq-mean-token-sum-norm"}[args.norm],
        f"{actor}.loss_scale_factor": args.max_new_tokens if args.norm == "constant" else "null",
        f"{actor}.clip_ratio": args.clip, f"{actor}.clip_ratio_low": args.clip,
        f"{actor}.clip_ratio_high": args.clip if args.clip_high is None else args.clip_high,
        f"{actor}.clip_ratio_c": 1e9,  # verl also bounds ratios of negative advantages, at 3: out of the way
        f"{actor}.use_kl_loss": args.beta > 0, f"{actor}.kl_loss_coef": args.beta,
        f"{actor}.kl_loss_type": "low_var_kl", f"{actor}.entropy_coeff": args.entropy,
        f"{actor}.optim.lr": args.lr, f"{actor}.optim.betas": "[0.9,0.95]",
        f"{actor}.optim.weight_decay": args.weight_decay, f"{actor}.optim.clip_grad": args.max_grad_norm,
        f"{rollout}.name": "vllm", f"{rollout}.n": args.n, f"{rollout}.temperature": args.temperature,
        f"{rollout}.tensor_model_parallel_size": 1,
        "algorithm.rollout_correction.rollout_is": "token" if args.tis else "null",
        "algorithm.rollout_correction.rollout_is_threshold": args.tis or "null",
        f"{trainer}.total_training_steps": args.steps, f"{trainer}.total_epochs": args.steps,
        f"{trainer}.save_freq": args.save_every, f"{trainer}.val_before_train": False,
        f"{trainer}.logger": "[console]", f"{trainer}.default_local_dir": "$PWD/verl"}
    lines = [f'    "{name}={value}"' for name, value in settings.items()]
    note = "# verl has no linear decay: --lr-decay is left out\n" if args.lr_decay else ""
    start = f'cd "$(dirname "$0")"\n{note}python3 -m verl.trainer.main_ppo'
    return " \\\n".join([start, *lines, '    "$@"\n'])


# --------------------------------------------------------------------------------------------- 7. The command
PRESETS = {"tiny": dict(lr=2e-4, lr_decay=0.3, prompts=16, n=8, steps=120, max_new_tokens=400, beta=1e-3,
                        drop_flat=True),
           "tiny, promptbench": dict(beta=0.005),  # with less, reflections may turn false (regimes.md, 10)
           "paper": dict(lr=1e-6, lr_decay=0.0, prompts=32, n=32, steps=200, max_new_tokens=2560, beta=1e-3,
                         drop_flat=False)}


def add_flags(parser):
    usual = sft.describe_presets(PRESETS)
    add = parser.add_argument
    add("--ckpt", help="the SFT policy: .pt file, Hugging Face folder or name; default: sft.pt or tiny base")
    sft.add_run_flags(parser, out="grpo.pt")
    problems = parser.add_argument_group("problems")
    data.add_problem_flags(problems)
    add = problems.add_argument
    add("--data", help="JSONL of problems, again and again; default: fresh ones, never the same twice")
    add("--filter", type=int, nargs=2, metavar=("LO", "HI"), help="only problems that the SFT policy answers "
        "rightly in LO ... HI of 8 rollouts, sampled before the first step (paper: 1 7)")
    add = parser.add_argument_group("rollouts").add_argument
    add("--steps", type=data.positive_int, help=usual.steps)
    add("--prompts", type=data.positive_int, help=f"problems a step; {usual.prompts}")
    add("--n", type=data.number(int, 2, 2**31 - 1, "at least 2: a group of one has no advantage"),
        help=f"rollouts a problem; {usual.n}")
    add("--max-new-tokens", type=data.positive_int, help=usual.max_new_tokens)
    add("--temperature", type=data.number(float, 1e-3, math.inf, "a number of at least 0.001"), default=1.0)
    add("--format-reward", type=data.not_negative, default=0.0,
        help="added where the answer can be read, right or wrong (released code, Llama: 0.05)")
    add = parser.add_argument_group("loss").add_argument
    add("--lr", type=data.positive, help=usual.lr)
    add("--lr-decay", type=data.share,
        help=f"share of the steps, at the end, in which lr falls to 0; {usual.lr_decay}")
    add("--beta", type=data.not_negative, help=f"KL coefficient, 0 keeps no reference policy; {usual.beta}")
    add("--kl", choices=["k1", "k2", "k3"], default="k3", help="KL estimator")
    add("--max-kl", type=data.positive,
        help="drop rollouts whose mean KL to the reference is above (released code, Llama: 0.15)")
    add("--clip", default=0.2,
        type=data.number(float, math.ulp(0), 1, "above 0 and at most 1, since a ratio cannot fall below 0"))
    add("--clip-high", type=data.not_negative, help="another upper clip (DAPO); default: --clip")
    add("--norm", choices=["sequence", "token", "constant"], default="sequence",
        help="what the loss is divided by")
    add("--no-std", action="store_true", help="advantages without division by the group's std (Dr. GRPO)")
    add("--drop-flat", action=argparse.BooleanOptionalAction,
        help="groups without variance leave the batch, and with them their KL (DAPO); default: for a tiny "
             "model only")
    add("--entropy", type=data.not_negative, default=0.0,
        help="coefficient of an entropy bonus (released code, Qwen: 0.001)")
    add("--tis", type=data.number(float, 1, math.inf, "at least 1: a lower one weighs all tokens down"),
        metavar="CAP", help="weight tokens by min(pi_old / pi_sampler, CAP)")
    add("--epochs", type=data.positive_int, default=1, help="updates on one batch of rollouts")
    add("--max-grad-norm", type=data.positive, default=1.0)
    add = parser.add_argument_group("watching").add_argument
    add("--eval-every", type=data.natural, default=25,
        help="steps between measurements of greedy accuracy on held-out problems; 0: never")
    add("--eval-n", type=data.natural, default=100,
        help="how many held-out problems; with --data the last of the file, at most a tenth")
    add("--patience", type=data.positive_int, default=30, help="steps without a mixed group until it stops")


def defaults(model, task):
    """{flag: its value where it is not given} for this model and task."""
    parser = data.Parser("")
    add_flags(parser)
    return vars(parser.parse_args([])) | sft.preset(model, PRESETS, task)


def check(args, parser, checkpoint):
    """Refuse flags that contradict each other, each in one sentence."""
    sft.check_files(args, parser, checkpoint)
    if args.hand_over:
        only_here = ["kl", "max_kl", "format_reward", "filter"] + ["drop_flat"] * bool(args.drop_flat)
        parser.refuse(args, only_here, "with --hand-over, since TRL and verl do not both have it")
        parser.refuse(args, ["patience"], "with --hand-over, since neither TRL nor verl has it")
    if args.filter and not 0 <= args.filter[0] <= args.filter[1] <= FILTER_N:
        raise data.InputError(f"--filter {args.filter[0]} {args.filter[1]}: right rollouts of {FILTER_N}, "
                              "the lower number first")
    if args.beta == 0:
        parser.refuse(args, ("kl", "max_kl"), "with --beta 0, which keeps no reference policy")
    if args.eval_every and not args.eval_n:
        raise data.InputError("--eval-n 0: pass --eval-every 0 to measure nothing")


def memory(policy, args, longest, rows):
    """The parts of sft.predict_memory for prompts of up to `longest` tokens, `rows` rollouts at a time."""
    length = longest + args.max_new_tokens
    return sft.predict_memory(policy.model, max(args.micro_tokens, length), reference=args.beta > 0,
                              checkpointing=args.gradient_checkpointing, sampler=(rows, length))


def sampler_rows(policy, args, longest):
    """How many rollouts are sampled at a time: asked once and kept for the whole run, since the batch's shape
    changes rounding. The sampler keeps its cache between steps, so on CUDA it gets what training leaves."""
    limit = min(args.prompts * args.n, sample.batch_limit(policy, longest, args.max_new_tokens))
    if policy.device.type == "cuda":
        parts = memory(policy, args, longest, rows=1)
        left = sft.free_memory(policy.model) - sum(parts.values())
        limit = max(1, min(limit, int(0.9 * left / parts["sampler"])))
    return limit


def announce(policy, args, options, longest, limit):
    """What the run will do and what it will take."""
    drawn = ", ".join(f"{name} {value}" for name, value in options.items())
    print(sample.describe(policy))
    print(sft.describe_memory(memory(policy, args, longest, rows=limit), sft.free_memory(policy.model)))
    print(f"{args.steps} steps of {args.prompts} problems x {args.n} rollouts "
          f"({args.data or 'fresh, ' + drawn}), at most {args.max_new_tokens} new tokens, {limit} rollouts "
          f"at a time; lr {args.lr}, beta {args.beta}; writes {args.out} and its .csv")


def main():
    parser = data.Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args()
    options = sft.problem_options(args, parser)
    checkpoint = sample.default_checkpoint(args.ckpt, args.task)
    check(args, parser, checkpoint)
    run = None if args.hand_over else sft.Run(args.out, args.resume)
    policy = sample.load_policy(checkpoint)
    sft.fill_in(args, policy.model, PRESETS)
    source, held_out = problem_source(args, options)
    if args.hand_over:
        problems = list(itertools.islice(source(), args.steps * args.prompts))
        return hand_over(policy, problems, held_out, args)
    sft.check_head(policy)
    some = itertools.islice(source(), None if args.data else 64)  # fresh problems have no end
    prompts = [sample.encode_prompt(policy.tokenizer, problem.question) for problem in [*some, *held_out]]
    sample.check_request(policy, prompts, args.n, args.max_new_tokens)
    longest = max(map(len, prompts))
    limit = run.state.get("limit") or sampler_rows(policy, args, longest)
    announce(policy, args, options, longest, limit)
    # --lr-decay and --filter look ahead to the last step; without them a run may be made longer
    longer = () if args.lr_decay or args.filter else ("steps",)
    run.begin(args, policy.model, free=(*longer, *sft.ROUNDING))
    if args.steps < run.state["step"]:
        raise data.InputError(f"--steps {args.steps}: {run.path} is at step {run.state['step']} already")
    # frozen, and made before a resumed run's weights are loaded: it is the SFT policy in any case
    reference = copy.deepcopy(policy.model).requires_grad_(False) if args.beta else None
    optimizer = sft.Optimizer(policy.model, args.lr, args.weight_decay)
    if "optimizer" in run.state:
        optimizer.load_state(run.state.pop("optimizer"))
    if args.gradient_checkpointing:
        sft.checkpoint_layers(policy.model)
    train(policy, reference, optimizer, source, held_out, limit, args, run)
    info = dict(vars(args), ckpt=str(checkpoint), base=policy.info, stage="grpo")
    sample.save_policy(args.out, policy, info)
    if args.export:
        sample.export_policy(policy, args.export)
    run.finish()
    print(f"{args.out}: done; next: python eval.py{data.task_flag(args.task)} --ckpt {checkpoint} {args.out}")


if __name__ == "__main__":
    data.run_cli(main)
