"""Chapter 4. Supervised fine-tuning: teach the policy what an answer looks like, behaviors included.

    python sft.py                                           # the tiny base on 2,000 BRIDGE examples -> sft.pt
    python sft.py --method vanilla --out vanilla.pt         # the same questions with plain answers
    python sft.py --model Qwen/Qwen2.5-1.5B --data bridge.jsonl
    python sft.py --model Qwen/Qwen2.5-1.5B --data bridge.jsonl --resume    # go on after a kill or Ctrl-C
    python sft.py --model scratch --out base.pt             # pretrain a tiny base model

Fine-tuning is next-token prediction on given answers: the policy pi, which is our language model, learns to
find every token o_t of the answer likely after the question q and the answer's tokens before it,

    loss = - sum log pi(o_t | q, o_<t) / number of answer tokens

The question's tokens condition and are never trained on. What is masked follows from lengths, never from
token values (a pad that equals the end token would otherwise hide the end, and generation would never stop);
exactly one end token is trained.

grpo.py shares `check_head` and sections 2 to 5 and 8. Half an hour of reading without pretraining (7); at
first skip memory (3) and hand-over (8) too.

Where we depart from the paper:
1. for the tiny model, batch, learning rate, epochs and p are its own (PRESETS below), else the paper's;
2. the loss is averaged over the tokens of the whole batch, however the batch is cut into micro-batches;
3. `--model scratch` has no counterpart in the paper, which starts from pretrained models.
"""
import csv, functools, glob, itertools, json, math, os, re, shutil, signal, sys, time, zlib
from collections import Counter
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import data, inject, sample


# ----------------------------------------------------------------------------- 1. Micro-batches and log-probs
def collate(examples, device, pad):
    """Examples (prompt tokens, response tokens) -> inputs (B, T), targets (B, T), both padded on the right.

    targets[b, t] is the token after inputs[b, t] where that token belongs to the response, else -100, which
    every loss skips: only the response is trained on. Right padding under a causal mask needs no attention
    mask: no real token ever looks at a pad."""
    width = max(len(prompt) + len(response) for prompt, response in examples) - 1
    inputs = torch.full((len(examples), width), pad)
    targets = torch.full((len(examples), width), sample.IGNORE)
    for row, (prompt, response) in enumerate(examples):
        tokens = torch.tensor(prompt + response)
        inputs[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, len(prompt) - 1:len(tokens) - 1] = tokens[len(prompt):]
    return inputs.to(device), targets.to(device)


def micro_batches(lengths, tokens):
    """Row numbers in groups of similar length, each at most `tokens` when padded (one row at least).

    The gradient of a batch is the sum of its micro-batches' gradients, if each of their losses is divided by
    the whole batch's denominator."""
    groups = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):  # a group's first is its longest
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def sum_of_logprobs(model, inputs, targets):
    """The sum of log pi of all targets, a scalar. SFT needs no more, and with its gradient that takes three
    products with the head, where one value a token (`sample.token_logprobs`) takes four."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state  # (B, T, H), never (B, T, V)
    return sample.sum_logprob(hidden, model.lm_head.weight, targets)


@torch.no_grad()
def check_head(policy):
    """Raise InputError where lm_head.weight @ model.model(...), from which all losses here take their logits,
    is not what the model itself computes: some scale its logits, cut them, or add a bias."""
    model, ids = policy.model, torch.arange(16, device=policy.device)[None]
    try:
        theirs = model(input_ids=ids, use_cache=False).logits
        ours = model.model(input_ids=ids, use_cache=False).last_hidden_state @ model.lm_head.weight.T
        close = 1e-4 if theirs.dtype == torch.float32 else 2e-2
        same = model.lm_head.bias is None and (ours - theirs).abs().max() <= close * theirs.abs().max()
    except AttributeError:  # parts of other names
        same = False
    if not same:
        raise data.InputError(f"a model of type {model.config.model_type} cannot be trained here, nor "
                              "measured with --influence, --entropy or --html, since its logits are not its "
                              "head's product alone; take a Qwen2/2.5, Qwen3 or Llama 3")


# ------------------------------------------------------------------------------------------- 2. The optimizer
class Optimizer:
    """AdamW in fp32 for parameters of any dtype, with the paper's settings.

    bf16 keeps 8 bits of a weight: an update of 1e-6 of its size would be rounded away at every step. So bf16
    parameters get an fp32 master copy that gradients are summed into, AdamW steps on, and is copied back."""

    def __init__(self, model, lr, weight_decay=0.01, betas=(0.9, 0.95)):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.master = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        # foreach, the default on CUDA, would hold a temporary copy of all parameters
        self.adam = torch.optim.AdamW(self.master, lr, betas, weight_decay=weight_decay, foreach=False)
        for param, master in zip(self.params, self.master):
            if master is not param:
                param.register_post_accumulate_grad_hook(lambda p, m=master: self._collect(p, m))

    @staticmethod
    def _collect(param, master):
        """After each micro-batch: the bf16 gradient joins an fp32 sum and frees its memory."""
        master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
        param.grad = None

    @torch.no_grad()
    def step(self, clip=1.0):
        """Clip the gradient to norm `clip`, update, clear. Returns the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.master, clip).item()
        if math.isfinite(norm):  # NaN must never reach the weights; the caller stops (check_finite)
            self.adam.step()
            for param, master in zip(self.params, self.master):
                if master is not param:
                    param.copy_(master)
        self.adam.zero_grad(set_to_none=True)
        return norm

    def state(self):
        return {"adam": self.adam.state_dict(), "master": [m.detach() for m in self.master]}

    @torch.no_grad()
    def load_state(self, state):
        sample.check_tensors("the saved state", state.get("master", ()), self.master)
        self.adam.load_state_dict(state["adam"])
        for param, master, saved in zip(self.params, self.master, state["master"]):
            master.copy_(saved)
            param.copy_(saved)


def check_finite(step, loss, norm, advice):
    """Stop a run whose numbers have blown up, before its weights are saved over those of an earlier step."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise data.InputError(f"step {step}: the loss or its gradient is not a finite number; "
                              f"what was saved before is untouched; {advice}")


def checkpoint_layers(model):
    """Gradient checkpointing: keep only each layer's input and run the layer again in the backward pass.

    Hugging Face's own switch acts in training mode alone, where dropout is on too, and lets no cache pass."""
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


# -------------------------------------------------------------------------------------------------- 3. Memory
def predict_memory(model, tokens, *, reference=False, checkpointing=False, sampler=(0, 0)):
    """Bytes at the peak of a training step, part by part: {"weights": ..., ...}. A test holds it against what
    is alive, within a factor of 1.2; a CPU's allocator may hold half as much again.

    tokens: those of one micro-batch, padding included. sampler: (rows, length) of its key-value cache, which
    is kept between steps. What a layer keeps for its backward pass, per token of width H with weights of b
    bytes: for each of the two norms the input and its normalised copy and output, 4H + 2bH; queries, keys,
    values, the attention's output twice, and four tensors of the MLP's width I."""
    config, weight = model.config, model.lm_head.weight
    V, H = weight.shape
    b, layers, P = weight.element_size(), config.num_hidden_layers, sum(p.numel() for p in model.parameters())
    dim = sample.head_dim(config)
    Q, KV = config.num_attention_heads * dim, config.num_key_value_heads * dim
    layer = tokens * (2 * (4 + 2 * b) * H + b * (3 * Q + 2 * KV + 4 * config.intermediate_size))
    rows, length = sampler
    chunk = sample.CPU_CHUNK if weight.device.type == "cpu" else sample.GPU_CHUNK
    return {"weights": b * P, "fp32 master": 4 * P if b < 4 else 0, "AdamW": 8 * P, "gradients": 4 * P,
            "reference": b * P if reference else 0,
            "activations": layers * tokens * b * H + layer if checkpointing else layers * layer,
            "head": min(chunk, b * tokens * V) + (4 + 2 * b) * V * H,  # logits, the weight's gradient
            "sampler": rows * sample.row_bytes(model, length)}


def free_memory(model):
    """Bytes that this process may hold, weights included; None where nobody can say (macOS, Windows)."""
    if model.device.type == "cuda":
        return torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device)
    if model.device.type == "cpu" and os.path.exists("/proc/meminfo"):
        available = re.search(r"MemAvailable:\s+(\d+) kB", open("/proc/meminfo").read())[1]
        return int(available) * 1024 + sum(p.nbytes for p in model.parameters())
    return None


REMEDIES = {"activations": "lower --micro-tokens or pass --gradient-checkpointing",
            "sampler": "lower --max-new-tokens", "reference": "--beta 0 keeps no reference"}


def describe_memory(parts, free):
    """The start line: the predicted peak and its parts, and what to lower where that is more than is free."""
    total, by_size = sum(parts.values()), sorted(parts, key=lambda name: -parts[name])
    large = ", ".join(f"{name} {parts[name] / 1e9:.2f}" for name in by_size if parts[name] > 5e6)
    line = f"memory: {total / 1e9:.2f} GB predicted at the peak ({large})"
    if free is None or total <= free:
        return line
    lowerable = [name for name in by_size if name in REMEDIES and parts[name]]
    fits = total - sum(parts[name] for name in lowerable) < free
    remedy = REMEDIES[lowerable[0]] if fits else "no flag can help, take a smaller model"
    return f"{line}; warning: only {free / 1e9:.2f} GB are free: {remedy}"


# ------------------------------------------------------------------- 4. What makes a run survive, and its log
class Log:
    """A CSV file, one row a step. Values that were not measured stay empty."""

    def __init__(self, path, columns, keep=0):
        """keep: how many rows of an existing file to keep (a resumed run); 0 starts a new file."""
        rows = []
        if keep:
            try:
                with open(path, newline="", encoding="utf-8") as file:
                    header, *rows = list(csv.reader(file))[:keep + 1]
            except (OSError, ValueError, csv.Error):
                header = None
            if header != columns or len(rows) < keep:
                raise data.InputError(f"{path}: not the log of the run to go on with, which has {keep} rows "
                                      "at least; put it back")
        with data.replacing(path) as file:
            csv.writer(file).writerows([columns, *rows])
        self.file, self.columns = open(path, "a", newline=""), columns
        self.writer = csv.writer(self.file)

    def row(self, **values):
        cells = [values.get(column, "") for column in self.columns]
        self.writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells])
        self.file.flush()
        os.fsync(self.file.fileno())  # as the saved state is: it may not be ahead of the log


class CtrlC:
    """Inside `with run.ctrl_c:` the first Ctrl-C or SIGTERM is a wish (asked), granted at the end of the
    step: half a step cannot be resumed. The second stops at once; what was saved before stays whole."""
    asked = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)


# Flags that may differ when a run is resumed: they name files, of which weights and data are compared, or
# change no number that is computed
FREE = {"ckpt", "model", "data", "out", "export", "resume", "save_every", "eval_every", "eval_n", "patience",
        "command"}
# so may these, which change its rounding alone (not in pretraining, where a micro-batch is an update)
ROUNDING = ("micro_tokens", "gradient_checkpointing")
HELD_OUT = {"eval_every", "eval_n"}  # may not with --data: they say which of its problems are held out


def identity(args, model, free=()):
    """What a resumed run must repeat, {name: value}: flags that are not free, the model, the data."""
    flags = json.loads(json.dumps(vars(args), default=str))  # plain values, as a saved state has them
    free = FREE.union(free) - (HELD_OUT if args.data else set())
    same = {f"--{name.replace('_', '-')}": flags[name] for name in flags if name not in free}
    checksum = 0
    for p in model.parameters():
        checksum = zlib.crc32(p.detach().cpu().contiguous().view(torch.uint8).numpy(), checksum)
    same["a model with checksum"] = checksum
    same["a device of type"] = next(model.parameters()).device.type
    if args.data:
        with open(args.data, "rb") as file:
            same["--data with checksum"] = zlib.crc32(file.read())
    return same


def set_aside(path):
    """Rename an old result and its log to the next free name: a new run never loses one."""
    stem, endings = path.removesuffix(".pt"), (".pt", ".csv")
    old = [ending for ending in endings if os.path.exists(stem + ending)]
    number = next(i for i in itertools.count(1) if not any(os.path.exists(f"{stem}.{i}{e}") for e in endings))
    for ending in old:
        os.replace(stem + ending, f"{stem}.{number}{ending}")
        print(f"{stem}{ending} existed: renamed to {stem}.{number}{ending}")


class Run:
    """The saved state of a run, OUT.state.pt: its last saved step, the flags of its start, the optimizer with
    the weights, and what the loop adds. The file is replaced whole or not at all: a kill -9, in a save too,
    costs the steps since the save before. No random generator's state is in it: what a step draws follows
    from the flags and the step's number."""

    def __init__(self, out, resume):
        """Before anything is computed: an unfinished run is not overwritten, a finished one not resumed."""
        self.path, self.state, self.ctrl_c = out.removesuffix(".pt") + ".state.pt", {"step": 0}, CtrlC()
        if os.path.exists(self.path):
            if not resume:
                raise data.InputError(f"{self.path} holds an unfinished run: pass --resume to go on, "
                                      "another --out, or delete that file")
            self.state = sample.read_pt(self.path, "delete it to start anew")
            kinds = {"step": int, "flags": dict, "optimizer": dict}
            if not all(isinstance(self.state.get(name), kind) for name, kind in kinds.items()):
                raise data.InputError(f"{self.path}: not a saved state; delete it to start anew")
        elif resume and os.path.exists(out):
            print(f"{out} is finished: nothing to resume (with which flags it was made is not looked at, nor "
                  "whether the folder of an --export is whole)")
            raise SystemExit(0)
        elif resume:
            print(f"there is no {self.path}, so nothing to resume: starting anew")
        # what a kill during a save left behind
        for path in (out, self.path, out.removesuffix(".pt") + ".csv"):
            for leftover in glob.glob(glob.escape(path + data.OURS) + "*.tmp"):
                os.remove(leftover)

    def begin(self, args, model, free=()):
        """With the flags complete and the weights loaded: a resumed run must repeat its start (free: more
        flags that may change); a new one moves an old result out of the way."""
        self.flags = identity(args, model, free)
        if "flags" not in self.state:
            return set_aside(args.out)
        for name in self.flags | self.state["flags"]:
            before, now = self.state["flags"].get(name), self.flags.get(name)
            if before != now:
                raise data.InputError(f"{self.path} was begun with {name} {before}, not {now}: "
                                      "to go on, repeat the flags, files and device of its start")
        print(f"resuming {args.out} after step {self.state['step']}")

    def save(self, step, optimizer, **more):
        with data.replacing(self.path, "wb") as file:
            torch.save({"step": step, "flags": self.flags, "optimizer": optimizer.state(), **more}, file)

    def end_of_step(self, step, last, every, optimizer, **more):
        """Save where it is due; save and stop where Ctrl-C asked for it. After the last step there is nothing
        to go on with: the caller writes the result and calls `finish`."""
        if last:
            return
        if self.ctrl_c.asked or step % every == 0:
            self.save(step, optimizer, **more)
        if self.ctrl_c.asked:
            print(f"\nstopped after step {step}, saved in {self.path}: "
                  "the same command with --resume goes on", file=sys.stderr)
            raise SystemExit(130)

    def finish(self):
        if os.path.exists(self.path):
            os.remove(self.path)


# --------------------------------------------------------------------------------------------------- 5. Flags
def add_run_flags(parser, out):
    """The flags that every training run has, here and in grpo.py."""
    add = parser.add_argument_group("run").add_argument
    add("--out", default=out, help="the result, a .pt file; its log is the .csv beside it")
    add("--seed", type=data.natural, default=0)
    add("--resume", action="store_true", help="go on with an unfinished run of the same --out")
    add("--save-every", type=data.positive_int, default=25, help="steps between saved states")
    add("--export", metavar="FOLDER", help="also write a Hugging Face folder at the end")
    add("--hand-over", metavar="FOLDER",
        help="train nothing: write the policy, the data and these settings for TRL and verl (in sft.py: TRL "
             "alone)")
    add("--weight-decay", type=data.not_negative, default=0.01)
    add("--micro-tokens", type=data.positive_int, default=4096,
        help="tokens in one forward pass (in pretraining, of one update): lower it when memory runs out")
    add("--gradient-checkpointing", action="store_true",
        help="keep layer inputs only and compute the rest twice: less memory, slower")


def describe_presets(presets):
    """--help's words on flags that have a preset: .lr is "default: 0.0005 for a tiny model, else 5e-06"."""
    own = {flag: f" (promptbench: {value:g})" for flag, value in presets["tiny, promptbench"].items()}
    return SimpleNamespace(**{
        flag: f"default: {tiny:g}{own.get(flag, '')} for a tiny model, else {presets['paper'][flag]:g}"
        for flag, tiny in presets["tiny"].items()})


def preset(model, presets, task):
    """The preset for a model of this size; a tiny model has some values of its own for PromptBench."""
    if sum(p.numel() for p in model.parameters()) >= 50e6:
        return presets["paper"]
    return presets["tiny"] | presets.get(f"tiny, {task}", {})


def fill_in(args, model, presets):
    """Flags that were not given get the preset for a model of this size and the task."""
    for flag, value in preset(model, presets, args.task).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


DRAWING = ("task", "ops", "size", "tidy", "depth", "redundancy", "names", "max_answer", "max_value")


def problem_options(args, parser):
    """data.problem_options; with --data no problem is drawn, and its first one says which task it is."""
    if args.data:
        parser.refuse(args, DRAWING, "with --data, which brings its problems")
        args.task = data.read_problems(args.data)[0].task
    return data.problem_options(args)


def check_files(args, parser, start):
    """Refuse flags that contradict each other on what is read, and claim what the run will write. start: the
    file or name that the weights come from."""
    if args.hand_over:
        parser.refuse(args, ("resume", "export", "out"), "with --hand-over, which trains nothing")
    stem = args.out.removesuffix(".pt")
    if stem == args.out or stem.endswith(".state"):
        raise data.InputError(f"--out {args.out}: must end in .pt, but not in .state.pt")
    exported = False  # whether that folder is this run's: one that was killed so late has begun it
    if args.export and args.resume and os.path.exists(args.out):
        info = sample.read_pt(args.out, "name another --out").get("info") or {}
        exported = bool(info.get("export")) and data.place(info["export"]) == data.place(args.export)
    files = [("--out", args.out, [b""]),  # an old result and its log are set aside
             ("--out", f"{stem}.csv", [b"step,", b"pool,"]), ("--out", f"{stem}.state.pt", [b""]),
             ("--export", None if exported else args.export, None)]
    data.claim([("--hand-over", args.hand_over, None)] if args.hand_over else files,
               [("the file that the run starts from", start), ("the file of --data", args.data),
                ("the file of --start", getattr(args, "start", None))])


# -------------------------------------------------------------------------------------------- 6. The SFT loop
def load_examples(policy, problems, max_length):
    """Problems with responses -> [(prompt tokens, response tokens)]; those longer than max_length tokens are
    left out, and counted."""
    examples = [(sample.encode_prompt(policy.tokenizer, problem.question),
                 sample.encode_response(policy.tokenizer, problem.response)) for problem in problems]
    kept = [(prompt, response) for prompt, response in examples if len(prompt) + len(response) <= max_length]
    if not kept:
        raise data.InputError(f"every example is longer than --max-length {max_length} tokens: raise it, up "
                              "to the model's context")
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept)} of {len(examples)} examples are longer than "
              f"--max-length {max_length} tokens: left out")
    return kept


def draw_batches(count, batch, epochs, seed):
    """Row numbers of each step's batch: every epoch goes through all `count` rows in an order of its own."""
    batches = []
    for epoch in range(epochs):
        order = Random(f"{seed} {epoch}").sample(range(count), count)
        batches += [order[i:i + batch] for i in range(0, count, batch)]
    return batches


def add_gradient(policy, batch, micro_tokens):
    """Add the gradient of a batch's loss to the parameters' .grad, by micro-batches. Returns the loss."""
    lengths = [len(prompt) + len(response) for prompt, response in batch]
    answer_tokens = sum(len(response) for _, response in batch)  # the whole batch's: the parts add up
    loss = 0.0
    for rows in micro_batches(lengths, micro_tokens):
        examples = [batch[row] for row in rows]
        inputs, targets = collate(examples, policy.device, policy.tokenizer.pad_token_id or 0)  # (B, T) each
        part = -sum_of_logprobs(policy.model, inputs, targets) / answer_tokens
        part.backward()
        loss += part.item()
    return loss


def train(policy, examples, args, run, log):
    """Fine-tune policy.model in place on (prompt, response) token lists, from the last saved step on."""
    optimizer, first = Optimizer(policy.model, args.lr, args.weight_decay), run.state["step"]
    if first:
        optimizer.load_state(run.state.pop("optimizer"))
    batches = draw_batches(len(examples), args.batch, args.epochs, args.seed)
    progress = tqdm(batches[first:], "sft", total=len(batches), initial=first, unit="step", mininterval=1)
    with run.ctrl_c:
        for step, rows in enumerate(progress, first + 1):
            start = time.time()
            batch = [examples[row] for row in rows]
            loss = add_gradient(policy, batch, args.micro_tokens)
            norm = optimizer.step(clip=1.0)
            check_finite(step, loss, norm, f"begin anew under another --out with a lower --lr than {args.lr}")
            speed = sum(len(prompt) + len(response) for prompt, response in batch) / (time.time() - start)
            progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            log.row(step=step, loss=loss, tokens_per_s=speed, lr=args.lr)
            run.end_of_step(step, step == len(batches), args.save_every, optimizer)
    return loss


# -------------------------------------------------------------------------- 7. A tiny base model from scratch
# A real base model has read answers of every style before anyone fine-tunes it. Ours has to, too: for a base
# that has read only plain answers, injected ones are a competence to be learned from 2,000 examples, and RL
# deletes what is half learned (results/tiny/regimes.md). So it reads (1) skills without answers, in a wording
# that no answer uses, then (2) a quarter skills and the rest plain and injected answers in equal parts: SFT
# then chooses a style and not a competence.
SHARES = {"skill": 0.25, "plain": 0.375, "injected": 0.375}  # of the texts after the first stage
INJECTED_P = (0.2, 0.4, 0.6, 0.8)
NEAR = 0.5  # of the reflections: on a node whose missing parent is solved next, so that they lead somewhere
# What is one token, besides names, digits and letters: tags, wording of answers, PromptBench and skills.
PHRASES = [
    *sample.TAGS, "\\boxed", "The number of", " more than", " times", " the sum of", " the difference of",
    " and", ".\n", "How many", " does each", " have?", " = ", " + ", " - ", " * ", "- Let ",
    " be the number of", "- The number of", " is written ", "- Now call the number of", ". Then ", ". So ",
    ". But", " must be known first, so ", " has to wait.\n", "The final answer is ",
    "The value of ", " is ", " gets its value by ", "adding together the value of ",
    "subtracting the value of ", " from the value of ", "multiplying together the value of ",
    "squaring the value that ", " has", "What is the value of ", "Let's solve ", ", given that ", ", but ",
    "quote", "lack", "know", "next", "tree", "let", " be ", " made of", " nothing", " given"]
EXAM_EVERY = 10  # pools of 256 texts between two rows of the log
# What the problems look like, from easy to hard; the harder ones join in during the first half of the tokens,
# or are there from the start in a run without skills first: it goes on from a base that knows the easy ones.
# All are drawn equally often; what stands here twice, twice as often.
CURRICULUM = {"igsm": [dict(ops=(1, 3)), dict(ops=(3, 5), size=(3, 4)), dict(ops=(6, 8), size=(4, 5)),
                       dict(ops=(8, 10), size=(5, 6))],
              "promptbench": [dict(depth=2, redundancy=(0, 2)), dict(depth=3, redundancy=(0, 2)),
                              dict(depth=4, redundancy=(0, 2)), dict(depth=4, redundancy=(0, 2))]}
COMMON = {"igsm": dict(max_value=100, tidy=True), "promptbench": dict(max_value=1000, names=64)}


def tiny_tokenizer():
    """A word-level tokenizer for our problems: about 1,100 tokens, 140 for an iGSM problem with 4 operations.

    An item's name is one token, "each <item>'s" is another, so is a PromptBench name; digits and letters are
    single tokens, and so are the tags and PHRASES. All else is spelled in characters, or in bytes."""
    items = [item for world in data.WORLDS for groups in world.values() for group in groups for item in group]
    categories = [category for world in data.WORLDS for category in world]
    phrases = sorted(PHRASES, key=len, reverse=True)  # the longest one that fits wins
    starts = [" equals", " equals ", ". It equals", ". It equals "]  # with the space where a number follows
    joints = [", ", " and "]  # with the space where a PromptBench name follows
    words = [*phrases, *starts, *joints, *(f" each {item}'s" for item in items),
             *(f" {name}" for name in items + categories), *data.NAMES[:COMMON["promptbench"]["names"]]]
    special = ["<pad>", "<end>", "<user>", "<model>"]
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = dict.fromkeys(special + characters + [f"<0x{i:02X}>" for i in range(256)] + words)
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[],
                                     ignore_merges=True, byte_fallback=True))
    name, short = "[A-Z][a-z]+(?: [A-Z][a-z]+)*", "(?<![A-Za-z])a[a-h]{2}(?![A-Za-z])"
    pieces = [r"(?:\. It)? equals(?! [0-9])|(?:\. It)? equals ", f"(?:,| and) (?={short})",
              *map(re.escape, phrases), f" each {name}'s", f" {name}", short, r"\n", "."]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(pieces)), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                      additional_special_tokens=["<user>", "<model>"])
    # the system message is left out: it would only cost tokens
    wrapped.chat_template = ("{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}"
                             "{% if add_generation_prompt %}<model>{% endif %}")
    return wrapped


def tiny_policy(width, layers, heads, seed):
    """A Qwen2-shaped model with random weights and the tokenizer above."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                         max_position_embeddings=2048, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    device = sample.default_device()
    return sample.Policy(Qwen2ForCausalLM(config).to(device), tokenizer, device)


@torch.no_grad()
def take_over(policy, other):
    """Start from another base: its layers, and the embeddings of the tokens that both know.

    Looking things up is what a base from scratch learns last (more than 6 M tokens on a plateau); layers that
    can do it learn the rest, for the other task too, in a fraction of that. Raises InputError."""
    shape = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if any(getattr(other.model.config, name, None) != getattr(policy.model.config, name) for name in shape):
        raise data.InputError("--start: a model of another shape; give a tiny base and its "
                              "--width, --layers and --heads")
    theirs, ours = other.model.state_dict(), policy.model.state_dict()
    embedding = ours.pop("model.embed_tokens.weight")  # (V, H)
    ours.pop("lm_head.weight")  # is the embedding
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
    their_rows = other.tokenizer.get_vocab()
    for token, row in policy.tokenizer.get_vocab().items():
        if token in their_rows:
            embedding[row] = theirs["model.embed_tokens.weight"][their_rows[token]]


# --- what it reads. A skill's text: what stands in place of the question, and the response in pieces (words,
# skill), where the skill is "" for words that nobody could predict, such as which quantity comes next.
def copy_text(rng, problem):
    """Every premise, in another order."""
    described = [node for node in problem.nodes.values() if node.text]
    pieces = []
    for node in rng.sample(described, len(described)):
        line = data.TASKS[problem.task].premise.format(name=node.name, text=node.text)
        before, name, after = line.partition(node.name)
        pieces += [(before + name, ""), (f"{after}\n", "copy")]
    return "Copy.", pieces


def unless_unordered(skill, node, names):
    """The skill that words which list `names` belong to: none for several parents of an implied quantity, as
    no premise says which comes first."""
    return skill if node.text or len(names) < 2 else ""


def quote_text(rng, problem):
    """What a quantity's premise says, or what an implied one is made of."""
    pieces = []
    for node in rng.sample(list(problem.nodes.values()), len(problem.nodes)):
        made_of = f" made of {data.listed(node.parents)}"
        text = node.text.partition(node.name)[2] or (f" {node.text}" if node.text else made_of)
        pieces += [(f"quote {node.name}:", ""), (f"{text}\n", unless_unordered("quote", node, node.parents))]
    return "Quote.", pieces


def missing_text(rng, problem):
    """Quantities become known in any order; which of its parents does another one lack by now?"""
    pieces, known = [], set()
    inner = [node for node in problem.nodes.values() if node.parents]
    for name in rng.sample(list(problem.nodes), len(problem.nodes)):
        if inner:
            node = rng.choice(inner)
            lacking = [p for p in node.parents if p not in known]
            pieces += [(f"lack {node.name}:", ""), (f" {data.listed(lacking) or 'nothing'}\n",
                                                    unless_unordered("missing", node, lacking))]
        pieces.append((f"know {name}\n", ""))
        known.add(name)
    return "Missing.", pieces


def order_text(rng, problem):
    """The needed quantities, each after its parents, in any order that does; only the last is certain."""
    waiting, solved, pieces = data.needed_nodes(problem.nodes, problem.target), set(), []
    while waiting:
        name = rng.choice([q for q in waiting if solved.issuperset(problem.nodes[q].parents)])
        pieces.append((f"next {name}\n", "" if len(waiting) > 1 else "order"))
        waiting.remove(name)
        solved.add(name)
    return f"Order: {problem.target}", pieces


def tree_text(rng, problem):
    """From the target backwards: what each quantity rests on."""
    queue, pieces = [problem.target], []
    for name in queue:  # it grows on the way
        node = problem.nodes[name]
        pieces.append((f"tree {name}: {data.listed(node.parents) or 'given'}\n",
                       unless_unordered("tree", node, node.parents)))
        queue += [p for p in node.parents if p not in queue]
    return f"Tree: {problem.target}", pieces


def letters_text(rng, problem):
    """Formulas in letters and in numbers, with values drawn, not computed: binding without arithmetic."""
    pieces, letters, values = [], {}, {}
    for name in data.needed_nodes(problem.nodes, *rng.sample(list(problem.nodes), len(problem.nodes))):
        node = problem.nodes[name]
        letters[name] = data.LETTERS[len(letters)] if data.TASKS[problem.task].letters else name
        pieces += [(f"let {name}", ""), (f" be {letters[name]}", "letters")]
        if node.parents:
            for known in (letters, values):
                pieces.append((f": {data.show(known.get(t, t) for t in node.formula)}", "letters"))
        values[name] = rng.randint(-20, 99) if rng.random() < 0.2 else rng.randint(0, 40)
        pieces.append((f": {values[name]}\n", ""))
    return "Letters.", pieces


def sums_text(rng, problem):
    """Arithmetic, one operation at a time, in the range of the problems' values."""
    limit = COMMON[problem.task]["max_value"]

    def operand():
        if rng.random() < 0.4:
            return rng.randint(0, 9)
        return rng.randint(-limit // 3, limit - 1) if rng.random() < 0.2 else rng.randint(0, 60)

    pieces = []
    while len(pieces) < 24:
        formula = (operand(), rng.choice("+++---**"), operand())
        value = data.evaluate(formula)
        if abs(value) < 1.3 * limit:
            pieces += [(f"{data.show(formula)} = ", ""), (f"{value}.\n", "sums")]
    return "Sums.", pieces


SKILLS = {  # and how often each is read
    "copy": (copy_text, 1), "quote": (quote_text, 3), "missing": (missing_text, 15), "order": (order_text, 2),
    "tree": (tree_text, 2), "letters": (letters_text, 3), "sums": (sums_text, 15)}


def skill_text(rng, skill, problem):
    """A skill's text on a problem's premises: (question, pieces)."""
    asked, pieces = SKILLS[skill][0](rng, problem)
    premises = [] if skill == "sums" else problem.question.split("\n")[:-1]
    return "\n".join([*premises, asked]), [("\n", ""), *pieces]


def draw_text(rng, progress, args):
    """One text, (question, pieces), by how far the training is: `progress` goes from 0 to 1."""
    easy_to_hard = CURRICULUM[args.task]
    harder = min(1.0, 2 * progress) if args.skills else 1.0  # the share of the harder ones that has joined in
    known = easy_to_hard[:2 + round(harder * (len(easy_to_hard) - 2))]
    style = "skill" if progress < args.skills else rng.choices(list(SHARES), list(SHARES.values()))[0]
    problem = ""
    while isinstance(problem, str) or data.split_of(problem.question) != "train":
        problem = data.TASKS[args.task].draw(rng, **rng.choice(known), **COMMON[args.task])
    if style == "skill":
        skill, = rng.choices(list(SKILLS), [often for _, often in SKILLS.values()])
        return skill_text(rng, skill, problem)
    response = problem.response
    while style == "injected" and response == problem.response:  # until something was injected
        # all behaviors together, or now and then one alone
        behaviors = inject.BEHAVIORS if rng.random() < 0.7 else [rng.choice(inject.BEHAVIORS)]
        response = inject.inject(problem, problem.response, behaviors, rng.choice(INJECTED_P), rng, near=NEAR)
    return problem.question, [(response.removeprefix("<think>"), "")]


def encode_text(tokenizer, text):
    """(question, pieces) -> (prompt tokens, response tokens, the skill of each response token)."""
    question, pieces = text
    response = "".join(words for words, _ in pieces)
    skill_at = [skill for words, skill in pieces for _ in words]
    encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
    return (sample.encode_prompt(tokenizer, question), encoded.input_ids + [tokenizer.eos_token_id],
            [skill_at[start] for start, _ in encoded.offset_mapping] + [""])


class Exam:
    """What the log says of a base, on validation problems: the share of each skill's predictable tokens that
    it gets right, the text before them given; and the share right of one rollout each at temperature 1."""

    def __init__(self, policy, args):
        rng, options = Random(f"held out {args.seed}"), CURRICULUM[args.task][2] | COMMON[args.task]
        stream = data.generate(args.task, seed=args.seed, split="val", **options)
        self.policy, self.problems = policy, list(itertools.islice(stream, 100))
        self.texts = [encode_text(policy.tokenizer, skill_text(rng, skill, problem))
                      for problem in self.problems[:24] for skill in SKILLS]

    def take(self, seed):
        return self.skills() | {"right": self.rollouts(seed)}

    @torch.no_grad()
    def skills(self):
        right, total = Counter(), Counter()
        lengths = [len(prompt) + len(response) for prompt, response, _ in self.texts]
        for group in micro_batches(lengths, 4096):
            texts = [self.texts[row] for row in group]
            inputs, targets = collate([text[:2] for text in texts], self.policy.device, 0)  # (B, T)
            hits = self.policy.model(input_ids=inputs).logits.argmax(-1) == targets
            for (_, _, skills), hit, target in zip(texts, hits, targets):
                hit = hit[target != sample.IGNORE].tolist()  # one for each token of the response
                total.update(skills)
                right.update(skill for skill, good in zip(skills, hit) if good)
        return {skill: right[skill] / total[skill] for skill in SKILLS}

    def rollouts(self, seed):
        tokenizer = self.policy.tokenizer
        prompts = [sample.encode_prompt(tokenizer, problem.question) for problem in self.problems]
        groups = sample.generate(self.policy, prompts, 1, max_new_tokens=400, seed=seed)
        texts = [sample.decode(tokenizer, rollout.tokens) for rollout, in groups]
        return sum(data.reward(text, p.answer) for text, p in zip(texts, self.problems)) / len(self.problems)


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all set to about 1 (Jordan et al. 2024), at the size of an AdamW
    update. PyTorch's own does the same in bf16, 20 times slower than fp32 on a CPU without bf16 products."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))  # Nesterov's look ahead
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(x, steps=5):
    """x (m, n) with its singular values moved close to 1 by Newton-Schulz iterations of an odd polynomial."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


class MuonAdamW:
    """Muon on the matrices, AdamW on embeddings, norms and biases."""

    def __init__(self, model, lr):
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.params, self.lr = [p for _, p in named], lr
        adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.parts = [Muon(matrices, lr), adam]

    def step(self, factor):
        """Returns the gradient's norm before it is clipped; if that is not finite, no weight is touched."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0).item()
        for part in self.parts:
            part.param_groups[0]["lr"] = self.lr * factor
            if math.isfinite(norm):
                part.step()
            part.zero_grad()
        return norm

    def state(self):
        return {"parts": [part.state_dict() for part in self.parts],
                "params": [p.detach() for p in self.params]}

    @torch.no_grad()
    def load_state(self, state):
        sample.check_tensors("the saved state", state.get("params", ()), self.params)
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)
        for param, saved in zip(self.params, state["params"]):
            param.copy_(saved)


def draw_pool(tokenizer, number, progress, args):
    """Batches of pool `number`: 256 texts, those of similar length together. Each pool has a random generator
    of its own, so that a run can go on after a kill without one having been saved."""
    rng = Random(f"{args.seed} {number}")
    texts = [encode_text(tokenizer, draw_text(rng, progress, args))[:2] for _ in range(256)]
    batches = micro_batches([len(prompt) + len(response) for prompt, response in texts], args.micro_tokens)
    return [[texts[row] for row in batch] for batch in rng.sample(batches, len(batches))]


def pretrain_step(policy, batch, optimizer, factor):
    """One update on the mean log-prob of the responses' tokens -> (loss, gradient norm)."""
    model, kind = policy.model, policy.device.type
    # bf16 where the machine has it: a CPU without would take 20 times as long as with fp32
    bf16 = kind == "cuda" or (kind == "cpu" and torch.backends.mkldnn.is_available()
                              and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    inputs, targets = collate(batch, policy.device, policy.tokenizer.pad_token_id)
    kept = targets != sample.IGNORE
    with torch.autocast(kind, torch.bfloat16, enabled=bf16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state  # (B, T, H)
        logits = model.lm_head(hidden[kept]).float()  # (response tokens, V)
    loss = torch.nn.functional.cross_entropy(logits, targets[kept])
    loss.backward()
    return loss.item(), optimizer.step(factor)


def schedule(updates, progress):
    """The share of the full learning rate: rise over 50 updates, hold, fall over the last 30% of the tokens
    (the fall is worth more than twice the tokens)."""
    return min(1.0, (updates + 1) / 50, max(0.02, (1 - progress) / 0.3))


def pretrain(policy, args, run):
    """Train a tiny base on `args.tokens` tokens: skills first, then answers; short problems first."""
    optimizer = MuonAdamW(policy.model, args.lr)
    pool, seen, updates = run.state["step"], run.state.get("seen", 0), run.state.get("updates", 0)
    if pool:
        optimizer.load_state(run.state.pop("optimizer"))
    exam = Exam(policy, args)
    columns = ["pool", "tokens", "loss", "tokens_per_s", "lr", *SKILLS, "right"]
    log = Log(args.out.removesuffix(".pt") + ".csv", columns, keep=pool // EXAM_EVERY)
    bar = tqdm(total=args.tokens, initial=seen, desc="pretraining", unit="token", unit_scale=True)
    while seen < args.tokens:
        losses, before, start = [], seen, time.time()
        for batch in draw_pool(policy.tokenizer, pool, seen / args.tokens, args):
            factor = schedule(updates, seen / args.tokens)
            loss, norm = pretrain_step(policy, batch, optimizer, factor)
            check_finite(updates + 1, loss, norm, "begin anew under another --out with a lower --lr")
            losses.append(loss)
            seen += sum(len(prompt) + len(response) for prompt, response in batch)
            updates += 1
        pool, last = pool + 1, seen >= args.tokens
        bar.update(seen - before)
        if pool % EXAM_EVERY == 0 or last:
            row = dict(pool=pool, tokens=seen, loss=sum(losses) / len(losses), lr=args.lr * factor,
                       tokens_per_s=(seen - before) / (time.time() - start), **exam.take(seed=pool))
            log.row(**row)
            tqdm.write(", ".join(f"{name} {row[name]:.3g}" for name in columns))
            if last or os.path.exists(run.path):  # OUT without a saved state would pass for finished
                sample.save_policy(args.out, policy, vars(args) | row, dtype=torch.bfloat16)
        run.end_of_step(pool, last, args.save_every, optimizer, seen=seen, updates=updates)

# ----------------------------------------------------------------- 8. Hand-over: what TRL and verl start from
def hand_over(folder, policy, files):
    """Write into `folder`, a new one: policy/; data.py, which holds the reward; and `files`, {name: a text or
    records}. Their settings' paths start there."""
    sample.export_policy(policy, os.path.join(folder, "policy"))
    shutil.copy(data.__file__, folder)
    for name, content in files.items():
        path = os.path.join(folder, name)
        if isinstance(content, str):
            with data.replacing(path) as file:
                file.write(content)
        else:
            data.write_records(path, content)
    print(f"{folder}: policy, data.py, {', '.join(files)}; next: \"When one GPU is not enough\" in README.md")


def trl_settings(policy, args, file, batch, longest, **more):
    """The settings of a run under TRL's names, as YAML. batch: the examples of one update, each of at most
    `longest` tokens; TRL splits it evenly, as far as --micro-tokens asks for."""
    micro = max(size for size in range(1, batch + 1)
                if batch % size == 0 and (size == 1 or size * longest <= args.micro_tokens))
    settings = dict(
        model_name_or_path="policy", datasets=[dict(path="json", data_files=file)], seed=args.seed,
        per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro,
        bf16=policy.model.dtype == torch.bfloat16, gradient_checkpointing=args.gradient_checkpointing,
        learning_rate=args.lr, lr_scheduler_type="constant", weight_decay=args.weight_decay,
        adam_beta1=0.9, adam_beta2=0.95, logging_steps=1, save_steps=args.save_every, report_to="none")
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in (settings | more).items())


def hand_over_sft(policy, problems, args):
    """--hand-over: the examples as token ids with labels (for TRL; no template can come between) and, where
    pyarrow is installed, as messages (for verl)."""
    examples = load_examples(policy, problems, math.inf)  # all: verl needs the text of those that are kept
    kept = [(problem, prompt, response) for problem, (prompt, response) in zip(problems, examples)
            if len(prompt) + len(response) <= args.max_length]
    rows = [{"input_ids": prompt + response, "labels": [sample.IGNORE] * len(prompt) + response}
            for _, prompt, response in kept]
    settings = trl_settings(
        policy, args, "sft.jsonl", args.batch, max(len(row["labels"]) for row in rows), output_dir="sft",
        num_train_epochs=args.epochs, max_length=args.max_length, max_grad_norm=1.0)
    hand_over(args.hand_over, policy, {"sft.jsonl": rows, "trl-sft.yaml": settings})
    try:
        import pyarrow, pyarrow.parquet
    except ImportError:
        return print("no sft.parquet, since pyarrow is not installed: verl's SFT needs it, TRL does not")
    messages = [[{"role": "user", "content": problem.question},
                 {"role": "assistant", "content": problem.response.removeprefix("<think>")}]
                for problem, _, _ in kept]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}),
                                os.path.join(args.hand_over, "sft.parquet"))


# --------------------------------------------------------------------------------------------- 9. The command
PRESETS = {"tiny": dict(lr=5e-4, batch=32, epochs=1, p=0.3),  # ours, for a model a thousand times smaller
           "tiny, promptbench": dict(p=0.1),
           "paper": dict(lr=5e-6, batch=128, epochs=5, p=0.1)}


def add_flags(parser):
    add, usual = parser.add_argument, describe_presets(PRESETS)
    add("--model", default="tiny",
        help="tiny (the task's base), scratch (pretrain one), a .pt file, a Hugging Face folder, a name")
    add("--data", help="JSONL with responses; default: --n fresh problems with --method's answers")
    add_run_flags(parser, out="sft.pt")
    problems = parser.add_argument_group("fresh problems")
    data.add_problem_flags(problems)
    add = problems.add_argument
    add("--n", type=data.positive_int, default=2000, help="how many")
    add("--method", choices=["vanilla", "bridge", "pp-aug", "rc-aug"], default="bridge", help="their answers")
    add("--behaviors", nargs="*", choices=inject.BEHAVIORS, default=inject.BEHAVIORS)
    add("--p", type=data.share, help=f"injection probability of analysis and reflection; {usual.p}")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--lr", type=data.positive, help=usual.lr)
    add("--batch", type=data.positive_int, help=f"examples a step; {usual.batch}")
    add("--epochs", type=data.positive_int, help=usual.epochs)
    add("--max-length", type=data.positive_int, default=2048, help="longer examples are left out, tokens")
    add = parser.add_argument_group("pretraining (--model scratch)").add_argument
    add("--tokens", type=data.positive, default=32e6)
    add("--skills", type=data.share, default=0.3, help="share of the tokens, the first, of skills alone")
    add("--start", help="another base to start from: its body, and the embeddings of shared tokens")
    size = data.number(int, 1, 4096, "a whole number from 1 to 4096")
    add("--width", type=size, default=128)
    add("--layers", type=size, default=6)
    add("--heads", type=size, default=2)


def check(args, parser, start):
    """Refuse flags that contradict each other, each in one sentence."""
    check_files(args, parser, start)
    if args.data:
        parser.refuse(args, ("method", "behaviors", "p", "n"), "with --data, which brings its answers")
    if args.method != "bridge":
        parser.refuse(args, ("behaviors", "p"), f"with --method {args.method}")
    elif not {"analysis", "reflection"}.intersection(args.behaviors):
        parser.refuse(args, ("p",), "without analyses and reflections")
    if args.model != "scratch":
        parser.refuse(args, ("tokens", "skills", "start", "width", "layers", "heads"),
                      "without --model scratch")


def run_pretraining(args, parser):
    """--model scratch: section 7."""
    parser.refuse(args, ("data", "ops", "size", "depth", "redundancy", "names", "tidy", "max_value",
                         "max_answer", "method", "behaviors", "p", "n", "batch", "epochs", "max_length",
                         "weight_decay", "gradient_checkpointing", "export", "hand_over"),
                  "with --model scratch")
    if args.width % (2 * args.heads):
        raise data.InputError("--width must be divisible by twice --heads")
    args.lr = args.lr or 1e-3
    run = Run(args.out, args.resume)
    policy = tiny_policy(args.width, args.layers, args.heads, args.seed)
    if args.start:
        take_over(policy, sample.load_policy(args.start))
    run.begin(args, policy.model)
    with run.ctrl_c:
        pretrain(policy, args, run)
    run.finish()


def answered_problems(args, options):
    """Those of --data, or --n fresh ones with the answers of --method."""
    if args.data:
        problems = data.read_problems(args.data)
        for problem in problems:
            if not problem.response:
                raise data.InputError(f"{args.data}: problem {problem.id} has no response to train on")
        return problems
    problems = []
    for problem in itertools.islice(data.generate(seed=args.seed, **options), args.n):
        copies = inject.augment(problem, args.method, args.behaviors, args.p, seed=args.seed)
        problems += [replace(problem, question=question, response=response) for question, response in copies]
    return problems


def main():
    parser = data.Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args()
    options = problem_options(args, parser)
    start = sample.TINY_BASE.with_stem(args.task) if args.model == "tiny" else args.model
    check(args, parser, start)
    args.command = " ".join(["python", "sft.py", *sys.argv[1:]])
    if args.model == "scratch":
        return run_pretraining(args, parser)
    run = None if args.hand_over else Run(args.out, args.resume)
    policy = sample.load_policy(start)
    fill_in(args, policy.model, PRESETS)
    problems = answered_problems(args, options)
    args.max_length = min(args.max_length, sample.context(policy))
    examples = load_examples(policy, problems, args.max_length)
    if args.hand_over:
        return hand_over_sft(policy, problems, args)
    check_head(policy)
    lengths = [len(prompt) + len(response) for prompt, response in examples]
    tokens = max(args.micro_tokens, *lengths)
    print(sample.describe(policy))
    print(f"{len(examples)} examples ({args.data or args.method}), {sum(lengths) / len(examples):.0f} tokens "
          f"each; batch {args.batch}, lr {args.lr}, {args.epochs} epochs; writes {args.out}")
    print(describe_memory(predict_memory(policy.model, tokens, checkpointing=args.gradient_checkpointing),
                          free_memory(policy.model)))
    run.begin(args, policy.model, free=ROUNDING)
    if args.gradient_checkpointing:
        checkpoint_layers(policy.model)
    columns = ["step", "loss", "tokens_per_s", "lr"]
    log = Log(args.out.removesuffix(".pt") + ".csv", columns, keep=run.state["step"])
    begun = time.time()
    loss = train(policy, examples, args, run, log)
    sample.save_policy(args.out, policy, dict(vars(args), base=policy.info, stage="sft", loss=loss))
    if args.export:
        sample.export_policy(policy, args.export)
    run.finish()
    print(f"{args.out}: loss {loss:.3f} after {time.time() - begun:.0f} s; "
          f"next: python grpo.py{data.task_flag(args.task)} --ckpt {args.out}")


if __name__ == "__main__":
    data.run_cli(main)
