"""Chapter 5. Reinforcement learning with GRPO: try N times, and lean towards what worked.

    python grpo.py --ckpt sft.pt                            # the embedded default
    python grpo.py --ckpt sft.pt --ops 15 20 --prompts 32 --n 32 --max-new-tokens 2560 --lr 1e-6 --steps 200
    python grpo.py --ckpt sft.pt --resume                   # go on after a kill

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
3. groups without variance still carry the KL's gradient, as in the paper (its DAPO variant would drop them);
4. for the tiny model, batch and learning rate are its own, and the latter decays at the end (PRESETS below).
"""
import argparse, copy, itertools, os, sys, time

import torch
from tqdm import tqdm

import data, sample, sft

PRESETS = {"tiny": dict(lr=2e-4, lr_decay=0.3, prompts=16, n=8, steps=220, max_new_tokens=256, beta=1e-3),
           "paper": dict(lr=1e-6, lr_decay=0.0, prompts=32, n=32, steps=200, max_new_tokens=2560, beta=1e-3)}
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
    k1 = -d (unbiased, can be negative), k2 = d^2 / 2 (biased), k3 = exp(d) - d - 1 (unbiased, never negative)."""
    d = ref_logprob - logprob
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return d.exp() - d - 1
    raise ValueError(f"kl must be k1, k2 or k3, not {kind!r}")


def grpo_loss(logprob, old_logprob, ref_logprob, advantages, mask, *, clip=0.2, clip_high=None, beta=1e-3, kl="k3",
              norm="sequence", denom=None):
    """The GRPO loss of a batch, to be minimised (arXiv 2402.03300, eq. 3). Inputs are left unchanged.

    logprob (B, T), differentiable; old_logprob (B, T), the trainer's own value before the first update on this batch;
    ref_logprob (B, T) or None where beta is 0; advantages (B,); mask (B, T), 1 on response tokens.
    norm: "sequence" (mean over tokens, then over rollouts: the paper), "token" (mean over all tokens: DAPO) or "constant"
    (sum of tokens / denom: Dr. GRPO). denom: the denominator of the *whole* batch - rollouts, tokens or the constant -
    so that the losses of micro-batches add up to the loss of the batch; None: this batch alone.

    >>> lp = torch.tensor([[-1., -2.]]); A = torch.tensor([2.]); one = torch.ones(1, 2)
    >>> grpo_loss(lp, lp - 0.5, lp, A, one)          # ratio e^0.5 = 1.65 is clipped to 1.2: -1.2 * 2
    tensor(-2.4000)
    """
    mask = mask.to(logprob.dtype)
    # where masked, 0 stands in for whatever is there: NaN * 0 would be NaN
    keep = mask.bool()
    ratio = (logprob - old_logprob).masked_fill(~keep, 0).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    weight = advantages[:, None]
    loss = -torch.minimum(ratio * weight, clipped * weight)
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


# ------------------------------------------------------------------------------------------------ one step
def problem_stream(args, start=0):
    """Problems in a fixed order, from number `start` on: fresh ones without end, or --data again and again."""
    if args.data:
        stream = itertools.cycle(data.read_problems(args.data))
    else:
        stream = data.generate(seed=args.seed + 1_000_000, **data.problem_options(args))  # not the SFT's problems
    return itertools.islice(stream, start, None)


def roll_out(policy, problems, args, step):
    """args.n rollouts of each problem -> (examples, sampled log-probs, rewards (Q, N), stop reasons)."""
    prompts = [sample.encode_prompt(policy.tokenizer, problem.question) for problem in problems]
    groups = sample.generate(policy, prompts, n=args.n, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                             seed=args.seed * 1_000_003 + step)
    rewards = torch.tensor([[data.reward(sample.decode(policy.tokenizer, r.tokens), problem.answer) for r in group]
                            for problem, group in zip(problems, groups)])
    rollouts = [rollout for group in groups for rollout in group]
    examples = [(prompt, rollout.tokens) for prompt, group in zip(prompts, groups) for rollout in group]
    return examples, [r.logprobs for r in rollouts], rewards, [r.stop for r in rollouts]


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
    parts = sft.micro_batches([len(p) + len(r) for p, r in examples], args.micro_tokens)
    tokens = sum(len(response) for _, response in examples)
    denom = {"sequence": len(examples), "token": tokens, "constant": len(examples) * args.max_new_tokens}[args.norm]
    start = time.time()
    old, ref = {}, {}
    with torch.no_grad():
        for k, rows in enumerate(parts):
            inputs, targets, mask, drawn = cut(examples, rows, sampled, policy)
            if reference is not None:
                ref[k] = sft.response_logprobs(reference, inputs, targets, args.temperature)[0]
            if args.epochs > 1:
                old[k] = sft.response_logprobs(policy.model, inputs, targets, args.temperature)[0]
    scored, sums = time.time(), dict.fromkeys(("kl", "clip_frac", "entropy", "drift_mean"), 0.0)
    drift_max, loss = 0.0, 0.0
    for epoch in range(args.epochs):
        for k, rows in enumerate(parts):
            inputs, targets, mask, drawn = cut(examples, rows, sampled, policy)
            logprob, entropy = sft.response_logprobs(policy.model, inputs, targets, args.temperature)
            before = old.get(k, logprob.detach())  # with one update, the value before it is the value now
            part = grpo_loss(logprob, before, ref.get(k), advantages[rows], mask, clip=args.clip, clip_high=args.clip_high,
                             beta=args.beta, kl=args.kl, norm=args.norm, denom=denom)
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
        grad_norm = optimizer.step(clip=args.max_grad_norm)
    return dict(sums, loss=loss, drift_max=drift_max, grad_norm=grad_norm, s_score=scored - start, s_train=time.time() - scored)


# ------------------------------------------------------------------------------------------------ the loop
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
    problems.add_argument("--data", help="JSONL of problems; default: fresh ones, never the same twice")
    data.add_problem_flags(problems)
    add = parser.add_argument_group("rollouts").add_argument
    add("--steps", type=int, help="default: 220 for a tiny model, else 200")
    add("--prompts", type=int, help="problems a step; default: 16 for a tiny model, else 32")
    add("--n", type=int, help="rollouts a problem; default: 8 for a tiny model, else 32")
    add("--max-new-tokens", type=int, help="default: 256 for a tiny model, else 2560")
    add("--temperature", type=float, default=1.0)
    add = parser.add_argument_group("loss").add_argument
    add("--lr", type=float, help="default: 2e-4 for a tiny model, else 1e-6")
    add("--lr-decay", type=float, help="share of the steps, at the end, in which lr falls to 0; default: 0.3 for a tiny model, else 0")
    add("--beta", type=float, help="KL coefficient, default 1e-3")
    add("--kl", choices=["k1", "k2", "k3"], default="k3", help="KL estimator")
    add("--clip", type=float, default=0.2)
    add("--clip-high", type=float, help="another upper clip (DAPO); default: --clip")
    add("--norm", choices=["sequence", "token", "constant"], default="sequence", help="what the loss is divided by")
    add("--no-std", action="store_true", help="advantages without division by the group's std (Dr. GRPO)")
    add("--epochs", type=int, default=1, help="updates on one batch of rollouts")
    add("--weight-decay", type=float, default=0.01)
    add("--max-grad-norm", type=float, default=1.0)
    add("--micro-tokens", type=int, default=4096, help="tokens in one forward pass: lower it when memory runs out")
    add = parser.add_argument_group("watching").add_argument
    add("--eval-every", type=int, default=25, help="steps between measurements of greedy accuracy on held-out problems; 0: never")
    add("--eval-n", type=int, default=100, help="how many held-out problems")
    add("--patience", type=int, default=30, help="stop after so many steps without a mixed group")
    args = parser.parse_args()
    options = data.problem_options(args)
    sft.check_out(args.out)
    for flag in ("steps", "prompts", "n", "max_new_tokens", "temperature", "lr", "epochs", "micro_tokens", "save_every", "patience"):
        if getattr(args, flag) is not None and getattr(args, flag) <= 0:
            raise data.InputError(f"--{flag.replace('_', '-')} must be above 0")
    if args.lr_decay is not None and not 0 <= args.lr_decay <= 1:
        raise data.InputError(f"--lr-decay {args.lr_decay}: must lie in 0 ... 1")
    if args.n == 1:
        raise data.InputError("--n 1: a group of one rollout has no advantage; give at least 2")

    checkpoint, state_file, csv_file = sample.default_checkpoint(args.ckpt), args.out[:-3] + ".state.pt", args.out[:-3] + ".csv"
    state = None
    if os.path.exists(state_file):
        if not args.resume:
            raise data.InputError(f"{state_file} holds an unfinished run: pass --resume to go on, another --out, or delete that file")
        state = load_state(state_file)
    elif args.resume and os.path.exists(args.out):
        print(f"{args.out} is finished: nothing to resume")
        return
    policy = sample.load_policy(checkpoint)
    small = sum(p.numel() for p in policy.model.parameters()) < 50e6
    for flag, value in PRESETS["tiny" if small else "paper"].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    reference = copy.deepcopy(policy.model).requires_grad_(False) if args.beta else None
    optimizer, first = sft.Optimizer(policy.model, args.lr, args.weight_decay), 0
    if state:
        first = state["step"]
        optimizer.load_state(state["optimizer"])
        print(f"resuming {args.out} after step {first}")
    else:
        sft.set_aside(args.out)
    log = sft.Log(csv_file, COLUMNS, keep=first)
    held_out = list(itertools.islice(data.generate(seed=args.seed, split="val", **options), args.eval_n if args.eval_every else 0))
    stream = problem_stream(args, start=first * args.prompts)
    print(sample.describe(policy))
    source = args.data or "fresh, " + ", ".join(f"{k} {v}" for k, v in options.items() if v is not None)
    print(f"{args.steps} steps of {args.prompts} problems x {args.n} rollouts ({source}), "
          f"at most {args.max_new_tokens} new tokens; lr {args.lr}, beta {args.beta}; writes {args.out} and {csv_file}")

    def save_state(step):
        sample.write_atomically(state_file, {"step": step, "optimizer": optimizer.state()})

    progress, checked, quiet = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps, desc="grpo", unit="step"), False, 0
    step = first
    try:
        for step in progress:
            start = time.time()
            examples, sampled, rewards, stops = roll_out(policy, list(itertools.islice(stream, args.prompts)), args, step)
            s_sample = time.time() - start
            left = (args.steps - step + 1) / (args.lr_decay * args.steps) if args.lr_decay else 1.0
            optimizer.adam.param_groups[0]["lr"] = args.lr * min(1.0, left)
            row = train_step(policy, reference, optimizer, examples, sampled, rewards, args)
            solved, tokens = rewards.mean(dim=1), sum(len(response) for _, response in examples)
            row.update(step=step, reward=rewards.mean().item(), accuracy=rewards.mean().item(), s_sample=s_sample,
                       all_wrong=(solved == 0).float().mean().item(), all_right=(solved == 1).float().mean().item(),
                       mixed=((solved > 0) & (solved < 1)).float().mean().item(), mean_tokens=tokens / len(examples),
                       cut_rate=stops.count("length") / len(stops), tokens_per_s=tokens / (time.time() - start))
            checked = watch(row, args, policy, examples, checked)
            quiet = 0 if row["mixed"] else quiet + 1
            if args.eval_every and (step % args.eval_every == 0 or step == args.steps or step == 1):
                score = sample.greedy_accuracy(policy, held_out, max_new_tokens=args.max_new_tokens)
                row.update(val_accuracy=score["accuracy"], val_n=score["n"])
                tqdm.write(f"step {step}: reward {row['reward']:.3f}, greedy accuracy {score['accuracy']:.1%} on {score['n']} held-out problems")
            log.row(**row)
            progress.set_postfix_str(f"reward {row['reward']:.2f}, groups 0/mixed/1 {row['all_wrong']:.2f}/{row['mixed']:.2f}/{row['all_right']:.2f}, "
                                     f"KL {row['kl']:.4f}, {row['mean_tokens']:.0f} tokens, {row['tokens_per_s']:,.0f} tokens/s")
            if quiet >= args.patience:
                raise data.InputError(stuck(row, args, policy, examples))
            if step % args.save_every == 0 and step < args.steps:
                save_state(step)
    except KeyboardInterrupt:  # mid-step: the last saved state is the newest one that is whole
        kept = os.path.exists(state_file)
        print(f"\nstopped in step {step}; " + (f"--resume goes on from {state_file}" if kept else "nothing was saved yet"), file=sys.stderr)
        raise SystemExit(130)
    info = dict(vars(args), ckpt=str(checkpoint), base=policy.info, stage="grpo")
    sample.save_policy(args.out, policy, info)
    if os.path.exists(state_file):
        os.remove(state_file)
    if args.export:
        sample.export_policy(policy, args.export)
    print(f"{args.out}: done; next: python eval.py --ckpt {checkpoint} {args.out}")


def load_state(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {"step": state["step"], "optimizer": state["optimizer"]}
    except Exception:
        raise data.InputError(f"{path}: not a saved state of grpo.py, or damaged; delete it to start anew") from None


def watch(row, args, policy, examples, checked):
    """Say what a person should know about this step; stop on what cannot be right. Returns whether the first mixed
    step has been checked."""
    if not all(abs(row[name]) < float("inf") for name in ("loss", "grad_norm")):  # False for NaN as well
        raise data.InputError(f"step {row['step']}: the loss or its gradient is not a finite number; the last saved state is "
                              "untouched: resume from it with a lower --lr")
    if row["drift_mean"] > 0.02:
        words = f"step {row['step']}: sampler and trainer disagree by {row['drift_mean']:.3f} nats a token on average (expected: below 0.02)"
        if not checked:  # from the start: a bug or a broken checkpoint. Later: say so, but do not throw a night's run away
            raise data.InputError(f"{words}; this is a bug or a broken checkpoint, not noise")
        tqdm.write(f"warning: {words}")
    if row["cut_rate"] >= 0.3:
        tqdm.write(f"warning: step {row['step']}: {row['cut_rate']:.0%} of the rollouts were cut at --max-new-tokens "
                   f"{args.max_new_tokens}; raise it, or they cannot be right")
    if row["mixed"] and not checked:
        if not row["grad_norm"] > 0:
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
