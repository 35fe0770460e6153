"""Chapter 3: the policy. Load it, prompt it, sample from it, and ask for the log-prob of what it said.

    python sample.py                                   # sft.pt, or the tiny base model where there is none
    python sample.py --ckpt grpo.pt --n 8 --temperature 0.7

Reinforcement learning on a language model needs two things from it: rollouts (section 4) and the log-probability of given
tokens with its gradient (section 3). Both run over one set of weights, the parameters of a Hugging Face model, so the sampler
can never be stale. The sections, in reading order: 1 policy and checkpoint, 2 prompt, 3 log-prob, 4 sampler, 5 accuracy, 6 command.

Simplifications, against what an inference server does:
1. One GPU, one process. The KV cache is one rectangle per row and one per prompt (no pages), each as long as the longest.
2. The rows of one group share their prompt's keys and values; prompts that begin alike do not share their beginning.
3. No top-p, top-k or penalties: they would make the sampled distribution differ from the one that is trained.
4. Our decode step knows Qwen2/2.5, Qwen3 and Llama 3; every other model runs through its own slow forward (a line says so).
"""
import argparse
import functools
import json
import math
import os
import pickle
import sys
import tempfile
import time
import zipfile
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import data
from data import InputError

try:                                       # no Triton on macOS and Windows: the PyTorch twins below do the same sums
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# ---------------------------------------------------------------------------------------------------------------------------
# 1. The policy and its checkpoint
# ---------------------------------------------------------------------------------------------------------------------------
FORMAT, VERSION = "bridge-policy", 1
TINY_BASE = Path(__file__).parent / "results" / "tiny" / "base.pt"


@dataclass
class Policy:
    """A causal language model with its tokenizer. `info` holds the arguments that made it and where it came from."""
    model: torch.nn.Module
    tokenizer: object
    device: torch.device
    info: dict = field(default_factory=dict)
    engine: object = field(default=None, repr=False)          # the sampler's KV cache and CUDA graphs, kept between calls

    @property
    def eos_ids(self):
        """Every token id that ends a response: the tokenizer's, and those that the model's generation config adds."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        ids = ids if isinstance(ids, (list, tuple)) else [ids]
        return {i for i in [self.tokenizer.eos_token_id, *ids] if i is not None}


def default_device():
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def load_policy(path_or_name, device=None, dtype=None):
    """A Policy from a .pt checkpoint of this project, a Hugging Face folder, or a name on the Hugging Face hub.

    dtype defaults to bf16 on CUDA and fp32 elsewhere. Raises data.InputError, in one sentence, for a file that is missing,
    truncated or not a checkpoint, and for a name that cannot be loaded.
    """
    device = torch.device(device) if device else default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    path = str(path_or_name)
    if path.endswith(".pt"):
        model, tokenizer, info = _read_checkpoint(path, dtype)
    else:
        try:
            # tokenizer.json as it is written; AutoTokenizer would rebuild some from the model type and lose a custom vocabulary
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{path}: not a .pt file, and Hugging Face cannot load it as a folder or a name ({reason})") from None
        info = {"source": path}
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no end token, so a response could never end; use a tokenizer with one")
    return Policy(model.to(device).eval(), tokenizer, device, info)


def save_policy(path, policy, info=None, dtype=None):
    """Write one .pt file that torch.load(weights_only=True) opens. The file appears whole or not at all.

    dtype (e.g. torch.bfloat16) rounds the stored weights; None stores them as they are. A tied head is stored once.
    """
    weights, stored = {}, set()
    for name, tensor in policy.model.state_dict().items():
        if tensor.data_ptr() not in stored:
            stored.add(tensor.data_ptr())
            tensor = tensor.detach()
            weights[name] = tensor.to("cpu", dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
    tokenizer = policy.tokenizer
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    content = {
        "format": FORMAT, "version": VERSION, "weights": weights,
        "config": json.loads(policy.model.config.to_json_string(use_diff=False)),
        "eos_ids": sorted(policy.eos_ids),
        "tokenizer": {"json": tokenizer.backend_tokenizer.to_str(), "special": special, "chat_template": tokenizer.chat_template},
        "info": json.loads(json.dumps(info if info is not None else policy.info, default=str)),
    }
    write_atomically(path, content)


def write_atomically(path, content):
    """torch.save through a temporary file in the same folder: a crash leaves the old file or the new one, never half a one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)                           # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_checkpoint(path, dtype):
    """model, tokenizer, info from one of our .pt files. weights_only: a checkpoint is data and can never run code."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; make it first (sft.py writes sft.pt, grpo.py writes grpo.pt) or name another")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise InputError(f"{path}: truncated, or not a PyTorch file; write it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: a PyTorch file, but not a policy of this project; name a file that sft.py or grpo.py wrote")
    if content["version"] != VERSION:
        raise InputError(f"{path}: checkpoint format {content['version']}, this code reads {VERSION}; write it again")
    try:
        config = AutoConfig.for_model(**content["config"])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        result = model.load_state_dict(content["weights"], strict=False)
        model.tie_weights()
        parts = content["tokenizer"]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(parts["json"]), **parts["special"])
        tokenizer.chat_template = parts["chat_template"]
        model.generation_config.eos_token_id = content["eos_ids"]
    except Exception as error:                    # whatever a damaged dict makes Hugging Face raise, the user reads one sentence
        raise InputError(f"{path}: its contents do not make a model ({str(error).splitlines()[0]}); write it again") from None
    loaded = {tensor.data_ptr() for name, tensor in model.state_dict().items() if name in content["weights"]}
    missing = [name for name in result.missing_keys if model.state_dict()[name].data_ptr() not in loaded]     # a tied head is not
    if missing or result.unexpected_keys:
        raise InputError(f"{path}: weights do not fit the config (first: {(missing + result.unexpected_keys)[0]}); write it again")
    return model, tokenizer, content["info"]


def export_policy(policy, folder):
    """Write a Hugging Face folder that transformers (and vLLM) load with the same logits.

    Load the tokenizer of the tiny base with PreTrainedTokenizerFast: AutoTokenizer takes any "qwen2" folder for Qwen's own.
    """
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def default_checkpoint(name=None):
    """The checkpoint to use: `name` if given, else sft.pt, else the tiny base model (a line on stderr says so)."""
    if name:
        if str(name).endswith(".pt") and not os.path.isfile(name):
            raise InputError(f"{name}: no such file (--ckpt); run sft.py first or name another checkpoint")
        return str(name)
    if os.path.isfile("sft.pt"):
        return "sft.pt"
    print(f"no sft.pt here: using the tiny base model {TINY_BASE} (python sft.py fine-tunes it)", file=sys.stderr)
    return str(TINY_BASE)


def describe(policy):
    """One line: size, device, dtype, and which code computes log-probs and runs the decode step."""
    parameters = sum(p.numel() for p in policy.model.parameters())
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")
    kernel = _pick_backend("auto", next(policy.model.parameters()))
    reason = why_not_ours(policy.model)
    step = f"Hugging Face's forward, slow ({reason})" if reason else "our decode step"
    return f"policy: {parameters / 1e6:.1f}M parameters, {policy.device.type}, {dtype}; log-prob kernel: {kernel}; sampler: {step}"


# ---------------------------------------------------------------------------------------------------------------------------
# 2. The prompt: the only place where text becomes tokens and tokens text
# ---------------------------------------------------------------------------------------------------------------------------
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SYSTEM_PROMPT = ("Solve the user's problem. First reason step by step inside <think> and </think>, "
                 "then give the result inside <answer> and </answer> as \\boxed{integer}.")


def encode_prompt(tokenizer, question):
    """Token ids of the prompt. It always ends with the opening <think>, exactly once, and holds at most one BOS."""
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if text.rstrip().endswith("<think>"):                            # templates of "thinking" models write it themselves
            text = text.rstrip().removesuffix("<think>")
        bos = []                                                         # the template writes its own BOS where it wants one
    else:
        text = f"{SYSTEM_PROMPT}\n\n{question}\n"
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(text + "<think>", add_special_tokens=False).input_ids


def encode_response(tokenizer, response):
    """Token ids of the answer to train on: the response without its opening <think>, then exactly one EOS."""
    text = response.removeprefix("<think>")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids + [tokenizer.eos_token_id]


@functools.lru_cache(maxsize=8)
def _hidden_ids(tokenizer):
    """Ids that decode() leaves out: special tokens, but never the response's own tags, whatever the tokenizer calls them."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - set(tokenizer.convert_tokens_to_ids(list(TAGS)))


def decode(tokenizer, tokens):
    """The text of a response (what follows the prompt), end tokens and other special tokens left out."""
    hidden = _hidden_ids(tokenizer)
    return tokenizer.decode([t for t in tokens if t not in hidden], clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------------------------------------
# 3. Log-probabilities of given tokens, and the entropy of the distribution they were drawn from
#
# For a row x of logits (already divided by the temperature) and its target y, with m = max x and d = sum e^(x - m):
#     logprob = (x_y - m) - log d            entropy H = log d - sum e^(x - m) (x - m) / d
#     d logprob / d x = onehot(y) - p        d H / d x = -p (log p + H)            p = e^(x - m - log d)
# The backward pass needs four numbers a token, its stats: logprob, H, m, log d. m and log d are kept apart, since m + log d
# would round log d away where all logits share a large offset.
# ---------------------------------------------------------------------------------------------------------------------------
IGNORE = -100                              # a target with this value is masked: log-prob 0, entropy 0, no gradient


def _row_blocks(x, *others):
    """1 MB of logits at a time, with the same rows of the other tensors: several passes over x then run in a CPU's cache."""
    size = max(1, (1 << 18) // x.shape[1])
    return zip(*(tensor.split(size) for tensor in (x, *others)))


def rows_forward(x, targets, stats, scale):
    """The specification of the forward kernel. x (N, V) logits, targets (N,), scale = 1 / temperature; fills stats (N, 4)."""
    for x, y, stats in _row_blocks(x, targets, stats):
        x = x.float() * scale
        m = x.amax(-1, keepdim=True)                         # (rows, 1), like all sums below
        x_y = x.sub_(m).gather(-1, y.clamp(min=0)[:, None])
        e = x.exp()
        d = e.sum(-1, keepdim=True)
        s = e.mul_(x.clamp_(min=-1e4)).sum(-1, keepdim=True)          # a logit of -inf: e is 0, and 0 * -inf would be NaN
        torch.cat([x_y - d.log(), d.log() - s / d, m, d.log()], -1, out=stats)
        stats[y == IGNORE] = 0


def rows_backward(x, targets, stats, g_logprob, g_entropy, out, scale):
    """The specification of the backward kernel: d loss / d x into `out` (N, V), which may be x itself.

    g_logprob and g_entropy (N,) are the upstream gradients, one per token.
    """
    for x, y, stats, g, g_entropy, out in _row_blocks(x, targets, stats, g_logprob[:, None], g_entropy[:, None], out):
        _, entropy, m, log_d = stats.split(1, dim=1)                  # (rows, 1) each
        logp = (x.float() * scale).sub_(m).sub_(log_d)
        p = logp.exp()
        grad = logp.clamp_(min=-1e4).add_(entropy).mul_(g_entropy).add_(g).mul_(p).neg_()       # -p (g + g_H (log p + H))
        grad.scatter_add_(1, y.clamp(min=0)[:, None], g)              # in fp32: rounding comes after the subtraction
        out.copy_(grad.mul_(scale))
        out[y == IGNORE] = 0


if triton is not None:
    @triton.jit
    def _forward_kernel(x_ptr, target_ptr, stats_ptr, stride, V, scale, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)                  # int64: row * stride passes 2^31 at 16,384 x 151,936
        target = tl.load(target_ptr + row)
        if target == -100:
            return                                           # its stats are zero already
        x_ptr += row * stride
        m, d, s = -1e30, 0.0, 0.0                            # running max, sum e^(x-m), sum e^(x-m) (x-m)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + column, mask=column < V, other=-float("inf")).to(tl.float32) * scale
            m_new = tl.maximum(m, tl.max(x, 0))
            shrink = tl.exp(m - m_new)                       # the maximum moved: what was summed so far is rescaled,
            s = shrink * (s + (m - m_new) * d)               # e^(x-m') (x-m') = e^(m-m') e^(x-m) ((x-m) + (m-m'))
            e = tl.exp(x - m_new)
            d = shrink * d + tl.sum(e, 0)
            s += tl.sum(tl.where(e > 0, e * (x - m_new), 0.0), 0)       # the tail would be 0 * -inf = NaN
            m = m_new
        log_d = tl.log(d)
        x_y = tl.load(x_ptr + target).to(tl.float32) * scale
        stats_ptr += row * 4
        tl.store(stats_ptr, (x_y - m) - log_d)
        tl.store(stats_ptr + 1, log_d - s / d)
        tl.store(stats_ptr + 2, m)
        tl.store(stats_ptr + 3, log_d)

    @triton.jit
    def _backward_kernel(x_ptr, target_ptr, stats_ptr, g_logprob_ptr, g_entropy_ptr, out_ptr, stride, out_stride, V, scale,
                         BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)          # no sum is left to do: blocks are independent
        target = tl.load(target_ptr + row)
        x = tl.load(x_ptr + row * stride + column, mask=column < V, other=-float("inf")).to(tl.float32) * scale
        stats_ptr += row * 4
        entropy, m, log_d = tl.load(stats_ptr + 1), tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
        g, g_entropy = tl.load(g_logprob_ptr + row), tl.load(g_entropy_ptr + row)          # this token's own, not token 0's
        logp = (x - m) - log_d
        p = tl.exp(logp)
        grad = tl.where(p > 0, -p * (g + g_entropy * (logp + entropy)), 0.0)
        grad = tl.where(column == target, grad + g, grad) * scale
        tl.store(out_ptr + row * out_stride + column, tl.where(target == -100, 0.0, grad), mask=column < V)


def launch_shape(V):
    """(BLOCK, num_warps) for a vocabulary of V: up to 4096 a block, 16 values a thread; larger blocks spill registers."""
    block = min(4096, max(128, triton.next_power_of_2(V)))
    return block, max(1, min(8, block // 512))


def rows_forward_triton(x, targets, stats, scale):
    (N, V), (block, warps) = x.shape, launch_shape(x.shape[1])
    if N:
        _forward_kernel[(N,)](x, targets, stats, x.stride(0), V, scale, BLOCK=block, num_warps=warps)


def rows_backward_triton(x, targets, stats, g_logprob, g_entropy, out, scale):
    (N, V), (block, warps) = x.shape, launch_shape(x.shape[1])
    if N:
        _backward_kernel[(N, triton.cdiv(V, block))](x, targets, stats, g_logprob, g_entropy, out, x.stride(0), out.stride(0), V, scale,
                                                     BLOCK=block, num_warps=warps)


BACKENDS = {"torch": (rows_forward, rows_backward), "triton": (rows_forward_triton, rows_backward_triton)}


def _pick_backend(backend, tensor):
    if backend == "auto":
        return "triton" if triton is not None and tensor.is_cuda else "torch"
    if backend == "triton" and triton is None:
        raise ValueError("backend='triton' needs the triton package; backend='torch' computes the same")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto, triton or torch, not {backend!r}")
    return backend


class _LogitsLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, targets, scale, backend, overwrite):
        stats = torch.zeros(len(x), 4, device=x.device)
        BACKENDS[backend][0](x, targets, stats, scale)
        ctx.save_for_backward(x, targets, stats)
        ctx.options = scale, backend, overwrite
        return stats[:, 0].clone(), stats[:, 1].clone()

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        x, targets, stats = ctx.saved_tensors
        scale, backend, overwrite = ctx.options
        out = x if overwrite else torch.empty_like(x)
        BACKENDS[backend][1](x, targets, stats, g_logprob.contiguous(), g_entropy.contiguous(), out, scale)
        return out, None, None, None, None


def logits_logprobs(logits, targets, *, temperature=1.0, backend="auto", overwrite=False):
    """Log-prob of each target and entropy of its distribution, from logits.

    logits (..., V) any float dtype; targets (...) int64, -100 = masked. Returns logprob, entropy: fp32 in nats, shape of
    targets, differentiable in logits with an own upstream gradient per token. overwrite=True lets the backward pass write
    the gradient over the logits: half the memory, and the logits are lost. Raises ValueError for an unknown backend.
    """
    backend = _pick_backend(backend, logits)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()                         # the kernels want neighbours in the vocabulary side by side
    try:
        x = logits.view(-1, logits.shape[-1])
    except RuntimeError:                                     # a slice such as logits[:, :-1] goes part by part, never copied whole
        parts = [logits_logprobs(x, y, temperature=temperature, backend=backend, overwrite=overwrite) for x, y in zip(logits, targets)]
        return tuple(torch.stack(part) for part in zip(*parts))
    logprob, entropy = _LogitsLogProb.apply(x, targets.reshape(-1).contiguous(), 1 / temperature, backend, overwrite)
    return logprob.view(targets.shape), entropy.view(targets.shape)


CPU_CHUNK = 1 << 26          # bytes of logits at a time: enough rows for fast products
GPU_CHUNK = 1 << 28          # 1/20 of the 16,384 x 151,936 logits in bf16


def _sweep(h, weight, targets, scale, backend, rows, stats=None, upstream=None):
    """Walk over the tokens, `rows` at a time, in one buffer of logits. h (N, H), weight (V, H), targets (N,).

    Fills in the stats (N, 4) where they are None; with upstream = g_logprob (N,), g_entropy (N,) also the gradients.
    Returns stats, d loss / d h (N, H), d loss / d weight (V, H).
    """
    forward, backward = BACKENDS[backend]
    first = stats is None
    stats = torch.zeros(len(h), 4, device=h.device) if first else stats
    grad_h = torch.empty_like(h) if upstream and h.requires_grad else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if upstream and weight.requires_grad else None    # a bf16 sum stalls
    buffer = h.new_empty(min(rows, len(h)), len(weight))     # fresh memory for every chunk would cost a CPU a quarter more
    for start in range(0, len(h), rows):
        part = slice(start, start + rows)
        x, y = h[part], targets[part]
        logits = torch.mm(x, weight.T, out=buffer[:len(x)])           # (rows, V), overwritten below by their own gradient
        if first:
            forward(logits, y, stats[part], scale)
        if upstream:
            backward(logits, y, stats[part], *(g[part] for g in upstream), logits, scale)
        if grad_h is not None:
            torch.mm(logits, weight, out=grad_h[part])
        if grad_weight is not None:
            grad_weight.addmm_(logits.T, x) if x.dtype == torch.float32 else grad_weight.add_(logits.T @ x)
    return stats, grad_h, None if grad_weight is None else grad_weight.to(weight.dtype)


class _LinearLogProb(torch.autograd.Function):
    """Upstream gradients unknown: the backward pass makes the logits a second time, which is cheaper than keeping them."""
    @staticmethod
    def forward(ctx, h, weight, targets, *options):
        stats, _, _ = _sweep(h, weight, targets, *options)
        ctx.save_for_backward(h, weight, targets, stats)
        ctx.options = options
        return stats[:, 0].clone(), stats[:, 1].clone()

    @staticmethod
    def backward(ctx, *upstream):
        *tensors, stats = ctx.saved_tensors
        _, grad_h, grad_weight = _sweep(*tensors, *ctx.options, stats, [g.contiguous() for g in upstream])
        return grad_h, grad_weight, None, None, None, None


class _LinearSum(torch.autograd.Function):
    """All log-probs have the same upstream gradient: gradients for 1 are made in the forward pass, and multiplied by it later."""
    @staticmethod
    def forward(ctx, h, weight, targets, *options):
        one = torch.ones(len(h), device=h.device)
        stats, *gradients = _sweep(h, weight, targets, *options, None, [one, 0 * one])
        ctx.save_for_backward(*gradients)
        return stats[:, 0].sum()

    @staticmethod
    def backward(ctx, g):
        return *(None if gradient is None else gradient * g for gradient in ctx.saved_tensors), None, None, None, None


def _apply(function, hidden, weight, targets, temperature, backend, chunk_bytes):
    backend = _pick_backend(backend, hidden)
    chunk_bytes = chunk_bytes or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK)
    rows = max(1, chunk_bytes // (len(weight) * hidden.element_size()))
    kept = targets != IGNORE                                                      # masked tokens cost nothing from here on
    return function.apply(hidden[kept], weight, targets[kept], 1 / temperature, backend, rows)


def token_logprobs(hidden, weight, targets, *, temperature=1.0, backend="auto", chunk_bytes=None):
    """Log-prob and entropy of each target from the last hidden states, without ever holding the [tokens x vocabulary] matrix.

    hidden (..., H); weight (V, H), the output head; targets (...) int64, -100 = masked (gives 0, 0 and no gradient).
    backend: "auto" (Triton on CUDA, else PyTorch), "triton" or "torch". chunk_bytes bounds one chunk of logits.
    Returns logprob, entropy: fp32 in nats, shape of targets, differentiable in hidden and weight with an own upstream
    gradient per token. The logits are computed in the dtype of hidden, as the sampler does; everything after them is fp32.
    Raises ValueError for an unknown backend.
    """
    values = _apply(_LinearLogProb, hidden, weight, targets, temperature, backend, chunk_bytes)
    return tuple(torch.zeros(targets.shape, device=hidden.device).masked_scatter(targets != IGNORE, value) for value in values)


def sum_logprob(hidden, weight, targets, *, temperature=1.0, backend="auto", chunk_bytes=None):
    """The sum of token_logprobs over all tokens, a scalar. Arguments and errors as there.

    For SFT: the gradients are made in the forward pass (wasted under no_grad), with three matrix products in place of four.
    """
    return _apply(_LinearSum, hidden, weight, targets, temperature, backend, chunk_bytes)


# ---------------------------------------------------------------------------------------------------------------------------
# 4. The sampler
#
# A *row* is one rollout on its way, a *group* the n rows of one prompt. The prompt's keys and values (all but its last token's)
# are computed once and read by the whole group together; each row has a slot of its own for what follows. One step feeds every
# live row its last token and draws the next one. The host looks at the drawn tokens after each step (CUDA: every 16): finished
# rows leave, rows of waiting prompts take their slots (refill), and when none wait, the last rows move into the holes and the
# batch shrinks (compaction).
# ---------------------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Rollout:
    """One sampled response: token ids (end token included), their log-probs in nats, and why it stopped.

    stop: "eos" the end token came; "closed" </answer> was closed and no end token followed; "length" max_new_tokens reached.
    """
    tokens: list
    logprobs: list
    stop: str = ""


# --- drawing a token -------------------------------------------------------------------------------------------------------
# Gumbel-max: argmax_v (x_v + G_v) with G_v = -log E_v, E_v ~ Exp(1), is a draw from softmax(x). The noise is not a stream that
# a schedule could shift but a function: a hash of (seed, prompt, sample, position, vocabulary id).
def mix(x):
    """A bijection on 32-bit integers that scatters its input (int32 tensors; C. Wellons' "lowbias32" constants).

    Three times x ^ (x >> s), with a product after the first two; each works in place on the new tensor that its shift makes."""
    x = (x >> 16).bitwise_and_(0xFFFF).bitwise_xor_(x).mul_(0x7FEB352D)      # >> copies the sign bit: the mask makes it logical
    x = (x >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(x).mul_(-0x7B935975)    # 0x846CA68B as a signed number
    return (x >> 16).bitwise_and_(0xFFFF).bitwise_xor_(x)


def row_keys(seed, prompts, n):
    """(prompts, n) int32 hash keys. mix is a bijection, so the samples of one prompt can never share a key."""
    key = mix(mix(torch.tensor(seed & 0xFFFFFFFF)).to(torch.int32) + torch.tensor((seed >> 32) & 0x7FFFFFFF, dtype=torch.int32))
    key = mix(key ^ mix(torch.arange(prompts, dtype=torch.int32)))
    return mix(key[:, None] + torch.arange(n, dtype=torch.int32))


@functools.lru_cache(maxsize=8)
def _hashed_ids(size, device):                               # of the vocabulary: the same in every step
    return mix(torch.arange(size, device=device, dtype=torch.int32))


def draw(logits, key, position, temperature):
    """One token a row. logits (B, V), key (B,) int32, position (B,) int64 -> token (B,) int64, logprob (B,) fp32.

    The log-prob is that of the sampling temperature; temperature 0 takes the largest logit and its log-prob at temperature 1.
    """
    if triton is not None and logits.is_cuda:
        return draw_triton(logits, key, position, temperature)
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        token = logp.argmax(-1)
    else:
        bits = mix(mix(key + mix(position.to(torch.int32)))[:, None] ^ _hashed_ids(logits.shape[-1], logits.device)) & 0x7FFFFFFF
        minus_u = bits.add(0.5).mul_(-2.0 ** -31).clamp_(min=2.0 ** -24 - 1)   # u is fine near 0, where winners come from; never 1
        token = (logp - minus_u.log1p_().neg_().log_()).argmax(-1)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


if triton is not None:
    @triton.jit
    def _mix(x):                                             # uint32: the shifts are logical and products wrap
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _draw_kernel(x_ptr, key_ptr, position_ptr, token_ptr, logprob_ptr, stride, V, scale, GREEDY: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)                  # draw() in one pass over the logits
        key = tl.load(key_ptr + row).to(tl.uint32, bitcast=True)
        key = _mix(key + _mix(tl.load(position_ptr + row).to(tl.uint32)))
        m, d, best, token, x_token = -1e30, 0.0, -float("inf"), 0, 0.0
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * stride + column, mask=column < V, other=-float("inf")).to(tl.float32) * scale
            m_new = tl.maximum(m, tl.max(x, 0))
            d = d * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), 0)
            m = m_new
            score = x
            if not GREEDY:
                bits = _mix(key ^ _mix(column.to(tl.uint32))) & 0x7FFFFFFF
                u = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994)
                e = tl.where(u < 1e-3, u + u * u * (0.5 + u / 3), -tl.log(1 - u))       # -log1p(-u) without a library call
                score = x - tl.log(e)
            top = tl.max(score, 0)
            if top > best:
                best = top
                token = tl.min(tl.where(score == top, column, V), 0)
                x_token = tl.sum(tl.where(column == token, x, 0.0), 0)
        tl.store(token_ptr + row, token)
        tl.store(logprob_ptr + row, (x_token - m) - tl.log(d))


def draw_triton(logits, key, position, temperature):
    B, V = logits.shape
    block, warps = launch_shape(V)
    token, logprob = torch.empty_like(position), torch.empty(B, device=logits.device)
    _draw_kernel[(B,)](logits, key, position, token, logprob, logits.stride(0), V, 1 / (temperature or 1.0), GREEDY=temperature == 0,
                       BLOCK=block, num_warps=warps)
    return token, logprob


# --- the model, one token at a time ----------------------------------------------------------------------------------------
def why_not_ours(model):
    """None if the decode step below computes what `model` computes, else the reason why not."""
    config = model.config
    if config.model_type not in ("qwen2", "qwen3", "llama"):
        return f"model type {config.model_type}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        return "sliding-window attention"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    rope = config.rope_parameters["rope_type"]
    return None if rope in ("default", "llama3", "linear", "yarn") else f"rope type {rope}"


class Decoder:
    """Prefill and decode step of a Llama-shaped model over the Hugging Face model's own parameter tensors.

    Two caches of keys and values, both in slots: `prompt_kv` has one for each prompt, `kv` one for each row, in which the
    prompt's last token sits in column 0 and the t-th new token in column t.
    """
    def __init__(self, model, rows, length, prompts, prompt_length):
        config, body, weight = model.config, model.model, model.lm_head.weight
        self.capacity, self.length, self.device = (rows, length, prompts, prompt_length), length, weight.device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        # Zeros, not empty: a masked column is multiplied by 0, and 0 * NaN is NaN.
        shape, options = (config.num_hidden_layers, 2), dict(dtype=weight.dtype, device=self.device)
        self.prompt_kv = torch.zeros(*shape, prompts, self.kv_heads, prompt_length, self.dim, **options)
        self.kv = torch.zeros(*shape, rows, self.kv_heads, length, self.dim, **options)
        self.prompt_length = torch.zeros(prompts, dtype=torch.int64, device=self.device)               # cached tokens of each
        self.range = torch.arange(max(rows * self.kv_heads, prompt_length + length), device=self.device)
        rotary = body.rotary_emb                             # inv_freq carries Llama 3's scaling
        angle = self.range[:prompt_length + length, None] * rotary.inv_freq.float()
        cos, sin = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling
        self.cos = torch.cat((cos, cos), -1).to(weight.dtype)                                          # (positions, D)
        self.sin = torch.cat((-sin, sin), -1).to(weight.dtype)               # the sign of rotate-half, put into the table
        self.sync = 16 if self.device.type == "cuda" else 1  # steps between two looks of the host
        # What a step reads and writes besides the caches. The host rewrites `state` before every run of steps.
        self.state = torch.zeros(6, rows, dtype=torch.int64, device=self.device)     # token, column, key, prompt, seat, live
        self.out_token = torch.zeros(self.sync, rows, dtype=torch.int64, device=self.device)
        self.out_logprob = torch.zeros(self.sync, rows, device=self.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.graphs, self.pool, self.stream, self.signature = {}, None, None, None

    def bind(self, model):
        """Look the parameters up again. Values changed in place are seen anyway; replaced tensors are seen from here on."""
        def norm(module): return None if module is None else (module.weight, module.variance_epsilon)
        def linear(module): return module.weight, module.bias
        def layer(block):
            attention, mlp = block.self_attn, block.mlp
            return SimpleNamespace(norm1=norm(block.input_layernorm), q=linear(attention.q_proj), k=linear(attention.k_proj),
                                   v=linear(attention.v_proj), o=linear(attention.o_proj), q_norm=norm(getattr(attention, "q_norm", None)),
                                   k_norm=norm(getattr(attention, "k_norm", None)), norm2=norm(block.post_attention_layernorm),
                                   gate=linear(mlp.gate_proj), up=linear(mlp.up_proj), down=linear(mlp.down_proj))
        self.embedding, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.norm, self.layers = norm(model.model.norm), [layer(block) for block in model.model.layers]
        signature = [p.data_ptr() for p in model.parameters()]
        if signature != self.signature:
            self.graphs, self.pool, self.signature = {}, None, signature            # a captured graph holds addresses

    def transformer(self, x, cos, sin, attend):
        """x (..., hidden) -> (..., hidden) before the last norm. cos, sin (..., 1, D); attend(i, q, k, v) mixes positions."""
        for i, w in enumerate(self.layers):
            h = rms_norm(x, w.norm1)
            q, k, v = (F.linear(h, *p).view(*h.shape[:-1], -1, self.dim) for p in (w.q, w.k, w.v))     # (..., heads, D)
            if w.q_norm:
                q, k = rms_norm(q, w.q_norm), rms_norm(k, w.k_norm)
            qk = torch.cat((q, k), -2)
            qk = torch.addcmul(qk * cos, qk.roll(self.dim // 2, -1), sin)
            x = x + F.linear(attend(i, qk[..., :self.heads, :], qk[..., self.heads:, :], v).flatten(-2), *w.o)
            h = rms_norm(x, w.norm2)
            x = x + F.linear(F.silu(F.linear(h, *w.gate)) * F.linear(h, *w.up), *w.down)
        return x

    def prefill(self, prompts, slots):
        """Write the keys and values of every prompt but its last token, which the first step feeds, into the prompts' slots.

        The prompts are laid end to end, so that no product works on padding; attention sees them one by one.
        """
        self.prompt_length[slots] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        parts = [(slot, prompt[:-1]) for slot, prompt in zip(slots, prompts) if len(prompt) > 1]
        if not parts:
            return
        lengths = [len(tokens) for _, tokens in parts]
        ids = torch.tensor([token for _, tokens in parts for token in tokens], device=self.device)
        position = torch.cat([self.range[:length] for length in lengths])

        def attend(i, q, k, v):                              # (tokens of all prompts, heads, D)
            mixed = []
            for (slot, _), q, k, v in zip(parts, *(t.transpose(0, 1).split(lengths, 1) for t in (q, k, v))):     # (heads, T, D)
                self.prompt_kv[i, :, slot, :, :k.shape[1]] = torch.stack((k, v))
                mixed.append(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0])
            return torch.cat(mixed, 1).transpose(0, 1)

        self.transformer(F.embedding(ids, self.embedding), self.cos[position][:, None], self.sin[position][:, None], attend)

    def move_prompt(self, source, target):
        self.prompt_kv[:, :, target] = self.prompt_kv[:, :, source]
        self.prompt_length[target] = self.prompt_length[source]

    def move_row(self, source, target):
        self.kv[:, :, target] = self.kv[:, :, source]

    def step(self, B, T, P, T_prompt, seats, temperature):
        """Feed each of the first B rows its token and draw the next. Of the caches only T columns of these rows and T_prompt
        columns (T' below) of the first P prompts are read. Rows of one prompt have different seats, 0 ... seats - 1.

        No host sync inside, so that CUDA can capture it."""
        token, column, key, prompt, seat, live = self.state[:, :B]
        start, kv_heads = self.prompt_length[prompt], self.kv_heads
        head, line = self.range[:kv_heads], self.range[:B * kv_heads].view(B, kv_heads)      # a line of the cache: a row's kv head
        cache = self.kv[:, :, :B, :, :T].flatten(2, 3)                                                 # (layers, 2, B kv_heads, T, D)
        prompt_cache = self.prompt_kv[:, :, :P, :, :T_prompt].flatten(2, 3)                            # (layers, 2, P kv_heads, T', D)
        cells, write = self.kv.flatten(1, 4), (line * self.length + column[:, None]).flatten()         # where new keys go,
        write = torch.cat((write, write + self.kv[0, 0].numel() // self.dim))                          # and values
        layers = list(zip(cells.unbind(), *(part.unbind() for tensor in (cache, prompt_cache) for part in tensor.unbind(1))))
        hidden = torch.cat((self.range[:T_prompt] >= start[:, None], self.range[:T] > column[:, None]), -1)          # (B, T' + T)
        bias = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -math.inf).repeat_interleave(kv_heads, 0)[:, None]

        # A prompt's keys meet the queries of all its rows in one product, which needs them in the order (prompt, kv head, seat):
        to_row = ((prompt[:, None] * kv_heads + head) * seats + seat[:, None]).flatten()
        to_prompt = torch.zeros(P * kv_heads * seats, dtype=torch.int64, device=self.device)
        to_prompt.index_add_(0, to_row, (line * live[:, None]).flatten())            # the inverse; empty slots add 0

        def by_prompt(x):                                    # (B kv_heads, g, ...) -> (P kv_heads, seats g, ...)
            return x.index_select(0, to_prompt).view(P * kv_heads, -1, x.shape[2])

        def by_row(x):                                       # and back
            return x.view(P * kv_heads * seats, -1, x.shape[2]).index_select(0, to_row)

        def product(q, k):                                   # scores stay in fp32, as in the trainer's attention: they can be large
            return torch.bmm(q, k.mT, out_dtype=torch.float32) if q.is_cuda else torch.bmm(q.float(), k.float().mT)

        def attend(i, q, k, v):
            cells, keys, values, prompt_keys, prompt_values = layers[i]
            cells.index_copy_(0, write, torch.stack((k, v)).flatten(0, 2))
            q = q.reshape(B * kv_heads, -1, self.dim)        # the g query heads of a kv head as g queries: nothing is repeated
            scores = torch.cat((by_row(product(by_prompt(q), prompt_keys)), product(q, keys)), -1)     # (B kv_heads, g, T' + T)
            weights = torch.add(bias, scores, alpha=self.dim ** -0.5).softmax(-1).to(values.dtype)
            prompt_part = by_row(torch.bmm(by_prompt(weights[..., :T_prompt]), prompt_values))
            return torch.baddbmm(prompt_part, weights[..., T_prompt:], values).view(B, -1, self.dim)

        position = start + column
        x = self.transformer(F.embedding(token, self.embedding), self.cos[position][:, None], self.sin[position][:, None], attend)
        logits = F.linear(rms_norm(x, self.norm), self.head)                                           # (B, V)
        new, logprob = draw(logits, key.to(torch.int32), position, temperature)
        self.out_token[:, :B].index_copy_(0, self.count, new[None])
        self.out_logprob[:, :B].index_copy_(0, self.count, logprob[None])
        self.count.add_(1)
        token.copy_(new)
        column.add_(1)

    def run(self, rows, temperature):
        """`sync` steps for the rows (None = an empty slot). Returns tokens and logprobs, lists (sync, rows)."""
        B, members, state = len(rows), Counter(), []         # members: rows of each prompt's slot
        for row in rows:
            if row is None:
                state.append((0,) * 6)
            else:
                slot = row.group.slot
                state.append((row.last, len(row.rollout.tokens), row.key, slot, members[slot], 1))
                members[slot] += 1
        state = torch.tensor(state).T.to(self.device)

        def begin():
            self.state[:, :B] = state
            self.count.zero_()

        cuda, coarse = self.device.type == "cuda", self.sync > 1               # where a shape costs a graph, shapes are coarse
        def size(x): return 2 ** (x - 1).bit_length() if coarse else x
        def columns(x, most): return min(most, round_up(x, 128 if coarse else 8))
        T = columns(max(len(row.rollout.tokens) for row in rows if row) + self.sync, self.length)
        T_prompt = columns(max(len(row.group.prompt) for row in rows if row), self.prompt_kv.shape[4])
        shape = B, T, min(self.capacity[2], size(max(members) + 1)), T_prompt, size(max(members.values())), temperature
        begin()
        if cuda and shape not in self.graphs:
            self.capture(shape)
            begin()                                          # the warm-up moved the rows on
        for _ in range(self.sync):
            self.graphs[shape].replay() if cuda else self.step(*shape)
        return self.out_token[:, :B].tolist(), self.out_logprob[:, :B].tolist()

    def capture(self, shape):
        """Record step(*shape) as one CUDA graph: hundreds of kernel launches become one."""
        if len(self.graphs) >= 256:                          # each holds some memory; all go at once, since they share a pool
            self.graphs, self.pool = {}, None
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):                               # warm-up: libraries allocate, Triton compiles
                self.step(*shape)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            self.step(*shape)
        self.pool = self.pool or graph.pool()
        self.graphs[shape] = graph


def rms_norm(x, norm):
    weight, eps = norm
    return F.rms_norm(x, weight.shape, weight, eps)


class SlowDecoder:
    """The same interface for any other architecture: every step runs the model's own forward over the whole sequences."""
    def __init__(self, model, *capacity):
        self.capacity = capacity

    def bind(self, model):
        self.model = model

    def prefill(self, prompts, slots): pass
    def move_prompt(self, source, target): pass
    def move_row(self, source, target): pass

    def run(self, rows, temperature):
        device = self.model.device
        sequences = [row.group.prompt + row.rollout.tokens if row else [0] for row in rows]
        ids = torch.zeros(len(rows), max(map(len, sequences)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):             # padded on the right
            ids[i, :len(sequence)], mask[i, :len(sequence)] = torch.tensor(sequence), 1
        position = mask.sum(1).to(device) - 1
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        key = torch.tensor([row.key if row else 0 for row in rows], dtype=torch.int32, device=device)
        token, logprob = draw(logits[torch.arange(len(rows), device=device), position], key, position, temperature)
        return [token.tolist()], [logprob.tolist()]


# --- the schedule ----------------------------------------------------------------------------------------------------------
PREFILL_TOKENS = 8192                      # a prefill takes at most so many tokens at once (or one longer prompt) ...
PREFILL_ROWS = 16                          # ... and goes on until so many rows are ready, or as many as there are free slots


@dataclass(slots=True)
class _Group:
    prompt: list
    slot: int
    rows: int                                                # how many have not ended


@dataclass(slots=True)
class _Row:
    group: _Group
    key: int
    rollout: Rollout
    closed: bool = False

    @property
    def last(self):
        return self.rollout.tokens[-1] if self.rollout.tokens else self.group.prompt[-1]


def round_up(x, step):
    return -(-x // step) * step


def batch_size(live):
    """The smallest batch size of the ladder that holds `live` rows: four sizes an octave, so CUDA captures few graphs."""
    return round_up(live, max(1, 2 ** ((live - 1).bit_length() - 3)))


def cache_bytes(model):
    """Bytes of keys and values that one token leaves in the cache."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim * next(model.parameters()).element_size()


def batch_limit(policy, prompt_length, max_new_tokens):
    """How many rows fit into the free memory, each with a prompt of its own. Ask once, at the start of a run, and keep it: the
    batch shape changes rounding."""
    model, length = policy.model, round_up(prompt_length, 128) + round_up(max_new_tokens, 32)
    logits = 8 * model.config.get_text_config().vocab_size * next(model.parameters()).element_size()
    row = cache_bytes(model) * length + logits
    if policy.device.type == "cuda":
        free = torch.cuda.mem_get_info(policy.device)[0]
        free += torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        if isinstance(policy.engine, Decoder):               # the kept cache will be used again, or freed for a larger one
            free += policy.engine.kv.nbytes + policy.engine.prompt_kv.nbytes
        limit = min(2048, int(0.8 * free / row))             # the rest: activations, graphs, prompts that are prefilled ahead
    else:
        limit = min(128, int(4e9 / row))                      # a fixed budget: the same run everywhere gets the same batches
    if limit < 1:
        raise InputError(f"one sequence of {length} tokens needs {row / 1e9:.1f} GB and does not fit; lower --max-new-tokens")
    return limit


def _engine(policy, *capacity):
    """The policy's decoder, made anew only if the kept one is too small. capacity: rows, new tokens, prompts, prompt tokens."""
    engine = policy.engine
    if engine is None or any(has < needed for has, needed in zip(engine.capacity, capacity)):
        if engine and engine.capacity[:2] == capacity[:2]:   # as in a run of grpo.py: grow, so that this happens a few times only
            capacity = tuple(map(max, engine.capacity, capacity))
        engine = policy.engine = None                        # free the old cache before the new one is allocated
        kind = SlowDecoder if why_not_ours(policy.model) else Decoder
        policy.engine = engine = kind(policy.model, *capacity)
    engine.bind(policy.model)
    return engine


@functools.lru_cache(maxsize=1 << 18)
def _may_close(tokenizer, token):
    return ">" in tokenizer.decode([token], clean_up_tokenization_spaces=False)


def closes(tokenizer, tokens):
    """Whether the last token completes </answer>, which is one token in some vocabularies and several in others."""
    return _may_close(tokenizer, tokens[-1]) and "</answer>" in tokenizer.decode(tokens[-12:], clean_up_tokenization_spaces=False)


def check_request(policy, prompts, n, max_new_tokens):
    if n < 1 or max_new_tokens < 1:
        raise InputError(f"n and --max-new-tokens must be at least 1, not {n} and {max_new_tokens}")
    if not all(prompts):
        raise InputError("an empty prompt has no last token to continue from")
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    longest = max(map(len, prompts))
    if longest > context - 1:
        raise InputError(f"a prompt of {longest} tokens leaves no room in the model's context of {context}; use shorter problems")
    if longest + max_new_tokens > context:
        raise InputError(f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens} exceed the model's context of {context}; "
                         f"lower --max-new-tokens to {context - longest}")


def compact(slots, size, move):
    """Move what lies in slots from `size` on into the holes below."""
    holes = (i for i in range(size) if slots[i] is None)
    for source in range(size, len(slots)):
        if slots[source]:
            target = next(holes)
            move(source, target)
            slots[target], slots[source] = slots[source], None


@torch.no_grad()
def generate(policy, prompts, n=1, max_new_tokens=512, temperature=1.0, seed=0, max_batch=None):
    """Sample n responses to each prompt (a list of token ids). Returns, in the order of the prompts, lists of n Rollouts.

    temperature 0 is greedy. The noise of a token is a function of (seed, prompt index, sample, position) alone: neither
    max_batch (rows at a time; None: batch_limit) nor the order in which rows finish changes it, though the shape of a batch
    changes rounding, which can turn a near-tie. Raises data.InputError if a prompt with its new tokens exceeds the model's
    context or the memory.
    """
    if not prompts:
        return []
    check_request(policy, prompts, n, max_new_tokens)
    longest = max(map(len, prompts))
    limit = max_batch or min(batch_limit(policy, longest, max_new_tokens), n * len(prompts))
    ahead = min(limit // 8, PREFILL_ROWS)                    # prompts that may be in the cache before a row is free for them
    rows, groups = [None] * limit, [None] * min(limit + ahead, len(prompts))                           # what the slots hold
    # A row that ends between two looks of the host runs on to the next one, inside its slot: 32 is a multiple of every sync.
    engine = _engine(policy, limit, round_up(max_new_tokens, 32), len(groups), round_up(longest, 128))
    tokenizer, eos = policy.tokenizer, policy.eos_ids
    keys = row_keys(seed, len(prompts), n).tolist()
    results = [[Rollout([], []) for _ in range(n)] for _ in prompts]
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))     # long ones first: alike in length, short tail
    ready = deque()                                          # rows whose prompt is in the cache and that wait for a slot

    while waiting or ready or any(rows):
        # Refill: rows that are ready take the free slots; when these are too few, waiting prompts are prefilled, several at once.
        free = [slot for slot, row in enumerate(rows) if row is None]
        while waiting and len(ready) < len(free):
            batch = []
            while waiting and None in groups and len(ready) < max(PREFILL_ROWS, len(free)):
                i, slot = waiting[0], groups.index(None)
                if batch and len(prompts[i]) + sum(len(group.prompt) for group in batch) > PREFILL_TOKENS:
                    break
                groups[slot] = _Group(prompts[i], slot, n)
                batch.append(groups[slot])
                ready.extend(_Row(groups[slot], keys[i][j], results[i][j]) for j in range(n))
                waiting.popleft()
            engine.prefill([group.prompt for group in batch], [group.slot for group in batch])
        for slot in free[:len(ready)]:
            rows[slot] = ready.popleft()

        # Compaction: what sits beyond the slots that are needed moves into the holes below.
        size = min(limit, batch_size(limit - rows.count(None)))
        compact(rows, size, engine.move_row)
        compact(groups, len(groups) - groups.count(None), engine.move_prompt)
        for slot, group in enumerate(groups):
            if group:
                group.slot = slot

        tokens, logprobs = engine.run(rows[:size], temperature)
        for new, values in zip(tokens, logprobs):
            for slot, (token, logprob) in enumerate(zip(new, values)):
                row = rows[slot]
                if row is None:
                    continue
                out = row.rollout
                if row.closed and token not in eos:          # the answer was closed before this token: drop it
                    out.stop = "closed"
                else:
                    out.tokens.append(token)
                    out.logprobs.append(logprob)
                    row.closed = token not in eos and closes(tokenizer, out.tokens)
                    if token in eos:
                        out.stop = "eos"
                    elif len(out.tokens) == max_new_tokens:
                        out.stop = "closed" if row.closed else "length"
                if out.stop:
                    rows[slot] = None
                    row.group.rows -= 1
                    if not row.group.rows:
                        groups[row.group.slot] = None
    return results


# ---------------------------------------------------------------------------------------------------------------------------
# 5. Accuracy
# ---------------------------------------------------------------------------------------------------------------------------
def greedy_accuracy(policy, problems, max_new_tokens=512, max_batch=None):
    """Greedy answers to `problems` (objects with .question and .answer), scored by data.reward.

    Returns n, correct, accuracy, format_rate (share with exactly one readable answer), cut_rate (share that reached
    max_new_tokens), mean_tokens, hits (0.0 or 1.0) and texts, both in the order of the problems.
    """
    problems = list(problems)
    if not problems:
        raise InputError("no problems to measure accuracy on")
    prompts = [encode_prompt(policy.tokenizer, problem.question) for problem in problems]
    rollouts = [r for r, in generate(policy, prompts, 1, max_new_tokens, temperature=0, max_batch=max_batch)]
    texts = [decode(policy.tokenizer, rollout.tokens) for rollout in rollouts]
    hits = [data.reward(text, problem.answer) for text, problem in zip(texts, problems)]
    n = len(problems)
    return {"n": n, "correct": int(sum(hits)), "accuracy": sum(hits) / n,
            "format_rate": sum(data.read_answer(text) is not None for text in texts) / n,
            "cut_rate": sum(rollout.stop == "length" for rollout in rollouts) / n,
            "mean_tokens": sum(len(rollout.tokens) for rollout in rollouts) / n, "hits": hits, "texts": texts}


# ---------------------------------------------------------------------------------------------------------------------------
# 6. Command
# ---------------------------------------------------------------------------------------------------------------------------
def machine_ceilings(device):
    """(bytes/s of a large copy, FLOP/s of a large bf16 product) of this GPU, measured now: the best of 10."""
    def best(work, function):
        seconds = []
        for _ in range(10):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
        return work / min(seconds)
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target, square = torch.empty_like(source), torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    return best(2 * source.nbytes, lambda: target.copy_(source)), best(2 * 8192 ** 3, lambda: square @ square)


def limit_seconds(policy, prompt_lengths, lengths, bandwidth, flops):
    """The least time in which this machine can decode groups of rollouts, all at once: one prompt length and one list of
    rollout lengths for each.

    Every step reads each live row's own keys and values, those of each live group's prompt, and the weights once; or, with
    many rows, it is held up by the weights' 2 FLOP a row:
        sum over steps of  KV bytes / bandwidth + max(weight bytes / bandwidth, 2 P rows / flops)
    """
    embedding, head = policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight
    parameters = sum(p.numel() for p in policy.model.parameters()) - (0 if embedding is head else embedding.numel())
    read = parameters * head.element_size() / bandwidth
    steps = torch.tensor([length for group in lengths for length in group])
    rows = steps[:, None].gt(torch.arange(steps.max())).sum(0)                                         # live rows at each step
    cached = (steps * (steps + 1) / 2).sum().item() + sum(prompt * max(group) for prompt, group in zip(prompt_lengths, lengths))
    return cached * cache_bytes(policy.model) / bandwidth + (2 * parameters * rows / flops).clamp(min=read).sum().item()


def colour(text):
    """Mark the injected behaviors for a terminal: reflections yellow, analyses cyan, one operation per "=" green."""
    waits, equals = data.REFLECTION.rpartition("}")[2], data.ANALYSIS.partition("{")[0]
    lines = []
    for line in text.split("\n"):
        code = "33" if line.endswith(waits) else "36" if equals in line else "32" if line.count(" = ") > 3 else ""
        lines.append(f"\033[{code}m{line}\033[0m" if code else line)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Sample rollouts from a policy and show them with their reward.")
    parser.add_argument("--ckpt", help="a .pt file, a Hugging Face folder or name (default: sft.pt, else the tiny base model)")
    parser.add_argument("--data", help="JSONL problems (default: fresh iGSM problems of 2 to 5 operations)")
    parser.add_argument("--problems", type=int, default=2, help="how many problems to answer")
    parser.add_argument("--n", type=int, default=4, help="rollouts per problem")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.problems < 1 or args.temperature < 0:
        raise InputError("--problems must be at least 1 and --temperature at least 0")
    policy = load_policy(default_checkpoint(args.ckpt))
    print(describe(policy), file=sys.stderr)
    source = data.read_problems(args.data) if args.data else data.generate(ops=(2, 5), seed=args.seed, split="test")
    problems = [problem for _, problem in zip(range(args.problems), source)]
    prompts = [encode_prompt(policy.tokenizer, problem.question) for problem in problems]
    for _ in range(2 if policy.device.type == "cuda" else 1):  # the first time, a GPU captures its graphs
        start = time.perf_counter()
        groups = generate(policy, prompts, args.n, args.max_new_tokens, args.temperature, args.seed)
        seconds = time.perf_counter() - start
    show = colour if sys.stdout.isatty() else str
    for problem, group in zip(problems, groups):
        print(f"{problem.question}\n[answer {problem.answer}]\n")
        for rollout in group:
            text = decode(policy.tokenizer, rollout.tokens)
            print(f"--- reward {data.reward(text, problem.answer):.0f}, {len(rollout.tokens)} tokens, stop: {rollout.stop}")
            print(f"<think>{show(text)}\n")
    rollouts = [rollout for group in groups for rollout in group]
    lengths = [[len(rollout.tokens) for rollout in group] for group in groups]
    tokens = sum(map(sum, lengths))
    cut, share = sum(rollout.stop == "length" for rollout in rollouts) / len(rollouts), ""
    if policy.device.type == "cuda":
        least = limit_seconds(policy, [len(p) for p in prompts], lengths, *machine_ceilings(policy.device))
        share = f" ({least / seconds:.0%} of what this GPU's bandwidth allows for so few rows)"
    print(f"{len(rollouts)} rollouts, {tokens} tokens in {seconds:.1f} s = {tokens / seconds:.0f} tokens/s{share}; "
          f"{cut:.0%} cut at --max-new-tokens")


if __name__ == "__main__":
    data.run_cli(main)
