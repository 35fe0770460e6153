"""Chapter 3. The policy: load it, prompt it, sample from it, and ask for the log-prob of what it said.

    python sample.py                                   # sft.pt, or the tiny base model where there is none
    python sample.py --ckpt grpo.pt --n 8 --temperature 0.7

Reinforcement learning on a language model needs two things from it: rollouts (section 3) and the
log-probability of given tokens with its gradient (section 5). Both run over one set of weights, the
parameters of a Hugging Face model, so the sampler can never be stale.

The sections: 1 policy and checkpoint, 2 prompt, 3 sampler, 4 accuracy, 5 log-prob and its Triton kernel,
6 command. Reading takes about an hour; at first, skip reading and writing checkpoints (section 1), what only
CUDA graphs need (`capture`, the `if` in `run`, the end of `size`, the addresses in `use`), the Triton
kernels, `logits_logprobs`, and `limit_seconds`.

Simplifications, against what an inference server does (the words are those of section 3):
1. One GPU, one process. The cache is one rectangle a row and one a prompt, each as long as the longest.
2. The rows of a group share their prompt's cache; prompts that begin alike do not share their beginning.
3. No top-p, top-k or penalties: the sampled distribution would not be the one that is trained.
4. Our decode step knows Qwen2/2.5, Qwen3 and Llama 3. Any other model runs through its own slow forward.
"""
import functools
import itertools
import json
import math
import os
import sys
import time
import zipfile
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast)

import data
from data import InputError

# On CUDA cuDNN's attention plans anew for every shape, up to a second each time (modelscope/FunASR#3704), and
# no two batches of rollouts have the same.
torch.backends.cuda.enable_cudnn_sdp(False)


# --------------------------------------------------------------------------- 1. The policy and its checkpoint
FORMAT, VERSION = "bridge-policy", 1
TINY_BASE = Path(__file__).parent / "results" / "tiny" / "igsm.pt"


@dataclass
class Policy:
    """A causal language model with its tokenizer. `info`: the arguments that made it, and its source."""
    model: torch.nn.Module
    tokenizer: object
    device: torch.device
    info: dict = field(default_factory=dict)
    engine: object = field(default=None, repr=False)         # the sampler's cache, kept between calls

    @property
    def eos_ids(self):
        """Every token id that ends a response: the tokenizer's and the generation config's."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        ids = ids if isinstance(ids, (list, tuple)) else [ids]
        return {i for i in [self.tokenizer.eos_token_id, *ids] if i is not None}


def default_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_policy(path_or_name, device=None, dtype=None):
    """A Policy from a .pt checkpoint of this project, a Hugging Face folder, or a name on its hub.

    dtype defaults to bf16 on CUDA and fp32 elsewhere. Raises data.InputError, in one sentence, for a file
    that is missing, truncated or not a checkpoint, and for a name that cannot be loaded.
    """
    device = torch.device(device) if device else default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    path = str(path_or_name)
    if path.endswith(".pt"):
        model, tokenizer, info = _read_checkpoint(path, dtype)
    else:
        try:
            # AutoTokenizer would rebuild some tokenizers from the model type, and lose a custom vocabulary
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
            model, found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        except Exception as error:  # whatever a damaged folder makes Hugging Face raise
            raise InputError(f"{path}: not a .pt file, and Hugging Face cannot load it as a folder or a name "
                             f"({one_line(error)})") from None
        info = {"source": path}
        if wrong := [*found["missing_keys"], *found["unexpected_keys"]]:
            raise InputError(f"{path}: its weights do not fit its config (first: {min(wrong)})")
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and head.weight is not embedding.weight:  # whatever the config says of them
            model.config.tie_word_embeddings = False
    check_tensors(path, model.state_dict().values())
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no end token, so a response could never end; "
                         "use a tokenizer with one")
    if max(tokenizer.get_vocab().values()) >= model.get_input_embeddings().num_embeddings:
        raise InputError(f"{path}: its tokenizer knows more tokens than its model; use the two that belong "
                         "together")
    return Policy(model.to(device).eval(), tokenizer, device, info)


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_tensors(path, tensors, like=None):
    """Refuse values that are not finite, or shapes other than those of `like`."""
    tensors = list(tensors)
    if like is not None and [t.shape for t in tensors] != [t.shape for t in like]:
        raise InputError(f"{path}: its tensors have other shapes than the model's")
    if not all(t.isfinite().all() for t in tensors):
        raise InputError(f"{path}: some of its numbers are not finite; take or make another one")


def read_pt(path, advice):
    """The dict in a .pt file, once the archive's own checksums have shown that no bit of it has changed
    (torch.load does not look at them). With weights_only, loading can never run code. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:
                content = torch.load(path, map_location="cpu", weights_only=True)
                if isinstance(content, dict):
                    return content
    except Exception:  # whatever damaged bytes make zipfile or PyTorch raise
        pass
    raise InputError(f"{path}: damaged or cut short, or not a PyTorch file; {advice}")


def save_policy(path, policy, info=None, dtype=None):
    """Write one .pt file that torch.load(weights_only=True) opens. It appears whole or not at all.

    dtype (e.g. torch.bfloat16) rounds the stored weights; None stores them as they are.
    """
    weights, stored = {}, set()
    for name, tensor in policy.model.state_dict().items():
        if tensor.data_ptr() in stored:                      # a tied head is stored once
            continue
        stored.add(tensor.data_ptr())
        kept = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        weights[name] = tensor.detach().to("cpu", kept).contiguous()
    check_tensors(path, weights.values())
    tokenizer = policy.tokenizer
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights,
        "config": json.loads(policy.model.config.to_json_string(use_diff=False)),
        "eos_ids": sorted(policy.eos_ids),
        "tokenizer": {"json": tokenizer.backend_tokenizer.to_str(), "special": special,
                      "chat_template": tokenizer.chat_template},
        "info": json.loads(json.dumps(info if info is not None else policy.info, default=str)),
    }
    with data.replacing(path, "wb") as file:
        torch.save(content, file)


def _read_checkpoint(path, dtype):
    """model, tokenizer, info from one of our .pt files."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; make it first (sft.py writes sft.pt, grpo.py grpo.pt) "
                         "or name another")
    content = read_pt(path, "write it again")
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: a PyTorch file, but not a policy of this project; "
                         "name a file that sft.py or grpo.py wrote")
    if content.get("version") != VERSION:
        raise InputError(f"{path}: checkpoint format {content.get('version')}, this code reads {VERSION}; "
                         "write it again")
    try:
        if not all(tensor.is_floating_point() for tensor in content["weights"].values()):
            raise ValueError("a weight is no floating-point number")
        config = AutoConfig.for_model(**content["config"])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        result = model.load_state_dict(content["weights"], strict=False)
        model.tie_weights()
        parts = content["tokenizer"]
        raw = Tokenizer.from_str(parts["json"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **parts["special"])
        tokenizer.chat_template = parts["chat_template"]
        model.generation_config.eos_token_id, info = [*map(int, content["eos_ids"])], dict(content["info"])
    except Exception as error:  # whatever a damaged dict makes Hugging Face raise
        raise InputError(f"{path}: its contents do not make a model ({one_line(error)}); "
                         "write it again") from None
    state = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name in content["weights"]}
    # a tied head is not missing
    missing = [name for name in result.missing_keys if state[name].data_ptr() not in loaded]
    if missing or result.unexpected_keys:
        first = (missing + result.unexpected_keys)[0]
        raise InputError(f"{path}: weights do not fit the config (first: {first}); write it again")
    return model, tokenizer, info


def export_policy(policy, folder):
    """Write a Hugging Face folder that AutoTokenizer and AutoModelForCausalLM of transformers 4.57 and 5, so
    TRL, verl and vLLM too, load with the same token ids and logits.

    Raises data.InputError where the folder, read back, gives others."""
    model, tokenizer = policy.model, policy.tokenizer
    tokenizer.save_pretrained(folder)
    with data.replacing(os.path.join(folder, "chat_template.jinja")) as file:
        file.write(frozen_template(tokenizer))
    _edit_json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
               extra_special_tokens=None,                              # 4.57 cannot read a list of them
               model_input_names=["input_ids", "attention_mask"])      # Llama refuses token_type_ids
    model.config.save_pretrained(folder)                               # AutoTokenizer looks at the model type
    if model.config.model_type == "qwen2" and not _same_ids(policy, folder):
        model = as_llama(model)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk
        raise InputError(f"{folder}: cannot be written ({one_line(error)})") from None
    # transformers 4.57 knows rope_theta and rope_scaling, not rope_parameters, and would take theta 10,000
    rope = dict(getattr(model.config, "rope_parameters", None) or {})
    theta = rope.pop("rope_theta", None)
    _edit_json(folder, "config.json", rope_theta=theta,
               rope_scaling=rope if rope.get("rope_type", "default") != "default" else None)
    # no sampling defaults (top_k, temperature ...), which engines would apply unasked
    GenerationConfig(eos_token_id=sorted(policy.eos_ids), pad_token_id=tokenizer.pad_token_id,
                     bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)
    if not _same_ids(policy, folder) or not _same_logits(policy, folder):
        raise InputError(f"{folder}: as Hugging Face reads it back, it gives other tokens or logits than the "
                         "policy: do not use it; the .pt file is not touched by this")


def frozen_template(tokenizer):
    """A chat template that renders a question as `prompt_text` does, and an answer as its text (without the
    opening <think>, with which the prompt ends) and the end token. The system prompt is written into it."""
    mark = "<question>"
    before, after = prompt_text(tokenizer, mark).split(mark)
    before, after, end = (json.dumps(s, ensure_ascii=False) for s in (before, after, tokenizer.eos_token))
    return ("{% for m in messages %}{% if m.role == 'user' %}{{ " + f"{before} + m.content + {after}" + " }}"
            "{% elif m.role == 'assistant' %}{{ " + f"m.content + {end}" + " }}{% endif %}{% endfor %}")


def as_llama(model):
    """A Qwen2 model as the Llama that computes the same: for a folder of model type "qwen2" AutoTokenizer
    builds Qwen's tokenizer, whatever the folder says. Qwen2 is a Llama with biases in queries, keys and
    values; Llama's option for them adds one to the attention's output, too, which stays 0."""
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures"}
    fields = {name: value for name, value in model.config.to_dict().items() if name in known}
    llama = LlamaForCausalLM(LlamaConfig(**fields | {"attention_bias": True})).to(model.dtype)
    zeros = {name: torch.zeros_like(p) for name, p in llama.named_parameters() if "o_proj.bias" in name}
    llama.load_state_dict(model.state_dict() | zeros)
    return llama


def _edit_json(folder, name, **changes):
    """Change fields of a JSON file; None removes one."""
    path = os.path.join(folder, name)
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    kept = {key: value for key, value in content.items() if key not in changes}
    with data.replacing(path) as file:
        json.dump(kept | {key: value for key, value in changes.items() if value is not None}, file, indent=2)


def _same_ids(policy, folder):
    """Whether AutoTokenizer encodes an example through the template as the policy does."""
    problem, other = next(data.generate(ops=(3, 5))), AutoTokenizer.from_pretrained(folder)
    response = problem.response.removeprefix("<think>")
    question = {"role": "user", "content": problem.question}
    prompt = other.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    turns = other.apply_chat_template([question, {"role": "assistant", "content": response}], tokenize=False)
    theirs = [other(text, add_special_tokens=False).input_ids for text in (prompt, turns[len(prompt):])]
    return other.eos_token_id == policy.tokenizer.eos_token_id and theirs == [
        encode_prompt(policy.tokenizer, problem.question), encode_response(policy.tokenizer, response)]


@torch.no_grad()
def _same_logits(policy, folder):
    """Whether the model in the folder gives an example's tokens the logits that the policy gives them."""
    ours = policy.model
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=ours.dtype).to(policy.device).eval()
    tokens = encode_prompt(policy.tokenizer, next(data.generate(ops=(3, 5))).question)
    a, b = (model(torch.tensor([tokens], device=policy.device)).logits.float() for model in (ours, theirs))
    rounding = 1e-4 if ours.dtype == torch.float32 else 2e-2           # of a product with a bias or without
    return bool((a - b).abs().max() <= rounding * a.abs().max())


def default_checkpoint(name=None, task="igsm"):
    """The checkpoint to use: `name` if given, else sft.pt, else a task's tiny base (stderr says so)."""
    if name is not None:
        if str(name).endswith(".pt") and not os.path.isfile(name):
            found = "a folder, not a file" if os.path.isdir(name) else "no such file"
            raise InputError(f"{name}: {found} (--ckpt); run sft.py first or name another checkpoint")
        return str(name)
    if os.path.isfile("sft.pt"):
        return "sft.pt"
    base = TINY_BASE.with_stem(task)
    print(f"no sft.pt here: using the tiny base model {base} (python sft.py fine-tunes it)", file=sys.stderr)
    return str(base)


def describe(policy):
    """One line: size, device, dtype, and which code computes log-probs and runs the decode step."""
    first = next(policy.model.parameters())
    millions = sum(p.numel() for p in policy.model.parameters()) / 1e6
    reason = why_not_ours(policy.model)
    step = f"Hugging Face's forward, slow ({reason})" if reason else "our decode step"
    dtype = str(first.dtype).removeprefix("torch.")
    return (f"policy: {millions:.1f}M parameters, {policy.device.type}, {dtype}; "
            f"log-prob kernel: {_pick_backend('auto', first)}; sampler: {step}")


# ------------------------------------ 2. The prompt: the only place where text becomes tokens and tokens text
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SYSTEM_PROMPT = ("Solve the user's problem. First reason step by step inside <think> and </think>, "
                 "then give the result inside <answer> and </answer> as \\boxed{integer}.")


def prompt_text(tokenizer, question):
    """The prompt as text. It always ends with the opening <think>, once, and holds at most one BOS."""
    if not tokenizer.chat_template:
        return f"{tokenizer.bos_token or ''}{SYSTEM_PROMPT}\n\n{question}\n<think>"
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    # the template writes its own BOS where it wants one; those of "thinking" models write <think> themselves
    try:
        # Llama 3's templates would write today's date into the prompt, and each day train another one
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                             date_string="26 Jul 2024")
    except Exception as error:  # a template is a program, and some refuse a system message
        raise InputError(f"the tokenizer's chat template fails ({one_line(error)})") from None
    return (text.rstrip().removesuffix("<think>") if text.rstrip().endswith("<think>") else text) + "<think>"


def encode_prompt(tokenizer, question):
    """Token ids of the prompt."""
    return tokenizer(prompt_text(tokenizer, question), add_special_tokens=False).input_ids


def encode_response(tokenizer, response):
    """Token ids of the answer to train on: the response without its opening <think>, then one EOS."""
    text = response.removeprefix("<think>")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids + [tokenizer.eos_token_id]


@functools.lru_cache(maxsize=8)
def _hidden_ids(tokenizer):
    """Ids that decode() leaves out: special tokens, but never the tags, whatever the tokenizer calls them."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - set(tokenizer.convert_tokens_to_ids(list(TAGS)))


def decode(tokenizer, tokens):
    """The text of a response (what follows the prompt), without end tokens and other special tokens."""
    hidden = _hidden_ids(tokenizer)
    return tokenizer.decode([t for t in tokens if t not in hidden], clean_up_tokenization_spaces=False)


def padded(rows, fill):
    """Lists of numbers -> a tensor (rows, longest), filled up on the right."""
    out = torch.full((len(rows), max(map(len, rows))), fill)
    for row, numbers in zip(out, rows):
        row[:len(numbers)] = torch.tensor(numbers)
    return out


# --------------------------------------------------------------------------------------------- 3. The sampler
# To draw the next token, attention needs the keys and values of all tokens before it. They never change, so
# they are computed once and kept: the *KV cache*. *Prefill* runs a whole prompt through the model at once and
# fills the cache. A *decode step* feeds each response its last token alone, adds that token's keys and values
# to the cache, and draws the next one. Its time goes into reading weights and cache, less into arithmetic: so
# many responses share every step. With *grouped-query heads*, each key-value head serves g query heads, and
# the cache is g times smaller.
#
# A *row* is one response on its way, a *group* the n rows of one prompt. The prompt's keys and values (all
# but its last token's) are cached once and read by the whole group; what follows is the row's own. A *slot*
# is the place of one prompt, or of one row, in its cache. A row leaves when it has ended.
@dataclass(slots=True)
class Rollout:
    """One sampled response: token ids (end token included), their log-probs in nats, and why it stopped.

    stop: "eos" the end token came; "closed" </answer> was closed and no end token followed; "length"
    max_new_tokens was reached."""
    tokens: list
    logprobs: list
    stop: str = ""


# --- drawing a token ----------------------------------------------------------------------------------------
# Lay the tokens side by side on a line, each as long as its probability, and pick a point of the line at
# random: the token that lies there is a draw. The point does not come from a random stream, which another
# order of rows would shift, but from a hash of (seed, prompt, sample, position).
#
# Lengths are whole numbers of 2^-40. Such sums are exact in any order, so a token of probability 0 has no
# length, and a GPU draws what a CPU draws. On a GPU the passes below move about 70 bytes for each of the
# B x V logits, where a step reads 2 bytes for each weight: 64 rows of Qwen2.5-1.5B (151,936 tokens) move 0.7
# GB beside 3.1 GB of weights. One fused kernel would read the logits once (2 bytes) and save that.
LINE = 2 ** 40


def mix(x):
    """Scatter integers of 32 bits, held in int64: a bijection (C. Wellons' "lowbias32")."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def hash_of(key, number):
    """A new key from a key and a number. For one key, different numbers can never give the same."""
    return mix(key ^ (number * 0x9E3779B9 & 0xFFFFFFFF))


def row_keys(seed, prompts, n):
    """(prompts, n) hash keys, int64 below 2^32: one for each row."""
    low, high = torch.tensor([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
    key = hash_of(hash_of(low, high), torch.arange(prompts))           # (prompts,)
    return hash_of(key[:, None], torch.arange(n))


def draw(logits, key, position, temperature):
    """One token a row. logits (B, V), key and position (B,) int64 -> token (B,) int64, logprob (B,) fp32.

    The log-prob is that of the sampling temperature; temperature 0 takes the largest logit and its log-prob
    at temperature 1."""
    p = torch.softmax(logits.float() / (temperature or 1.0), -1)       # (B, V)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        ends = (p * LINE).long().cumsum(-1)                  # (B, V): where each token ends on the line
        half = torch.arange(2, device=key.device)
        high, low = hash_of(key, 2 * position + half[:, None]) >> 10   # (B,) each, 22 bits
        whole = ends[:, -1]                                  # below 2^41: no product here passes 2^63
        point = (high * whole + (low * whole >> 22)) >> 22   # the share high / 2^22 + low / 2^44 of the line
        token = torch.searchsorted(ends, point[:, None], right=True)[:, 0]  # the first that ends beyond it
        token = token.clamp(max=logits.shape[-1] - 1)        # (only where the logits are NaN)
    return token, p.gather(-1, token[:, None])[:, 0].log()


# --- the model, one token at a time -------------------------------------------------------------------------
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


def rms_norm(x, norm):
    """What the Hugging Face layer `norm` computes, in one kernel in place of six."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotate(x, cos, sin):
    """Rotary position embedding. x (N, heads, D); the table `sin` holds the sign that rotate-half needs."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)   # x cos + rolled x sin


def product(q, keys):
    """(n, rows, D) x (n, T, D) -> (n, rows, T). Scores can be large: in fp32, as the trainer's are."""
    if q.is_cuda:
        return torch.bmm(q, keys.mT, out_dtype=torch.float32)
    return torch.bmm(q.float(), keys.float().mT)


def attention(q, own, shared, bias, prompt, seat, seats):
    """One query a row, over its prompt's cache and its own. q (B, heads, D) -> (B, heads, D).

    own: keys and values, (B kv_heads, T, D) each; shared: (P kv_heads, T', D); bias (B, 1, 1, T' + T): 0
    where a row may look, else -inf. g query heads read one key-value head. So that a prompt's cache is read
    once for all its rows, their queries are laid beside it: row b takes the seat `seat[b]`, one of `seats`,
    at the prompt `prompt[b]`. Rows of the prompts A, B, A sit at A0, B0, A1."""
    (keys, values), (prompt_keys, prompt_values) = own, shared
    B, T_prompt, D = len(q), *prompt_keys.shape[1:]
    kv_heads = len(keys) // B
    P = len(prompt_keys) // kv_heads

    def beside_prompt(x):                                    # (B, kv_heads, g, .) -> (P kv_heads, seats g, .)
        out = x.new_empty(P, kv_heads, seats, *x.shape[2:])  # what an empty seat holds nobody reads
        out.transpose(1, 2)[prompt, seat] = x
        return out.view(P * kv_heads, -1, x.shape[-1])

    def by_row(x):                                           # and back
        return x.view(P, kv_heads, seats, -1, x.shape[-1]).transpose(1, 2)[prompt, seat]

    q = q.view(B, kv_heads, -1, D)                           # (B, kv_heads, g, D): no key is repeated
    prompt_scores = by_row(product(beside_prompt(q), prompt_keys))               # (B, kv_heads, g, T')
    own_scores = product(q.flatten(0, 1), keys).view(B, kv_heads, -1, keys.shape[1])     # (B, kv_heads, g, T)
    scores = torch.cat((prompt_scores, own_scores), -1)
    weights = torch.add(bias, scores, alpha=D ** -0.5).softmax(-1).to(q.dtype)
    out = by_row(torch.bmm(beside_prompt(weights[..., :T_prompt]), prompt_values))
    # out + weights @ values
    out = torch.baddbmm(out.flatten(0, 1), weights[..., T_prompt:].flatten(0, 1), values)
    return out.view(B, -1, D)


class Size(NamedTuple):
    """What a step sees of the two caches. For a CUDA graph this is fixed, so each size has its own."""
    B: int             # slots of rows
    T: int             # columns of a row
    P: int             # slots of prompts
    T_prompt: int      # columns of a prompt (T' in the shapes)
    seats: int         # rows that may sit beside one prompt


class Decoder:
    """Prefill and decode step of a Llama-shaped model, through the Hugging Face model's own layers.

    Two caches of keys and values, both in slots: `prompt_kv` (layers, 2, prompts, kv_heads, T', D) and
    `kv` (layers, 2, rows, kv_heads, T, D). A row's column 0 is its prompt's last token, column t its t-th new
    one. The rows in use fill the slots from 0 on without a gap, and so do the prompts."""
    def __init__(self, model, rows, length, prompts, prompt_length):
        config, rotary, weight = model.config, model.model.rotary_emb, model.lm_head.weight
        self.capacity, self.device = (rows, length, prompts, prompt_length), weight.device
        heads = config.num_key_value_heads
        self.dim = head_dim(config)
        self.qk_norm = config.model_type == "qwen3"
        # Zeros, not empty: a masked column is multiplied by 0, and 0 * NaN is NaN.
        shape, options = (config.num_hidden_layers, 2), dict(dtype=weight.dtype, device=self.device)
        self.kv = torch.zeros(*shape, rows, heads, length, self.dim, **options)
        self.prompt_kv = torch.zeros(*shape, prompts, heads, prompt_length, self.dim, **options)
        self.prompt_length = torch.zeros(prompts, dtype=torch.int64, device=self.device)  # cached tokens
        self.range = torch.arange(max(rows, prompt_length + length), device=self.device)
        # Llama 3's scaling is in inv_freq
        angle = self.range[:prompt_length + length, None, None] * rotary.inv_freq.float()
        cos, sin = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling
        self.cos = torch.cat((cos, cos), -1).to(weight.dtype)          # (positions, 1, D)
        self.sin = torch.cat((-sin, sin), -1).to(weight.dtype)
        # What a step reads and writes besides the caches, at addresses that a CUDA graph can know.
        # Fetching tokens makes the CPU, the host, wait for the GPU: it looks every 16 steps only.
        self.sync = 16 if self.device.type == "cuda" else 1
        # token, column, key, prompt and seat of each row
        self.state = torch.zeros(5, rows, dtype=torch.int64, device=self.device)
        self.out_token = torch.zeros(self.sync, rows, dtype=torch.int64, device=self.device)
        self.out_logprob = torch.zeros(self.sync, rows, device=self.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=self.device)           # steps since that look
        self.graphs, self.pool, self.stream, self.addresses = {}, None, None, None

    def use(self, model):
        """Weights changed in place are seen anyway; where a tensor was replaced, graphs are stale."""
        addresses = [p.data_ptr() for p in model.parameters()]
        if addresses != self.addresses:
            self.graphs, self.pool = {}, None
        self.model, self.addresses = model, addresses

    def transformer(self, token, position, attend):
        """token, position (N,) -> (N, H), what the head reads. attend(i, q, k, v): layer i's attention."""
        cos, sin = self.cos[position], self.sin[position]              # (N, 1, D)
        x = self.model.model.embed_tokens(token)                       # (N, H)
        for i, layer in enumerate(self.model.model.layers):
            attn, h = layer.self_attn, rms_norm(x, layer.input_layernorm)
            q = attn.q_proj(h).view(len(x), -1, self.dim)              # (N, heads, D)
            k = attn.k_proj(h).view(len(x), -1, self.dim)              # (N, kv_heads, D)
            v = attn.v_proj(h).view(len(x), -1, self.dim)
            if self.qk_norm:
                q, k = rms_norm(q, attn.q_norm), rms_norm(k, attn.k_norm)
            mixed = attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v)           # (N, heads, D)
            x = x + attn.o_proj(mixed.flatten(1))
            x = x + layer.mlp(rms_norm(x, layer.post_attention_layernorm))
        return rms_norm(x, self.model.model.norm)

    def prefill(self, prompts, slots):
        """Fill the prompts' slots: keys and values of all tokens but the last, which the first step feeds.

        The prompts are laid end to end, so that no product works on padding; attention sees each alone."""
        self.prompt_length[slots] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        parts = [(slot, prompt[:-1]) for slot, prompt in zip(slots, prompts) if len(prompt) > 1]
        if not parts:
            return
        lengths = [len(tokens) for _, tokens in parts]
        token = torch.tensor([t for _, tokens in parts for t in tokens], device=self.device)
        position = torch.cat([self.range[:length] for length in lengths])

        def attend(i, *qkv):                                 # (tokens of all prompts, heads or kv_heads, D)
            mixed, qkv = [], [x.transpose(0, 1).split(lengths, 1) for x in qkv]
            for (slot, tokens), q, k, v in zip(parts, *qkv):           # (heads, T, D)
                self.prompt_kv[i, :, slot, :, :len(tokens)] = torch.stack((k, v))
                one = q[None], k[None], v[None]              # a batch of one sequence
                mixed.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0])
            return torch.cat(mixed, 1).transpose(0, 1)

        self.transformer(token, position, attend)

    def move_prompt(self, source, target):
        self.prompt_kv[:, :, target] = self.prompt_kv[:, :, source]
        self.prompt_length[target] = self.prompt_length[source]

    def move_row(self, source, target):
        self.kv[:, :, target] = self.kv[:, :, source]

    def step(self, size, temperature):
        """Feed each row its token and draw the next. No host sync inside, so that CUDA can capture it."""
        B, T, P, T_prompt, seats = size
        # views: `own` shows what `attend` writes into self.kv, and the next step finds token and column here
        token, column, key, prompt, seat = self.state[:, :B]           # (B,) each
        row, start = self.range[:B], self.prompt_length[prompt]
        masked = torch.cat((self.range[:T_prompt] >= start[:, None], self.range[:T] > column[:, None]), -1)
        bias = torch.zeros(masked.shape, device=self.device).masked_fill(masked, -math.inf)[:, None, None]

        own = self.kv[:, :, :B, :, :T].flatten(2, 3)                   # (layers, 2, B kv_heads, T, D)
        shared = self.prompt_kv[:, :, :P, :, :T_prompt].flatten(2, 3)  # (layers, 2, P kv_heads, T', D)

        def attend(i, q, k, v):
            keys, values = self.kv[i]
            keys[row, :, column] = k                                   # (B, kv_heads, D)
            values[row, :, column] = v
            return attention(q, own[i], shared[i], bias, prompt, seat, seats)

        position = start + column
        logits = self.model.lm_head(self.transformer(token, position, attend))       # (B, V)
        new, logprob = draw(logits, key, position, temperature)
        self.out_token[self.count, :B] = new
        self.out_logprob[self.count, :B] = logprob
        self.count += 1
        token.copy_(new)
        column += 1

    def size(self, rows, most_seats):
        """The size of a step for these rows. Where a size costs a graph, sizes are coarse."""
        most_rows, length, prompts, prompt_length = self.capacity
        T = max(len(row.rollout.tokens) for row in rows) + self.sync
        T_prompt = max(len(row.group.prompt) for row in rows)
        P = max(row.group.slot for row in rows) + 1
        if self.sync == 1:
            T, T_prompt = round_up(T, 8), round_up(T_prompt, 8)
            return Size(len(rows), min(length, T), P, min(prompt_length, T_prompt), most_seats)
        T, T_prompt = round_up(T, 128), round_up(T_prompt, 128)
        return Size(min(most_rows, batch_size(len(rows))), min(length, T), min(prompts, power_of_2(P)),
                    min(prompt_length, T_prompt), power_of_2(most_seats) + 1)  # one seat for empty slots

    def run(self, rows, temperature):
        """`sync` steps for these rows. Returns tokens and logprobs, lists (sync, rows)."""
        taken, state = Counter(), []                         # taken: seats beside each prompt
        for row in rows:
            slot = row.group.slot
            state.append((row.last, len(row.rollout.tokens), row.key, slot, taken[slot]))
            taken[slot] += 1
        size = self.size(rows, max(taken.values()))
        state += [(0, 0, 0, 0, size.seats - 1)] * (size.B - len(rows))           # what they draw nobody reads
        state = torch.tensor(state).T.to(self.device)

        def begin():
            self.state[:, :size.B] = state
            self.count.zero_()

        begin()
        step = functools.partial(self.step, size, temperature)
        if self.device.type == "cuda":
            if (size, temperature) not in self.graphs:
                self.graphs[size, temperature] = self.capture(step)
                begin()                                      # the capture's warm-up moved the rows on
            step = self.graphs[size, temperature].replay
        for _ in range(self.sync):
            step()
        return self.out_token[:, :len(rows)].tolist(), self.out_logprob[:, :len(rows)].tolist()

    def capture(self, step):
        """Record step() as a CUDA graph: hundreds of kernel launches become one."""
        if len(self.graphs) >= 256:  # each holds some memory; all go, since they share a pool
            self.graphs, self.pool = {}, None
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):                               # warm-up: libraries allocate
                step()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            step()
        self.pool = self.pool or graph.pool()
        return graph


class SlowDecoder:
    """The same for any other architecture: every step runs the model's own forward over whole sequences."""
    def __init__(self, model, *capacity):
        self.capacity = capacity

    def use(self, model):
        self.model = model

    def prefill(self, prompts, slots):
        pass

    def move_prompt(self, source, target):
        pass

    move_row = move_prompt

    def run(self, rows, temperature):
        device = self.model.device
        sequences = [row.group.prompt + row.rollout.tokens for row in rows]
        position = torch.tensor([len(sequence) - 1 for sequence in sequences], device=device)        # (B,)
        ids = padded(sequences, 0).to(device)                # (B, T)
        mask = torch.arange(ids.shape[1], device=device) <= position[:, None]
        logits = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        logits = logits[torch.arange(len(rows), device=device), position]            # (B, V)
        key = torch.tensor([row.key for row in rows], device=device)
        token, logprob = draw(logits, key, position, temperature)
        return [token.tolist()], [logprob.tolist()]


# --- the schedule: who is in the batch ----------------------------------------------------------------------
PREFILL_TOKENS = 8192  # a prefill takes at most so many tokens at once (or one longer prompt)
PREFILL_ROWS = 16  # and goes on until so many rows are ready, or as many as have a place


@dataclass(slots=True, eq=False)
class _Group:
    prompt: list
    rows: list = field(default_factory=list)
    slot: int = -1
    ended: int = 0                                           # how many of its rows have


@dataclass(slots=True, eq=False)
class _Row:
    group: _Group
    key: int
    rollout: Rollout
    slot: int = -1
    closed: bool = False                                     # whether </answer> was its last token

    @property
    def last(self):
        return self.rollout.tokens[-1] if self.rollout.tokens else self.group.prompt[-1]


def make_groups(prompts, n, seed):
    groups = [_Group(prompt) for prompt in prompts]
    for group, keys in zip(groups, row_keys(seed, len(prompts), n).tolist()):
        group.rows = [_Row(group, key, Rollout([], [])) for key in keys]
    return groups


def enter(items, item):
    item.slot = len(items)
    items.append(item)


def leave(items, item, move):
    """The last item takes the place of the one that leaves, in the list and in the cache: both stay dense."""
    last = items.pop()
    if last is not item:
        move(last.slot, item.slot)
        items[item.slot] = last
        last.slot = item.slot


def round_up(x, step):
    return -(-x // step) * step


def power_of_2(x):
    """The smallest power of 2 that is at least x."""
    return 2 ** (x - 1).bit_length()


def batch_size(live):
    """The smallest size of a ladder that holds `live` rows: four an octave, so CUDA captures few graphs."""
    return round_up(live, max(1, power_of_2(live) // 8))


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(model):
    """Bytes of keys and values that one token leaves in the cache."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim(config) * next(model.parameters()).element_size()


def row_bytes(model, length):
    """Bytes of a row of `length` tokens with a prompt of its own: cache, logits and what `draw` makes; the
    slow decoder has logits at every position."""
    positions = 8 + length * bool(why_not_ours(model))
    logits = positions * model.config.get_text_config().vocab_size * next(model.parameters()).element_size()
    return cache_bytes(model) * length + logits


def batch_limit(policy, prompt_length, max_new_tokens):
    """How many rows fit into the free memory, each with a prompt of its own. Ask once, at the start of a run,
    and keep it: the batch shape changes rounding. Raises data.InputError where not even one fits."""
    model, length = policy.model, round_up(prompt_length, 128) + round_up(max_new_tokens, 32)
    row = row_bytes(model, length)
    if policy.device.type == "cuda":
        free = torch.cuda.mem_get_info(policy.device)[0]
        free += torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        if isinstance(policy.engine, Decoder):  # the kept cache is used again, or freed for a larger one
            free += policy.engine.kv.nbytes + policy.engine.prompt_kv.nbytes
        limit = min(2048, int(0.8 * free / row))  # the rest: activations, graphs, prompts filled ahead
    else:
        limit = min(128, int(4e9 / row))                     # a fixed budget: the same batches everywhere
    if limit < 1:
        raise InputError(f"one sequence of {length} tokens needs {row / 1e9:.1f} GB and does not fit; "
                         "lower --max-new-tokens")
    return limit


def _engine(policy, *capacity):
    """The policy's decoder, made anew if too small. capacity: rows, new tokens, prompts, prompt tokens."""
    engine = policy.engine
    if engine is None or any(has < needed for has, needed in zip(engine.capacity, capacity)):
        if engine and engine.capacity[:2] == capacity[:2]:  # a run of grpo.py: grow, and so a few times only
            capacity = tuple(map(max, engine.capacity, capacity))
        engine = policy.engine = None  # free the old cache before the new one is allocated
        kind = SlowDecoder if why_not_ours(policy.model) else Decoder
        engine = policy.engine = kind(policy.model, *capacity)
    engine.use(policy.model)
    return engine


@functools.lru_cache(maxsize=1 << 18)
def _may_close(tokenizer, token):
    return ">" in tokenizer.decode([token], clean_up_tokenization_spaces=False)


def closes(tokenizer, tokens):
    """Whether the last token completes </answer>, one token in some vocabularies and several in others."""
    return _may_close(tokenizer, tokens[-1]) and \
        "</answer>" in tokenizer.decode(tokens[-12:], clean_up_tokenization_spaces=False)


def context(policy):
    """How many tokens the model can read, prompt and response together."""
    return getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_request(policy, prompts, n, max_new_tokens):
    if n < 1 or max_new_tokens < 1:
        raise InputError(f"n and --max-new-tokens must be at least 1, not {n} and {max_new_tokens}")
    if not all(prompts):
        raise InputError("an empty prompt has no last token to continue from")
    room, longest = context(policy), max(map(len, prompts))
    if longest > room - 1:
        raise InputError(f"a prompt of {longest} tokens leaves no room in the model's context of {room}; "
                         "use shorter problems")
    if longest + max_new_tokens > room:
        raise InputError(f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens} exceed the "
                         f"model's context of {room}; lower --max-new-tokens to {room - longest}")


def admit(engine, waiting, cached, ready, free):
    """Bring waiting prompts into the cache, several at once, until the `free` places have a row each. (There
    are more slots of prompts than live rows need, so one is always free.)"""
    while waiting and len(ready) < free:
        batch, tokens = [], 0
        while waiting and len(cached) < engine.capacity[2] and len(ready) < max(PREFILL_ROWS, free):
            tokens += len(waiting[0].prompt)
            if batch and tokens > PREFILL_TOKENS:
                break
            batch.append(waiting.popleft())
            enter(cached, batch[-1])
            ready.extend(batch[-1].rows)
        engine.prefill([group.prompt for group in batch], [group.slot for group in batch])


def accept(row, token, logprob, policy, eos, max_new_tokens):
    """Append a drawn token to its row, or drop it, and say in row.rollout.stop if the row has ended."""
    out = row.rollout
    if out.stop:                                             # it ended between two looks of the host
        return
    if row.closed and token not in eos:
        out.stop = "closed"
        return
    out.tokens.append(token)
    out.logprobs.append(logprob)
    row.closed = token not in eos and closes(policy.tokenizer, out.tokens)
    if token in eos:
        out.stop = "eos"
    elif len(out.tokens) == max_new_tokens:
        out.stop = "closed" if row.closed else "length"


def retire(rows, cached, engine):
    """Rows that have ended give up their slots, and a prompt its own with the last of its rows."""
    for row in [row for row in rows if row.rollout.stop]:
        leave(rows, row, engine.move_row)
        row.group.ended += 1
        if row.group.ended == len(row.group.rows):
            leave(cached, row.group, engine.move_prompt)


@torch.inference_mode()
def generate(policy, prompts, n=1, max_new_tokens=512, temperature=1.0, seed=0, max_batch=None):
    """Sample n responses to each prompt (a list of token ids) -> for each prompt, in order, n Rollouts.

    temperature 0 is greedy. What a token draws is a function of (seed, prompt index, sample, position) alone:
    neither max_batch (rows at a time; None: batch_limit) nor the order in which rows finish changes it,
    though the shape of a batch changes rounding, which can turn a near-tie. Raises data.InputError if a
    prompt with its new tokens exceeds the model's context or the memory."""
    if not prompts:
        return []
    check_request(policy, prompts, n, max_new_tokens)
    groups = make_groups(prompts, n, seed)
    longest = max(map(len, prompts))
    limit = max_batch or min(batch_limit(policy, longest, max_new_tokens), n * len(prompts))
    slots = min(limit + min(limit // 8, PREFILL_ROWS), len(prompts))   # some are filled ahead of their rows
    # A row that ends between two looks of the host runs on, inside its slot: 32 is a multiple of every sync.
    engine = _engine(policy, limit, round_up(max_new_tokens, 32), slots, round_up(longest, 128))
    eos = policy.eos_ids

    waiting = deque(sorted(groups, key=lambda group: -len(group.prompt)))  # long ones first: a short tail
    cached = []      # groups whose prompt is in the cache
    ready = deque()  # their rows that wait for a slot
    rows = []        # the live rows: rows[i] sits in slot i
    while waiting or ready or rows:
        admit(engine, waiting, cached, ready, limit - len(rows))
        while ready and len(rows) < limit:
            enter(rows, ready.popleft())
        for tokens, logprobs in zip(*engine.run(rows, temperature)):
            for row, token, logprob in zip(rows, tokens, logprobs):
                accept(row, token, logprob, policy, eos, max_new_tokens)
        retire(rows, cached, engine)
    return [[row.rollout for row in group.rows] for group in groups]


# ------------------------------------------------------------------------------------------------ 4. Accuracy
def greedy_accuracy(policy, problems, max_new_tokens=512, max_batch=None):
    """Greedy answers to `problems` (objects with .question and .answer), scored by data.reward.

    Returns n, correct, accuracy, format_rate (share with exactly one readable answer), cut_rate (share that
    reached max_new_tokens), mean_tokens, hits (0.0 or 1.0) and texts, both in the order of the problems."""
    problems = list(problems)
    if not problems:
        raise InputError("no problems to measure accuracy on")
    prompts = [encode_prompt(policy.tokenizer, problem.question) for problem in problems]
    rollouts = [r for r, in generate(policy, prompts, 1, max_new_tokens, temperature=0, max_batch=max_batch)]
    texts = [decode(policy.tokenizer, rollout.tokens) for rollout in rollouts]
    hits = [data.reward(text, problem.answer) for text, problem in zip(texts, problems)]
    n = len(problems)
    return {
        "n": n,
        "correct": int(sum(hits)),
        "accuracy": sum(hits) / n,
        "format_rate": sum(data.read_answer(text) is not None for text in texts) / n,
        "cut_rate": sum(rollout.stop == "length" for rollout in rollouts) / n,
        "mean_tokens": sum(len(rollout.tokens) for rollout in rollouts) / n,
        "hits": hits,
        "texts": texts,
    }


# ------------- 5. Log-probabilities of given tokens, and the entropy of the distribution they were drawn from
# For a row x of logits (divided by the temperature) and its target y, with m = max x, d = sum e^(x - m):
#     logprob = (x_y - m) - log d            entropy H = log d - sum e^(x - m) (x - m) / d
#     d logprob / d x = onehot(y) - p        d H / d x = -p (log p + H)            p = e^(x - m - log d)
# The backward pass needs four numbers a token, its stats: logprob, H, m, log d. m and log d are kept apart,
# since their sum would round log d away where all logits share a large offset.
IGNORE = -100  # a target with this value, PyTorch's own, is masked: log-prob 0, entropy 0, no gradient


def rows_forward(x, targets, scale):
    """x (N, V) logits, targets (N,), scale = 1 / temperature -> stats (N, 4) fp32. Specifies the kernel.

    x is left as it is. The scaled copy is worked on in place: on a CPU fresh memory for each term takes
    longer than its arithmetic."""
    x = x.float() * scale
    m = x.amax(-1, keepdim=True)                             # (N, 1), like all sums below
    x -= m
    e = x.exp()
    d = e.sum(-1, keepdim=True)
    logprob = x.gather(-1, targets.clamp(min=0)[:, None]) - d.log()
    s = e.mul_(x.clamp_(min=-1e4)).sum(-1, keepdim=True)  # a logit of -inf: e is 0, and 0 * -inf would be NaN
    stats = torch.cat((logprob, d.log() - s / d, m, d.log()), -1)
    return stats.masked_fill((targets == IGNORE)[:, None], 0)


def rows_backward(x, targets, stats, g_logprob, g_entropy, scale):
    """d loss / d x (N, V) in x's dtype. g_logprob, g_entropy (N,): upstream gradients, one per token."""
    _, entropy, m, log_d = stats.split(1, -1)                # (N, 1) each
    g_logprob, g_entropy = scale * g_logprob[:, None], scale * g_entropy[:, None]
    logp = x.float() * scale                                 # (N, V)
    logp -= m
    logp -= log_d
    p = logp.exp()
    # -p (g_logprob + g_entropy (log p + H))
    grad = logp.clamp_(min=-1e4).add_(entropy).mul_(-g_entropy).sub_(g_logprob).mul_(p)
    grad.scatter_add_(-1, targets.clamp(min=0)[:, None], g_logprob)  # before rounding to x's dtype
    return grad.masked_fill_((targets == IGNORE)[:, None], 0).to(x.dtype)


def _blocks(x):
    """Slices of the rows that hold 1 MB of logits: the passes over them then run in a CPU's cache."""
    size = max(1, (1 << 18) // x.shape[1])
    return [slice(start, start + size) for start in range(0, len(x), size)]


def forward_torch(x, targets, scale):
    stats = torch.zeros(len(x), 4, device=x.device)
    for rows in _blocks(x):
        stats[rows] = rows_forward(x[rows], targets[rows], scale)
    return stats


def backward_torch(x, targets, stats, g_logprob, g_entropy, scale, out):
    for rows in _blocks(x):
        upstream = g_logprob[rows], g_entropy[rows]
        out[rows] = rows_backward(x[rows], targets[rows], stats[rows], *upstream, scale)


class _LogitsLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, targets, scale, backend, overwrite):
        forward, _ = BACKENDS[backend]
        stats = forward(x, targets, scale)
        ctx.save_for_backward(x, targets, stats)
        ctx.options = scale, backend, overwrite
        return stats[:, 0].clone(), stats[:, 1].clone()

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        x, targets, stats = ctx.saved_tensors
        scale, backend, overwrite = ctx.options
        _, backward = BACKENDS[backend]
        out = x if overwrite else torch.empty_like(x)
        backward(x, targets, stats, g_logprob.contiguous(), g_entropy.contiguous(), scale, out)
        return out, None, None, None, None


def logits_logprobs(logits, targets, *, temperature=1.0, backend="auto", overwrite=False):
    """Log-prob of each target and entropy of its distribution, from logits.

    logits (..., V) any float dtype; targets (...) int64, -100 = masked. Returns logprob, entropy: fp32 in
    nats, shape of targets, differentiable in logits with an own upstream gradient per token. overwrite=True
    lets the backward pass write the gradient over the logits: half the memory, and the logits are lost.
    Raises ValueError for an unknown backend. No chapter calls it: trainers that hold their logits can, and so
    the tests reach the kernel."""
    backend = _pick_backend(backend, logits)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()                         # the kernels want a row's logits side by side
    try:
        x = logits.view(-1, logits.shape[-1])
    except RuntimeError:  # a slice such as logits[:, :-1]: never copied whole
        options = dict(temperature=temperature, backend=backend, overwrite=overwrite)
        parts = [logits_logprobs(*part, **options) for part in zip(logits, targets)]
        return tuple(torch.stack(part) for part in zip(*parts))
    targets_1d = targets.reshape(-1).contiguous()
    logprob, entropy = _LogitsLogProb.apply(x, targets_1d, 1 / temperature, backend, overwrite)
    return logprob.view(targets.shape), entropy.view(targets.shape)


# --- from the last hidden states: the head in chunks of tokens, so that (tokens, V) logits are never held ---
CPU_CHUNK = 1 << 26        # bytes of logits at a time: enough rows for fast products
GPU_CHUNK = 1 << 28        # 1/20 of the 16,384 x 151,936 logits in bf16


def logit_chunks(h, weight, chunk_bytes):
    """h (N, H), weight (V, H) -> slices of the N tokens, with their logits (rows, V)."""
    rows = max(1, chunk_bytes // (len(weight) * h.element_size()))
    # one buffer: fresh memory for each chunk would cost a CPU a quarter more
    buffer = h.new_empty(min(rows, len(h)), len(weight))
    for start in range(0, len(h), rows):
        part = slice(start, start + rows)
        yield part, torch.mm(h[part], weight.T, out=buffer[:len(h[part])])


class HeadGradients:
    """d loss / d h (N, H) and d loss / d weight (V, H), from the gradients of the logits, chunk by chunk."""
    def __init__(self, h, weight):
        self.h, self.weight = h, weight
        self.of_h = torch.empty_like(h) if h.requires_grad else None
        # in fp32: a sum in bf16 stalls
        self.of_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None

    def add(self, part, grad):                               # (rows, V)
        if self.of_h is not None:
            torch.mm(grad, self.weight, out=self.of_h[part])
        if self.of_weight is not None and grad.dtype == torch.float32:
            self.of_weight.addmm_(grad.T, self.h[part])      # no (V, H) in between
        elif self.of_weight is not None:
            self.of_weight += grad.T @ self.h[part]

    def result(self):
        return self.of_h, None if self.of_weight is None else self.of_weight.to(self.weight.dtype)


class _TokenLogProbs(torch.autograd.Function):
    """The backward pass makes the logits a second time, which is cheaper than keeping them: four products."""
    @staticmethod
    def forward(ctx, h, weight, targets, scale, backend, chunk_bytes):
        forward, _ = BACKENDS[backend]
        stats = torch.zeros(len(h), 4, device=h.device)
        for part, logits in logit_chunks(h, weight, chunk_bytes):
            stats[part] = forward(logits, targets[part], scale)
        ctx.save_for_backward(h, weight, targets, stats)
        ctx.options = scale, backend, chunk_bytes
        return stats[:, 0].clone(), stats[:, 1].clone()

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        h, weight, targets, stats = ctx.saved_tensors
        scale, backend, chunk_bytes = ctx.options
        _, backward = BACKENDS[backend]
        g_logprob, g_entropy = g_logprob.contiguous(), g_entropy.contiguous()
        gradients = HeadGradients(h, weight)
        for part, logits in logit_chunks(h, weight, chunk_bytes):
            backward(logits, targets[part], stats[part], g_logprob[part], g_entropy[part], scale, out=logits)
            gradients.add(part, logits)
        return *gradients.result(), None, None, None, None


class _SumLogProb(torch.autograd.Function):
    """In a sum every token's upstream gradient is the same: the forward pass makes the gradients for 1, while
    the logits are there (three products), and the backward pass multiplies them by what it was."""
    @staticmethod
    def forward(ctx, h, weight, targets, scale, backend, chunk_bytes):
        forward, backward = BACKENDS[backend]
        one, zero = torch.ones(len(h), device=h.device), torch.zeros(len(h), device=h.device)
        total, gradients = torch.zeros((), device=h.device), HeadGradients(h, weight)
        for part, logits in logit_chunks(h, weight, chunk_bytes):
            stats = forward(logits, targets[part], scale)
            backward(logits, targets[part], stats, one[part], zero[part], scale, out=logits)
            gradients.add(part, logits)
            total += stats[:, 0].sum()
        ctx.save_for_backward(*gradients.result())
        return total

    @staticmethod
    def backward(ctx, g):
        return *(None if grad is None else grad * g for grad in ctx.saved_tensors), None, None, None, None


def _apply(function, hidden, weight, targets, temperature, backend, chunk_bytes):
    kept = targets != IGNORE                                 # masked tokens cost nothing from here on
    backend = _pick_backend(backend, hidden)
    chunk_bytes = chunk_bytes or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK)
    return function.apply(hidden[kept], weight, targets[kept], 1 / temperature, backend, chunk_bytes)


def token_logprobs(hidden, weight, targets, *, temperature=1.0, backend="auto", chunk_bytes=None):
    """Log-prob and entropy of each target from the last hidden states.

    hidden (..., H); weight (V, H), the output head; targets (...) int64, -100 = masked (gives 0, 0 and no
    gradient). backend: "auto" (Triton on CUDA, else PyTorch), "triton" or "torch". chunk_bytes bounds one
    chunk of logits. Returns logprob, entropy: fp32 in nats, shape of targets, differentiable in hidden and
    weight with an own upstream gradient per token. The logits are computed in the dtype of hidden, as the
    sampler does; everything after them is fp32. Raises ValueError for an unknown backend."""
    values = _apply(_TokenLogProbs, hidden, weight, targets, temperature, backend, chunk_bytes)
    zeros = torch.zeros(targets.shape, device=hidden.device)
    return tuple(zeros.masked_scatter(targets != IGNORE, value) for value in values)


def sum_logprob(hidden, weight, targets, *, temperature=1.0, backend="auto", chunk_bytes=None):
    """The sum of token_logprobs over all tokens, a scalar. Arguments and errors as there.

    For SFT: a product with the head less; gradients are made in the forward pass (in vain under no_grad)."""
    return _apply(_SumLogProb, hidden, weight, targets, temperature, backend, chunk_bytes)


# --- the same in Triton: one pass over the logits forward, one backward -----------------------------------
try:                       # no Triton on macOS and Windows: the PyTorch functions above do the same sums
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:
    @triton.jit
    def _forward_kernel(x_ptr, target_ptr, stats_ptr, stride, V, scale, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31 at 16,384 x 151,936
        target = tl.load(target_ptr + row)
        if target == -100:
            return                                           # its stats are zero already
        x_ptr += row * stride
        m, d, s = -1e30, 0.0, 0.0                            # running max, sum e^(x-m), sum e^(x-m) (x-m)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + column, mask=column < V, other=-float("inf")).to(tl.float32) * scale
            m_new = tl.maximum(m, tl.max(x, 0))
            shrink = tl.exp(m - m_new)  # the maximum moved: what was summed so far is rescaled,
            s = shrink * (s + (m - m_new) * d)  # e^(x-m') (x-m') = e^(m-m') e^(x-m) ((x-m) + (m-m'))
            e = tl.exp(x - m_new)
            d = shrink * d + tl.sum(e, 0)
            s += tl.sum(tl.where(e > 0, e * (x - m_new), 0.0), 0)      # the tail would be 0 * -inf = NaN
            m = m_new
        log_d = tl.log(d)
        x_y = tl.load(x_ptr + target).to(tl.float32) * scale
        stats_ptr += row * 4
        tl.store(stats_ptr, (x_y - m) - log_d)
        tl.store(stats_ptr + 1, log_d - s / d)
        tl.store(stats_ptr + 2, m)
        tl.store(stats_ptr + 3, log_d)

    @triton.jit
    def _backward_kernel(x_ptr, target_ptr, stats_ptr, g_logprob_ptr, g_entropy_ptr, out_ptr,
                         stride, out_stride, V, scale, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        # no sum is left to do: blocks are independent
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + row)
        x = tl.load(x_ptr + row * stride + column, mask=column < V, other=-float("inf")).to(tl.float32)
        x *= scale
        stats_ptr += row * 4
        entropy, m, log_d = tl.load(stats_ptr + 1), tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
        # this token's own upstream gradients, not token 0's
        g, g_entropy = tl.load(g_logprob_ptr + row), tl.load(g_entropy_ptr + row)
        logp = (x - m) - log_d
        p = tl.exp(logp)
        grad = tl.where(p > 0, -p * (g + g_entropy * (logp + entropy)), 0.0)
        grad = tl.where(column == target, grad + g, grad) * scale
        grad = tl.where(target == -100, 0.0, grad)
        tl.store(out_ptr + row * out_stride + column, grad, mask=column < V)


def launch_shape(V):
    """(BLOCK, num_warps) for a vocabulary of V: at most 16 values a thread, since more spill registers."""
    block = min(4096, max(128, triton.next_power_of_2(V)))
    return block, max(1, min(8, block // 512))


def forward_triton(x, targets, scale):
    N, V = x.shape
    block, warps = launch_shape(V)
    stats = torch.zeros(N, 4, device=x.device)
    if N:
        _forward_kernel[(N,)](x, targets, stats, x.stride(0), V, scale, BLOCK=block, num_warps=warps)
    return stats


def backward_triton(x, targets, stats, g_logprob, g_entropy, scale, out):
    N, V = x.shape
    block, warps = launch_shape(V)
    if N:
        kernel = _backward_kernel[(N, triton.cdiv(V, block))]
        kernel(x, targets, stats, g_logprob, g_entropy, out, x.stride(0), out.stride(0), V, scale,
               BLOCK=block, num_warps=warps)


BACKENDS = {"torch": (forward_torch, backward_torch), "triton": (forward_triton, backward_triton)}


def _pick_backend(backend, tensor):
    if backend == "auto":
        return "triton" if triton is not None and tensor.is_cuda else "torch"
    if backend == "triton" and triton is None:
        raise ValueError("backend='triton' needs the triton package; backend='torch' computes the same")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto, triton or torch, not {backend!r}")
    return backend


# ------------------------------------------------------------------------------------------------- 6. Command
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
    """The least time in which this machine can decode groups of rollouts, all at once: one prompt length and
    one list of rollout lengths for each.

    Every step reads each live row's own keys and values, those of each live group's prompt, and the weights
    once; or, with many rows, it is held up by the weights' 2 FLOP a row:
        sum over steps of  KV bytes / bandwidth + max(weight bytes / bandwidth, 2 P rows / flops)"""
    embedding, head = policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight
    parameters = sum(p.numel() for p in policy.model.parameters())
    if embedding is not head:  # looked up, never multiplied with
        parameters -= embedding.numel()
    read = parameters * head.element_size() / bandwidth
    steps = torch.tensor([length for group in lengths for length in group])
    rows = steps[:, None].gt(torch.arange(steps.max())).sum(0)         # live rows at each step
    own = (steps * (steps + 1) / 2).sum().item()                       # tokens read from the caches
    shared = sum(prompt * max(group) for prompt, group in zip(prompt_lengths, lengths))
    cache = (own + shared) * cache_bytes(policy.model) / bandwidth
    return cache + (2 * parameters * rows / flops).clamp(min=read).sum().item()


def colour(text):
    """Mark the behaviors for a terminal: reflections yellow, analyses cyan, one operation per "=" green."""
    codes, lines = {"reflection": 33, "analysis": 36, "subgoal": 32}, []
    for line in text.split("\n"):
        code = codes.get(data.line_kind(line))
        lines.append(f"\033[{code}m{line}\033[0m" if code else line)
    return "\n".join(lines)


def speed_line(policy, prompts, groups, seconds):
    """How many tokens a second, how close that is to what the GPU allows, and how many rollouts were cut."""
    lengths = [[len(rollout.tokens) for rollout in group] for group in groups]
    stops = [rollout.stop for group in groups for rollout in group]
    tokens, share = sum(map(sum, lengths)), ""
    if policy.device.type == "cuda":
        ceilings = machine_ceilings(policy.device)
        least = limit_seconds(policy, [len(prompt) for prompt in prompts], lengths, *ceilings)
        share = f" ({least / seconds:.0%} of what this GPU's bandwidth allows for so few rows)"
    return (f"{len(stops)} rollouts, {tokens} tokens in {seconds:.1f} s = {tokens / seconds:.0f} tokens/s"
            f"{share}; {stops.count('length') / len(stops):.0%} cut at --max-new-tokens")


def main():
    parser = data.Parser("Sample rollouts from a policy and show them with their reward.")
    add = parser.add_argument
    add("--ckpt", help="a .pt file, a Hugging Face folder or name; default: sft.pt, else the tiny base")
    add("--data", help="JSONL problems (default: fresh iGSM problems as of the tiny model)")
    add("--problems", type=data.positive_int, default=2, help="how many problems to answer")
    add("--n", type=data.positive_int, default=4, help="rollouts per problem")
    add("--max-new-tokens", type=data.positive_int, default=512, help="a longer response is cut")
    add("--temperature", type=data.not_negative, default=1.0, help="0 is greedy")
    add("--seed", type=data.natural, default=0, help="of the draws, and of the fresh problems")
    args = parser.parse_args()
    if 0 < args.temperature < 1e-3:
        raise InputError(f"--temperature {args.temperature}: must be 0 (greedy) or at least 0.001")
    source = data.read_problems(args.data) if args.data else \
        data.generate(seed=args.seed, split="test", **data.TINY["igsm"])
    problems = list(itertools.islice(source, args.problems))
    policy = load_policy(default_checkpoint(args.ckpt, problems[0].task))
    print(describe(policy), file=sys.stderr)
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
            reward = data.reward(text, problem.answer)
            print(f"--- reward {reward:.0f}, {len(rollout.tokens)} tokens, stop: {rollout.stop}")
            print(f"<think>{show(text)}\n")
    print(speed_line(policy, prompts, groups, seconds))


if __name__ == "__main__":
    data.run_cli(main)
