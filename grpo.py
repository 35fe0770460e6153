"""Chapter 5. Reinforcement learning with GRPO: try N times, and lean towards what worked.

    python grpo.py --ckpt sft.pt                            # the embedded default
    python grpo.py --ckpt sft.pt --ops 15 20 --prompts 32 --n 32 --max-new-tokens 2560 --lr 1e-6 --steps 200
    python grpo.py --ckpt sft.pt --resume                   # go on after a kill or Ctrl-C
    python grpo.py --ckpt sft.pt --norm token --clip-high 0.28 --drop-flat --beta 0    # DAPO's loss

One step: Q problems, N rollouts of each, reward 1 where the boxed answer is right and 0 elsewhere. The advantage
of a rollout is its reward against its own group's, and every token of the rollout is pushed by it:

    A_i = (r_i - mean(r)) / (std(r) + eps)                                   over the N rollouts of one problem
    ratio_t = pi(o_t) / pi_old(o_t)
    loss = - mean over rollouts of mean over tokens of  min(ratio A, clip(ratio, 1-eps, 1+eps) A) - beta KL_t

Only *mixed* groups teach: where all N are right, or all wrong, every advantage is 0. That is why BRIDGE prepares the
model first. KL_t holds the policy near the SFT policy (k3 estimator, Schulman 2020: exp(d) - d - 1 with d = log pi_ref - log pi).

Departures from the paper and notes on it:
1. with one update per batch of rollouts (the paper's setting, the default here) ratio is 1 at every token, the clip never
   acts, and the value of the loss is about 0. Its gradient is not: d ratio = d log pi. `--epochs 2` makes the clip act;
2. k3 inside the loss is a biased estimate of the KL's gradient (low variance, small at small beta); we follow the paper;
3. groups without variance still carry the KL's gradient, as in the paper; `--drop-flat` drops them, as DAPO does;
4. for the tiny model, batch and learning rate are its own, and the latter decays at the end (PRESETS below).
"""
import argparse, copy, itertools, time

import torch
from tqdm import tqdm

import data, sample, sft

PRESETS = {"tiny": dict(lr=2e-4, lr_decay=0.3, prompts=16, n=8, steps=220, max_new_tokens=256, beta=1e-3),
           "paper": dict(lr=1e-6, lr_decay=0.0, prompts=32, n=32, steps=200, max_new_tokens=2560, beta=1e-3)}
FILTER_N = 8  # rollouts a problem with which the paper measures rollout accuracy
COLUMNS = ("step reward accuracy all_wrong mixed all_right kl clip_frac entropy mean_tokens cut_rate grad_norm drift_mean "
           "drift_max tokens_per_s s_sample s_score s_train val_accuracy val_n").split()


# ------------------------------------------------------------------------------- the mathematics, without a model
def group_advantages(rewards, std=True, eps=1e-6):
    """Advantage of each rollout within its group. rewards (Q, N) -> (Q, N), rows summing to 0.

    std: divide by the group's standard deviation (N - 1 in its denominator, as in the released code; Proposition 3.1
    writes the population form, smaller by sqrt((N-1)/N), which makes advantages larger by sqrt(N/(N-1))). False gives
    Dr. GRPO. A group without variance gets exactly 0.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not std:
        return centred
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    return centred / (rewards.std(dim=1, keepdim=True) + eps)


def kl_estimate(logprob, ref_logprob, kind="k3"):
    """Per-token estimate of KL(pi || pi_ref) from tokens drawn from pi; d = log pi_ref - log pi:
    k1 = -d (unbiased, can be negative), k2 = d^2 / 2 (biased), k3 = exp(d) - d - 1 (unbiased, never negative).

    >>> [round(kl_estimate(torch.tensor(-1.0), torch.tensor(-1.5), kind).item(), 4) for kind in ("k1", "k2", "k3")]
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


def grpo_loss(logprob, old_logprob, ref_logprob, advantages, mask, *, clip=0.2, clip_high=None, beta=1e-3, kl="k3",
              norm="sequence", denom=None, entropy=None, entropy_bonus=0.0, weight=None):
    """The GRPO loss of a batch, to be minimised (arXiv 2402.03300, eq. 3). Inputs are left unchanged. One token adds

        - weight_t min(ratio_t A, clip(ratio_t, 1-clip, 1+clip_high) A) + beta KL_t - entropy_bonus H_t

    logprob (B, T), differentiable; old_logprob (B, T), the trainer's own value before the first update on this batch;
    ref_logprob (B, T) or None where beta is 0; advantages (B,); mask (B, T), 1 on response tokens.
    norm: "sequence" (mean over tokens, then over rollouts: the paper), "token" (mean over all tokens: DAPO) or "constant"
    (sum of tokens / denom: Dr. GRPO). denom: the denominator of the *whole* batch - rollouts, tokens or the constant -
    so that the losses of micro-batches add up to the loss of the batch; None: this batch alone.
    entropy (B, T): H_t, differentiable, needed for a bonus only; weight (B, T): importance_weight below, or None for 1.
    A rollout that was dropped has mask 0 throughout and must be missing from denom as well.

    >>> lp = torch.tensor([[-1., -2.]]); A = torch.tensor([2.]); one = torch.ones(1, 2)
    >>> grpo_loss(lp, lp - 0.5, lp, A, one)          # ratio e^0.5 = 1.65 is clipped to 1.2: -1.2 * 2
    tensor(-2.4000)
    """
    mask = mask.to(logprob.dtype)
    # where masked, 0 stands in for whatever is there: NaN * 0 would be NaN
    keep = mask.bool()
    ratio = (logprob - old_logprob).masked_fill(~keep, 0).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    advantage = advantages[:, None]
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if weight is not None:
        loss = loss * weight.masked_fill(~keep, 0)
    if entropy_bonus:
        loss = loss - entropy_bonus * entropy.masked_fill(~keep, 0)
    if beta:
        loss = loss + beta * kl_estimate(logprob.masked_fill(~keep, 0), ref_logprob.masked_fill(~keep, 0), kl)
    loss = loss * mask
    if norm == "sequence":
        return (loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / (denom or len(loss))
    if norm == "token":
        return loss.sum() / (denom or mask.sum().clamp(min=1))
    if norm == "constant":
        return loss.sum() / (denom or loss.numel())
    raise ValueError(f"norm must be sequence, token or constant, not {norm!r}")


def importance_weight(old_logprob, sampler_logprob, cap):
    """Truncated importance sampling: min(pi_old / pi_sampler, cap) per token, for a sampler that rounds differently from the
    trainer. Not differentiated; the cap bounds the variance that a few unlikely tokens would bring.

    >>> importance_weight(torch.tensor([-1.0, -1.0, -1.5]), torch.tensor([-2.0, -1.0, -1.0]), cap=2.0)
    tensor([2.0000, 1.0000, 0.6065])
    """
    return (old_logprob - sampler_logprob).exp().clamp(max=cap)


# ------------------------------------------------------------------------------------------------ one step
def roll_out(policy, problems, args, step, n, limit=None):
    """n rollouts of each problem, at most `limit` at a time -> (examples, sampled log-probs, rewards (Q, N), right (Q, N),
    stop reasons). The reward is 1 for a right answer, plus --format-reward for one that can be read."""
    prompts = [sample.encode_prompt(policy.tokenizer, problem.question) for problem in problems]
    groups = sample.generate(policy, prompts, n=n, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                             seed=args.seed * 1_000_003 + step, max_batch=limit)
    texts = [[sample.decode(policy.tokenizer, r.tokens) for r in group] for group in groups]
    right = torch.tensor([[data.reward(text, problem.answer) for text in group] for problem, group in zip(problems, texts)])
    readable = torch.tensor([[float(data.read_answer(text) is not None) for text in group] for group in texts])
    rollouts = [rollout for group in groups for rollout in group]
    examples = [(prompt, rollout.tokens) for prompt, group in zip(prompts, groups) for rollout in group]
    return examples, [r.logprobs for r in rollouts], right + args.format_reward * readable, right, [r.stop for r in rollouts]


def select(policy, problems, args, limit, wanted):
    """The paper's rejection sampling: numbers of the problems that the SFT policy answers rightly in LO ... HI of 8 rollouts.

    Done before the first step, so the policy is still the SFT policy. It costs 8 rollouts for each problem of --data, or, with
    fresh problems, for as many as it takes to find `wanted`: where half are kept, 16 rollouts a problem to come."""
    (low, high), chosen, tried, start = args.filter, [], 0, time.time()
    bar = tqdm(desc="filter", unit="problem")
    while (args.data or len(chosen) < wanted) and (chunk := list(itertools.islice(problems, args.prompts))):
        right = roll_out(policy, chunk, args, -tried, FILTER_N, limit)[3].sum(dim=1)  # step 0 and below: no draw of a step to come
        found = [tried + i for i, count in enumerate(right.tolist()) if low <= count <= high]
        chosen, tried = chosen + found, tried + len(chunk)
        bar.update(len(chunk))
        bar.set_postfix_str(f"{len(chosen)} kept")
        if not chosen and tried >= 1000:
            break
    bar.close()
    if not chosen:
        raise data.InputError(f"--filter {low} {high}: the policy answers none of {tried} problems rightly in that many of {FILTER_N} "
                              "rollouts; widen the range or take other problems")
    print(f"--filter {low} {high}: kept {len(chosen)} of {tried} problems after {tried * FILTER_N} rollouts, {time.time() - start:.0f} s")
    return chosen


def cut(examples, rows, sampled, policy):
    """A micro-batch of rollouts as tensors: inputs, targets, mask, and the sampler's log-probs, all (B, T)."""
    inputs, targets = sft.collate([examples[row] for row in rows], policy.device, policy.tokenizer.pad_token_id or 0)
    mask = targets != sample.IGNORE
    drawn = torch.zeros(targets.shape, device=policy.device)
    drawn[mask] = torch.tensor([x for row in rows for x in sampled[row]], device=policy.device)
    return inputs, targets, mask, drawn


def train_step(policy, reference, optimizer, examples, sampled, rewards, args):
    """Score the rollouts, then `args.epochs` updates on them. Returns what the log wants to know."""
    advantages = group_advantages(rewards, std=not args.no_std).flatten().to(policy.device)
    counts = torch.ones(len(examples), dtype=torch.bool)  # which rollouts the loss is made of
    if args.drop_flat:
        counts = (rewards.amax(dim=1) > rewards.amin(dim=1)).repeat_interleave(rewards.shape[1])
    scored = counts.nonzero().flatten().tolist()
    lengths = [len(examples[row][0]) + len(examples[row][1]) for row in scored]
    parts = [[scored[i] for i in group] for group in sft.micro_batches(lengths, args.micro_tokens)]
    tokens = sum(len(examples[row][1]) for row in scored)
    start = time.time()
    old, ref = {}, {}
    with torch.no_grad():
        for k, rows in enumerate(parts):
            inputs, targets, mask, drawn = cut(examples, rows, sampled, policy)
            if reference is not None:
                ref[k] = sft.response_logprobs(reference, inputs, targets, args.temperature)[0]
            if args.max_kl is not None:  # the policy that sampled is the policy before its update: no forward pass more
                counts[rows] = ((kl_estimate(drawn, ref[k]) * mask).sum(dim=1) / mask.sum(dim=1) <= args.max_kl).cpu()
            if args.epochs > 1:
                old[k] = sft.response_logprobs(policy.model, inputs, targets, args.temperature)[0]
    left = [row for row in scored if counts[row]]
    denom = {"sequence": len(left), "token": sum(len(examples[row][1]) for row in left),
             "constant": len(left) * args.max_new_tokens}[args.norm]
    scored_at, sums = time.time(), dict.fromkeys(("kl", "clip_frac", "entropy", "drift_mean"), 0.0)
    drift_max, loss, grad_norm = 0.0, 0.0, 0.0
    for epoch in range(args.epochs):
        for k, rows in enumerate(parts):
            inputs, targets, mask, drawn = cut(examples, rows, sampled, policy)
            logprob, entropy = sft.response_logprobs(policy.model, inputs, targets, args.temperature)
            before = old.get(k, logprob.detach())  # with one update, the value before it is the value now
            if left:
                part = grpo_loss(logprob, before, ref.get(k), advantages[rows], mask & counts[rows].to(mask.device)[:, None],
                                 clip=args.clip, clip_high=args.clip_high, beta=args.beta, kl=args.kl, norm=args.norm, denom=denom,
                                 entropy=entropy, entropy_bonus=args.entropy,
                                 weight=importance_weight(before, drawn, args.tis) if args.tis else None)
                part.backward()
                loss += part.item()
            with torch.no_grad():
                now = logprob.detach()
                if epoch == 0:
                    drift = (now - drawn).abs()[mask]
                    sums["drift_mean"] += drift.sum().item() / tokens
                    drift_max = max(drift_max, drift.max().item())
                    sums["entropy"] += entropy.detach()[mask].sum().item() / tokens
                    if k in ref:
                        sums["kl"] += kl_estimate(now, ref[k])[mask].sum().item() / tokens
                ratio = (now - before).exp()[mask]
                outside = (ratio < 1 - args.clip) | (ratio > 1 + (args.clip if args.clip_high is None else args.clip_high))
                sums["clip_frac"] += outside.sum().item() / tokens / args.epochs
        if left:  # else: no update, not even the optimizer's momentum
            grad_norm = optimizer.step(clip=args.max_grad_norm)
    return dict(sums, loss=loss, drift_max=drift_max, grad_norm=grad_norm, dropped=len(scored) - len(left),
                s_score=scored_at - start, s_train=time.time() - scored_at)


# ------------------------------------------------------------------------------------------------ the loop
def problem_source(args, options):
    """(source, held_out): source() gives the problems in a fixed order from the first one on - fresh ones without end, or those
    of --data once; held_out are for greedy accuracy."""
    if args.data:
        problems = data.read_problems(args.data)
        trained = len(problems) - (min(args.eval_n, len(problems) // 10) if args.eval_every else 0)
        return lambda: iter(problems[:trained]), problems[trained:]
    held_out = data.generate(seed=args.seed, split="val", **options)
    return (lambda: data.generate(seed=args.seed + 1_000_000, **options),  # not the SFT's problems
            list(itertools.islice(held_out, args.eval_n if args.eval_every else 0)))


def memory(policy, args, longest, rows):
    length = longest + args.max_new_tokens
    return sft.predict_memory(policy.model, max(args.micro_tokens, length), reference=args.beta > 0,
                              checkpointing=args.gradient_checkpointing, sampler=(rows, length))


def sampler_rows(policy, args, longest, training, row):
    """How many rollouts are sampled at a time: asked once and kept for the whole run, since the batch's shape changes rounding.
    The sampler keeps its cache between steps, so on CUDA it gets what `training` bytes leave; a row takes `row` bytes."""
    limit = min(args.prompts * args.n, sample.batch_limit(policy, longest, args.max_new_tokens))
    if policy.device.type == "cuda":
        limit = max(1, min(limit, int(0.9 * (sft.free_memory(policy.model) - training) / row)))
    return limit


def train(policy, reference, optimizer, source, held_out, limit, args, run):
    """The steps that are left: roll out, update, log, save."""
    state, first = run.state, run.state["step"]
    quiet, checked, chosen = state.get("quiet", 0), state.get("checked", False), state.get("chosen")
    if args.filter and chosen is None:
        chosen = select(policy, source(), args, limit, wanted=args.steps * args.prompts)
        run.save(0, optimizer, limit=limit, chosen=chosen)
    log = sft.Log(args.out.removesuffix(".pt") + ".csv", COLUMNS, keep=first)
    members = set(chosen or [])
    kept = source() if chosen is None else (problem for i, problem in enumerate(source()) if i in members)
    stream = itertools.islice(itertools.cycle(kept) if args.data else kept, first * args.prompts, None)  # the cursor is the step's
    origin = args.data or "fresh, " + ", ".join(f"{k} {v}" for k, v in data.problem_options(args).items() if v is not None)
    print(f"{args.steps} steps of {args.prompts} problems x {args.n} rollouts ({origin}), at most {args.max_new_tokens} new tokens, "
          f"{limit} rollouts at a time; lr {args.lr}, beta {args.beta}; writes {args.out} and its .csv")
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps, desc="grpo", unit="step")
    with run:
        for step in progress:
            start = time.time()
            problems = list(itertools.islice(stream, args.prompts))
            examples, sampled, rewards, right, stops = roll_out(policy, problems, args, step, args.n, limit)
            s_sample = time.time() - start
            remaining = (args.steps - step + 1) / (args.lr_decay * args.steps) if args.lr_decay else 1.0
            optimizer.adam.param_groups[0]["lr"] = args.lr * min(1.0, remaining)
            row = train_step(policy, reference, optimizer, examples, sampled, rewards, args)
            solved, tokens = right.mean(dim=1), sum(len(response) for _, response in examples)
            row.update(step=step, reward=rewards.mean().item(), accuracy=right.mean().item(), s_sample=s_sample,
                       all_wrong=(solved == 0).float().mean().item(), all_right=(solved == 1).float().mean().item(),
                       mixed=((solved > 0) & (solved < 1)).float().mean().item(), mean_tokens=tokens / len(examples),
                       cut_rate=stops.count("length") / len(stops), tokens_per_s=tokens / (time.time() - start))
            checked = watch(row, args, policy, examples, checked)
            signal = (rewards.amax(dim=1) > rewards.amin(dim=1)).any()  # with --format-reward all-wrong groups can have some
            quiet = 0 if signal else quiet + 1
            if args.eval_every and held_out and (step % args.eval_every == 0 or step == args.steps or step == 1):
                score = sample.greedy_accuracy(policy, held_out, max_new_tokens=args.max_new_tokens, max_batch=limit)
                row.update(val_accuracy=score["accuracy"], val_n=score["n"])
                tqdm.write(f"step {step}: reward {row['reward']:.3f}, greedy accuracy {score['accuracy']:.1%} on {score['n']} held-out problems")
            log.row(**row)
            progress.set_postfix_str(f"reward {row['reward']:.2f}, groups 0/mixed/1 {row['all_wrong']:.2f}/{row['mixed']:.2f}/{row['all_right']:.2f}, "
                                     f"KL {row['kl']:.4f}, {row['mean_tokens']:.0f} tokens, {row['tokens_per_s']:,.0f} tokens/s")
            if quiet >= args.patience:
                raise data.InputError(stuck(row, args, policy, examples))
            run.end_of_step(step, args.steps, args.save_every, optimizer, limit=limit, chosen=chosen, quiet=quiet, checked=checked)


def check(args, parser, checkpoint):
    """Refuse values that cannot be used and flags that contradict each other, each in one sentence."""
    sft.check_files(args, parser, checkpoint)
    sft.check_positive(args, "steps", "prompts", "n", "max_new_tokens", "temperature", "lr", "epochs", "micro_tokens", "save_every",
                       "patience", "clip", "max_grad_norm", "max_kl")
    for flag in ("beta", "clip_high", "entropy", "format_reward", "weight_decay", "eval_every", "eval_n", "seed"):
        if getattr(args, flag) is not None and not 0 <= getattr(args, flag) < float("inf"):
            raise data.InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 0")
    if args.lr_decay is not None and not 0 <= args.lr_decay <= 1:
        raise data.InputError(f"--lr-decay {args.lr_decay}: must lie in 0 ... 1")
    if args.n == 1:
        raise data.InputError("--n 1: a group of one rollout has no advantage; give at least 2")
    if args.clip > 1:
        raise data.InputError(f"--clip {args.clip}: at most 1, since a ratio cannot fall below 0")
    if args.filter and not 0 <= args.filter[0] <= args.filter[1] <= FILTER_N:
        raise data.InputError(f"--filter {args.filter[0]} {args.filter[1]}: right rollouts of {FILTER_N}, the lower number first")
    if args.tis is not None and not args.tis >= 1:
        raise data.InputError(f"--tis {args.tis}: at least 1, or every token would be weighted down")
    if args.beta == 0:
        sft.refuse(args, parser, ("kl", "max_kl"), "with --beta 0, which keeps no reference policy")
    if bool(args.eval_every) > bool(args.eval_n):
        raise data.InputError("--eval-n 0: pass --eval-every 0 to measure nothing")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", help="the SFT policy: .pt file, Hugging Face folder or name; default: sft.pt, else the tiny base")
    add("--out", default="grpo.pt")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on with an unfinished run of the same --out")
    add("--save-every", type=int, default=25, help="steps between saved states")
    add("--export", metavar="FOLDER", help="also write a Hugging Face folder at the end")
    problems = parser.add_argument_group("problems")
    problems.add_argument("--data", help="JSONL of problems, again and again; default: fresh ones, never the same twice")
    data.add_problem_flags(problems)
    add = problems.add_argument
    add("--filter", type=int, nargs=2, metavar=("LO", "HI"),
        help="only problems that the SFT policy answers rightly in LO ... HI of 8 rollouts, sampled before the first step (paper: 1 7)")
    add = parser.add_argument_group("rollouts").add_argument
    add("--steps", type=int, help="default: 220 for a tiny model, else 200")
    add("--prompts", type=int, help="problems a step; default: 16 for a tiny model, else 32")
    add("--n", type=int, help="rollouts a problem; default: 8 for a tiny model, else 32")
    add("--max-new-tokens", type=int, help="default: 256 for a tiny model, else 2560")
    add("--temperature", type=float, default=1.0)
    add("--format-reward", type=float, default=0.0, help="added where the answer can be read, right or wrong (released code, Llama: 0.05)")
    add = parser.add_argument_group("loss").add_argument
    add("--lr", type=float, help="default: 2e-4 for a tiny model, else 1e-6")
    add("--lr-decay", type=float, help="share of the steps, at the end, in which lr falls to 0; default: 0.3 for a tiny model, else 0")
    add("--beta", type=float, help="KL coefficient, default 1e-3; 0 keeps no reference policy")
    add("--kl", choices=["k1", "k2", "k3"], default="k3", help="KL estimator")
    add("--max-kl", type=float, help="drop rollouts whose mean KL to the reference is above (released code, Llama: 0.15)")
    add("--clip", type=float, default=0.2)
    add("--clip-high", type=float, help="another upper clip (DAPO); default: --clip")
    add("--norm", choices=["sequence", "token", "constant"], default="sequence", help="what the loss is divided by")
    add("--no-std", action="store_true", help="advantages without division by the group's std (Dr. GRPO)")
    add("--drop-flat", action="store_true", help="groups without variance leave the batch, and with them their KL (DAPO)")
    add("--entropy", type=float, default=0.0, help="coefficient of an entropy bonus (released code, Qwen: 0.001)")
    add("--tis", type=float, metavar="CAP", help="weight tokens by min(pi_old / pi_sampler, CAP)")
    add("--epochs", type=int, default=1, help="updates on one batch of rollouts")
    add("--weight-decay", type=float, default=0.01)
    add("--max-grad-norm", type=float, default=1.0)
    add("--micro-tokens", type=int, default=4096, help="tokens in one forward pass: lower it when memory runs out")
    add("--gradient-checkpointing", action="store_true", help="keep layer inputs only and compute the rest twice: less memory, slower")
    add = parser.add_argument_group("watching").add_argument
    add("--eval-every", type=int, default=25, help="steps between measurements of greedy accuracy on held-out problems; 0: never")
    add("--eval-n", type=int, default=100, help="how many held-out problems; with --data the last of the file, at most a tenth")
    add("--patience", type=int, default=30, help="stop after so many steps without a mixed group")
    args = parser.parse_args()
    options = data.problem_options(args)
    checkpoint = sample.default_checkpoint(args.ckpt)
    check(args, parser, checkpoint)
    run = sft.Run(args.out, args.resume)
    state = run.state
    policy = sample.load_policy(checkpoint)
    small = sum(p.numel() for p in policy.model.parameters()) < 50e6
    for flag, value in PRESETS["tiny" if small else "paper"].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    source, held_out = problem_source(args, options)
    longest = max(len(sample.encode_prompt(policy.tokenizer, p.question)) for p in [*itertools.islice(source(), 64), *held_out])
    parts = memory(policy, args, longest, rows=1)
    limit = state.get("limit") or sampler_rows(policy, args, longest, sum(parts.values()), parts["sampler"])
    print(sample.describe(policy))
    print(sft.describe_memory(memory(policy, args, longest, rows=limit), sft.free_memory(policy.model)))
    run.begin(args, policy.model, free=() if args.lr_decay or args.filter else ["steps"])  # both look ahead to the last step
    if args.steps < state["step"]:
        raise data.InputError(f"--steps {args.steps}: {run.path} is at step {state['step']} already")
    reference = copy.deepcopy(policy.model).requires_grad_(False) if args.beta else None
    optimizer = sft.Optimizer(policy.model, args.lr, args.weight_decay)
    if "optimizer" in state:
        optimizer.load_state(state["optimizer"])
    if args.gradient_checkpointing:
        sft.checkpoint_layers(policy.model)
    train(policy, reference, optimizer, source, held_out, limit, args, run)
    sample.save_policy(args.out, policy, dict(vars(args), ckpt=str(checkpoint), base=policy.info, stage="grpo"))
    if args.export:
        sample.export_policy(policy, args.export)
    run.finish()
    print(f"{args.out}: done; next: python eval.py --ckpt {checkpoint} {args.out}")


def watch(row, args, policy, examples, checked):
    """Say what a person should know about this step; stop on what cannot be right. Returns whether the first mixed
    step has been checked."""
    if not all(abs(row[name]) < float("inf") for name in ("loss", "grad_norm")):  # False for NaN as well
        raise data.InputError(f"step {row['step']}: the loss or its gradient is not a finite number; what was saved before is untouched; look "
                              "at grad_norm and kl in the log, and begin anew under another --out with a lower --lr or --max-grad-norm")
    if row["drift_mean"] > 0.02:
        words = f"step {row['step']}: sampler and trainer disagree by {row['drift_mean']:.3f} nats a token on average (expected: below 0.02)"
        if not checked:  # from the start: a bug or a broken checkpoint. Later: say so, but do not throw a night's run away
            raise data.InputError(f"{words}; this is a bug or a broken checkpoint, not noise")
        tqdm.write(f"warning: {words}")
    if row["cut_rate"] >= 0.3:
        tqdm.write(f"warning: step {row['step']}: {row['cut_rate']:.0%} of the rollouts were cut at --max-new-tokens "
                   f"{args.max_new_tokens}; raise it, or they cannot be right")
    if row.get("dropped", 0) >= 0.5 * len(examples or [0]):
        tqdm.write(f"warning: step {row['step']}: --max-kl {args.max_kl} dropped {row['dropped']} of {len(examples)} rollouts: the policy has "
                   "moved far from its reference; raise --beta or lower --lr")
    if row["mixed"] and not checked:
        if not row["grad_norm"] > 0 and not row.get("dropped"):
            raise data.InputError(f"step {row['step']}: a mixed group, yet the gradient is 0: nothing would be learned")
        tqdm.write(f"first mixed groups at step {row['step']}: gradient norm {row['grad_norm']:.3g}, sampler and trainer agree to "
                   f"{row['drift_mean']:.1e} nats a token; a loss near 0 ({row['loss']:.1e}) is expected, see the notes above")
        return True
    return checked


def stuck(row, args, policy, examples):
    """Why a run without a mixed group cannot learn, with one rollout to look at."""
    text = sample.decode(policy.tokenizer, examples[0][1])
    why = ("all rollouts are wrong: the problems are too hard or the format is not learned; lower --ops or train sft.py longer"
           if row["all_wrong"] >= row["all_right"] else "all rollouts are right: the problems are too easy; raise --ops")
    return f"no mixed group in {args.patience} steps, so nothing can be learned: {why}. One rollout: {text[:400]!r}"


if __name__ == "__main__":
    data.run_cli(main)
