"""The sampler, the prompt and the checkpoint (sample.py), on small random models of the three families."""
import copy
import functools
import math
import os
import string
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import sample

VOCAB = 160


def make_tokenizer(bos=False, tags=True, template=None, pad=None):
    """Characters as tokens; tags=True adds the four tags as ordinary single tokens, as the tiny base model has them."""
    words = ["<unk>", "<eos>", "<bos>", *string.printable]
    raw = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(["<eos>", "<bos>"])
    if tags:
        raw.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in sample.TAGS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>", pad_token=pad,
                                        bos_token="<bos>" if bos else None)
    tokenizer.chat_template = template
    return tokenizer


def make_model(family, seed=0):
    shape = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, bos_token_id=None, eos_token_id=1)
    torch.manual_seed(seed)
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=False))
    elif family == "llama":
        rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=64)
        model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256, eos_token_id=1))
    for name, parameter in model.named_parameters():         # biases and norms start at 0 and 1: a bug there would not show
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@functools.cache
def policy_of(family):
    return sample.Policy(make_model(family), make_tokenizer(tags=False), torch.device("cpu"))     # no tag: nothing closes by chance


def ragged_prompts(count, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (int(torch.randint(1, 60, (1,), generator=draw)),), generator=draw).tolist() for _ in range(count)]


def full_logits(model, prompt, tokens):
    """Logits (len(tokens), V) that one plain forward pass gives for every response token."""
    with torch.no_grad():
        return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1].float()


def is_greedy(model, prompt, tokens):
    """Every token has the largest logit, ties within 1e-5 excused."""
    logits = full_logits(model, prompt, tokens)
    return bool((logits.gather(1, torch.tensor(tokens)[:, None])[:, 0] >= logits.amax(1) - 1e-5).all())


def is_near_tie(model, prompt, a, b):
    """Whether two responses part at tokens that touch on the line which is walked: less than 1e-5 lies between them, so
    that rounding decides. Two unrelated tokens of this vocabulary touch once in 100 times."""
    at = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    ends = torch.softmax(full_logits(model, prompt, a[:at + 1])[-1].double(), -1).cumsum(-1)
    first, second = sorted((a[at], b[at]))
    return bool(ends[second - 1] - ends[first] < 1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_greedy_is_exact(family):
    """Catches a wrong mask, position, cache slot or refill: batched = alone = Hugging Face, rows refilled and compacted."""
    policy, prompts = policy_of(family), ragged_prompts(200 if os.environ.get("BRIDGE_FULL") else 40)
    model = policy.model
    batched = sample.generate(policy, prompts, 1, 12, temperature=0, max_batch=7)
    for prompt, (rollout,) in zip(prompts, batched):
        reference = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                   do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0)[0, len(prompt):].tolist()
        alone = sample.generate(policy, [prompt], 1, 12, temperature=0)[0][0]
        for r in (rollout, alone):
            assert r.tokens == reference or is_greedy(model, prompt, r.tokens)
            assert r.stop == ("eos" if r.tokens[-1] == 1 else "length") and (r.stop == "eos" or len(r.tokens) == 12)
    for n in (5, 16):
        groups = sample.generate(policy, prompts[:6], n, 12, temperature=0, max_batch=7)
        for prompt, rollouts, (expected,) in zip(prompts, groups, batched):
            assert len(rollouts) == n and all(r.tokens == expected.tokens or is_greedy(model, prompt, r.tokens) for r in rollouts)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_steps_of_a_gpu(family):
    """Catches what only CUDA's way through run() and step() would show: 16 steps between two looks of the host, during which
    finished rows run on, and sizes rounded up, to columns and slots that still hold what another call left there: the cache
    starts as noise, and the last call has shorter prompts. (Capture itself needs a GPU.)"""
    policy, reference = (sample.Policy(make_model(family), make_tokenizer(tags=False), torch.device("cpu")) for _ in range(2))
    sample.generate(policy, ragged_prompts(1), 1, 33, max_batch=16)
    assert policy.engine.capacity[1] % 16 == 0                    # a row that ends at its limit runs on to a look of the host
    engine = policy.engine = sample.Decoder(policy.model, 16, 64, 9, 128)
    engine.sync = 16
    engine.out_token, engine.out_logprob = torch.zeros(16, 16, dtype=torch.int64), torch.zeros(16, 16)
    engine.kv.normal_()
    engine.prompt_kv.normal_()
    long = ragged_prompts(9)
    for n, temperature, prompts in ((4, 1.0, long), (4, 0, long), (1, 1.0, [[5], *(prompt[:7] for prompt in long[1:])])):
        groups = (sample.generate(p, prompts, n, 40, temperature, max_batch=16) for p in (policy, reference))
        for prompt, ours, theirs in zip(prompts, *groups):
            for a, b in zip(ours, theirs):
                if (a.tokens, a.stop) == (b.tokens, b.stop):
                    torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)
                elif temperature == 0:
                    assert is_greedy(policy.model, prompt, a.tokens)
                else:
                    assert is_near_tie(policy.model, prompt, a.tokens, b.tokens)
    assert policy.engine is engine


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_graphs_repeat_the_steps(family):
    """Catches a graph that replays what its capture saw: captured in the first round and replayed in the second, on a GPU."""
    prompts = ragged_prompts(9)
    policy = sample.Policy(make_model(family).cuda(), make_tokenizer(tags=False), torch.device("cuda"))
    for _ in range(2):
        for prompt, group in zip(prompts, sample.generate(policy, prompts, 4, 40, temperature=0, max_batch=16)):
            for r in group:
                logits = full_logits(policy_of(family).model, prompt, r.tokens)
                logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
                assert bool((logprobs >= torch.log_softmax(logits, -1).amax(1) - 1e-3).all())
                torch.testing.assert_close(torch.tensor(r.logprobs), logprobs, atol=1e-3, rtol=0)


def test_limit_of_the_machine():
    """Catches weights counted once a row, a prompt counted once a row, a cache counted at its final length, and dead rows that
    still compute. By hand: qwen2, 3 layers, 2 kv heads of 12, fp32: 576 bytes a token; rows of 1 and 2 new tokens after a
    prompt of 10 (read in two steps), a row of 1 after a prompt of 20."""
    policy = policy_of("qwen2")
    P = sum(p.numel() for p in policy.model.parameters())    # the head is tied: one matrix, read once
    assert sample.cache_bytes(policy.model) == 2 * 3 * 2 * 12 * 4
    cache = 576 * (10 + 10 + 1 + (1 + 2) + 20 + 1)
    limit = functools.partial(sample.limit_seconds, policy, [10, 20], [[1, 2], [1]])
    assert limit(1e9, 1e30) == pytest.approx((cache + 2 * 4 * P) / 1e9)              # bandwidth
    assert limit(1e9, 1e6) == pytest.approx(cache / 1e9 + 2 * P * 4 / 1e6)           # arithmetic


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_logprobs_match_full_forward(family, temperature):
    """Catches log-probs recorded at another temperature or for another token (gpt2: the slow path for other architectures)."""
    policy, prompts = policy_of(family), ragged_prompts(6)
    for prompt, rollouts in zip(prompts, sample.generate(policy, prompts, 3, 10, temperature, seed=3, max_batch=7)):
        for r in rollouts:
            logp = torch.log_softmax(full_logits(policy.model, prompt, r.tokens) / (temperature or 1.0), -1)
            expected = logp.gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
            assert len(r.logprobs) == len(r.tokens)
            torch.testing.assert_close(torch.tensor(r.logprobs), expected, atol=1e-4, rtol=0)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_draws_follow_the_distribution(temperature, monkeypatch):
    """Catches biased noise: 200,000 draws over 40 tokens. 39 degrees of freedom: chi-square > 84 has odds of 4e-5.

    Temperature forgotten, and a line too coarse for rare tokens, are kept as wrong versions that the same test rejects.
    """
    logits = torch.linspace(-2, 3, 40)
    p = torch.softmax(logits / temperature, -1)
    key = sample.row_keys(5, 400, 500).flatten()
    token, logprob = sample.draw(logits.expand(len(key), -1), key, torch.full((len(key),), 17), temperature)
    counts = torch.bincount(token, minlength=40).double()
    assert chi_square(counts, p.double()) < 84
    torch.testing.assert_close(logprob, p.log()[token])
    assert chi_square(counts, torch.softmax(logits, -1).double()) > 1000
    with monkeypatch.context() as patch:
        patch.setattr(sample, "LINE", 2 ** 7)
        coarse, _ = sample.draw(logits.expand(len(key), -1), key, torch.full((len(key),), 17), temperature)
    assert chi_square(torch.bincount(coarse, minlength=40).double(), p.double()) > 300
    # along positions of one row and along samples of one prompt the draws are as independent as across prompts
    token, _ = sample.draw(logits.expand(200_000, -1), key[:1].expand(200_000), torch.arange(200_000), temperature)
    assert chi_square(torch.bincount(token, minlength=40).double(), p.double()) < 84
    pairs = torch.bincount((token[1:] >= 35) * 2 + (token[:-1] >= 35), minlength=4).double()
    tail = p[35:].sum().double()
    joint = torch.stack([(1 - tail) ** 2, tail * (1 - tail), tail * (1 - tail), tail ** 2])
    assert chi_square(pairs, joint) < 30


def test_the_ends_of_the_line(monkeypatch):
    """Catches a draw of a token of probability 0, which would have log-prob -inf, and one beyond the vocabulary: at the first
    and the last point of the line, and with a sum of probabilities that rounding has left below 1."""
    logits = torch.randn(1, 5000)
    logits[:, :7] = logits[:, -9:] = -math.inf
    for hashed, expected in ((0, 7), (0xFFFFFFFF, 4990)):
        monkeypatch.setattr(sample, "hash_of", lambda key, number: torch.full((2, 1), hashed))
        token, logprob = sample.draw(logits, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1.0)
        assert token.item() == expected and logprob.isfinite().all()


def test_schedule_changes_no_draw(monkeypatch):
    """Catches noise taken from a stream: the batch limit, refill, the size of a prefill and the order of finishing must not move
    a single token."""
    policy, prompts = policy_of("qwen2"), ragged_prompts(9)
    def tokens(**options):
        return [[r.tokens for r in group] for group in sample.generate(policy, prompts, 4, 16, **{"seed": 11, **options})]

    def same_draws(**options):
        """Equal but for rounding: one near-tie in some 600 draws is excused."""
        pairs = [(p, a, b) for p, x, y in zip(prompts, tokens(**options), reference) for a, b in zip(x, y) if a != b]
        return len(pairs) <= 1 and all(is_near_tie(policy.model, *pair) for pair in pairs)

    reference = tokens()
    assert all(same_draws(max_batch=limit) for limit in (1, 7, 36))
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 64)
    assert same_draws(max_batch=7) and same_draws() and not same_draws(seed=12)
    assert all(len({tuple(t) for t in group}) == 4 for group in reference)              # rows of one group differ
    assert len({tuple(t) for group in tokens(seed=2 ** 40 + 11) for t in group} & {tuple(t) for g in reference for t in g}) < 3


class Script(torch.nn.Module):
    """A fake decoder that forces the tokens it is told, row by row: the stop rules are tested apart from any model."""
    capacity, sync = (64, 10 ** 6, 64, 10 ** 6), 3           # three steps between two looks of the host

    def __init__(self, scripts):
        super().__init__()
        self.scripts = scripts

    def use(self, model): pass
    def prefill(self, prompts, slots): pass
    def move_prompt(self, source, target): pass
    def move_row(self, source, target): pass

    def run(self, rows, temperature):
        steps = [[self.scripts[row.group.prompt[0]][len(row.rollout.tokens) + s:][:1] or [9] for row in rows]
                 for s in range(self.sync)]
        return [[t for t, in step] for step in steps], [[-0.5] * len(rows) for _ in steps]


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_stop_reasons(tags, pad):
    """Catches a second end token, tokens after the end, a cut that depends on the sync period, pad == eos taken for the end."""
    tokenizer = make_tokenizer(tags=tags, pad=pad)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    ok, closed = encode("12</answer>"), encode("12</answer>")
    scripts = {0: ok + [1, 1, 40], 1: closed + [41, 42, 1], 2: encode("1234567890" * 5), 3: [1], 4: encode("x</answer"),
               5: encode("ab") + closed + [1]}
    policy = sample.Policy(make_model("qwen2"), tokenizer, torch.device("cpu"), engine=Script(scripts))
    limit = len(closed) + 4
    out = [r for r, in sample.generate(policy, [[i] for i in range(6)], 1, limit, max_batch=4)]
    assert [r.stop for r in out] == ["eos", "closed", "length", "eos", "length", "eos"]
    assert out[0].tokens == ok + [1] and out[1].tokens == closed and out[3].tokens == [1]
    assert len(out[2].tokens) == limit and all(len(r.tokens) == len(r.logprobs) for r in out)
    exact = sample.generate(policy, [[1], [0]], 1, len(closed))
    assert [g[0].stop for g in exact] == ["closed", "closed"] and exact[0][0].tokens == closed


def test_sampler_is_never_stale():
    """Catches copied weights: an update in place, and a replaced parameter, must both show in the next call."""
    policy = sample.Policy(make_model("qwen3"), make_tokenizer(), torch.device("cpu"))
    prompts = ragged_prompts(4)
    before = sample.generate(policy, prompts, 1, 8, temperature=0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().flip(0))
    after = sample.generate(policy, prompts, 1, 8, temperature=0)
    assert [g[0].tokens for g in after] != [g[0].tokens for g in before]
    assert all(is_greedy(policy.model, p, g[0].tokens) for p, g in zip(prompts, after))


def bf16_errors(wide, n=4):
    """Mean |difference| of log-probs over 4 n rollouts of 16 tokens, in nats: trainer - sampler, fp32 - sampler, fp32 - trainer.
    The sampler and the trainer (Hugging Face's forward) run in bf16 with the weights of `wide`, which bf16 holds exactly."""
    model = copy.deepcopy(wide).bfloat16()
    policy = sample.Policy(model, make_tokenizer(tags=False), torch.device("cpu"))
    errors = []
    for prompt, group in zip(ragged_prompts(4), sample.generate(policy, ragged_prompts(4), n, 16, seed=1)):
        for r in group:
            trainer, exact = (torch.log_softmax(full_logits(m, prompt, r.tokens), -1).gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
                              for m in (model, wide))
            ours = torch.tensor(r.logprobs)
            errors.append(torch.stack((trainer - ours, exact - ours, exact - trainer)).abs())
    return torch.cat(errors, 1).mean(1).tolist()


def soft_model(family, bias=1):
    """Random weights that bf16 holds exactly and that do not blow rounding up; `bias` times the keys' bias."""
    model = make_model(family)
    for name, parameter in model.named_parameters():
        scale = 0.5 if parameter.dim() > 1 else bias if name.endswith("k_proj.bias") else 1
        parameter.data = (parameter.data * scale).bfloat16().float()
    return model


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_bf16_drift(family):
    """Catches a step that rounds more than the trainer's forward does: bf16, against the trainer and against fp32."""
    drift, ours, theirs = bf16_errors(soft_model(family))
    assert drift <= 0.02 and ours <= 1.2 * theirs


def test_large_scores_are_not_rounded(monkeypatch):
    """Catches attention scores kept in bf16 before the softmax: Qwen2's key biases make them large (here about 45, where bf16
    steps by a quarter). Rounded scores are the wrong version that the same bound rejects: 256 rollouts put it at 1.09, the
    sampler at 0.94; 128 tell the two apart on an AMD EPYC with AVX-512 and with AVX2 alone."""
    model = soft_model("qwen2", bias=40)
    drift, ours, theirs = bf16_errors(model, n=32)
    assert drift <= 0.02 and ours <= 1.02 * theirs
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(a, b).bfloat16().to(a.dtype))
    drift, ours, theirs = bf16_errors(model, n=32)
    assert ours > 1.02 * theirs


CHATML = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}")


@pytest.mark.parametrize("template", [None, CHATML, "{{ bos_token }}" + CHATML, CHATML + "<think>\n"])
def test_prompt(template):
    """Catches a double BOS after a template that writes it, a missing one without, and a doubled opening <think>."""
    tokenizer = make_tokenizer(bos=template is None or "bos" in template, template=template)
    ids = sample.encode_prompt(tokenizer, "How many?")
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert ids[-1] == think and ids[-2] != think
    assert ids.count(2) == (1 if template is None or "bos" in template else 0) and (2 not in ids[1:])
    assert "How many?" in tokenizer.decode(ids)
    response = "<think>\n- a = 1 + 2 = 3.\n</think>\n<answer>\nThe final answer is \\boxed{3}.\n</answer>"
    target = sample.encode_response(tokenizer, response)
    assert target.count(1) == 1 and target[-1] == 1 and think not in target
    assert sample.encode_response(tokenizer, response + "<eos>") == target
    assert "<think>" + sample.decode(tokenizer, target) == response


def test_decode_keeps_tags_that_are_special():
    """Catches a reward of 0 for every response because skip_special_tokens also dropped <answer>."""
    tokenizer = make_tokenizer(tags=False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(sample.TAGS)})
    assert sample.decode(tokenizer, sample.encode_response(tokenizer, "<think>a</think><answer>1</answer>")) == "a</think><answer>1</answer>"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_checkpoint_round_trip(family, tmp_path):
    """Catches a lost or doubled tied head, a tokenizer that changes, and files that need pickle."""
    policy = sample.Policy(make_model(family), make_tokenizer(bos=True, template=CHATML), torch.device("cpu"))
    path, ids = str(tmp_path / "p.pt"), torch.tensor([ragged_prompts(1)[0]])
    sample.save_policy(path, policy, {"lr": 1e-6, "out": Path("x")})
    content = torch.load(path, weights_only=True)
    assert ("lm_head.weight" in content["weights"]) != policy.model.config.tie_word_embeddings
    loaded = sample.load_policy(path, device="cpu")
    sample.export_policy(loaded, tmp_path / "hf")
    folder = sample.load_policy(tmp_path / "hf", device="cpu")
    logits = policy.model(ids).logits
    for other in (loaded, folder):
        assert torch.equal(other.model(ids).logits, logits)
        assert sample.encode_prompt(other.tokenizer, "Why 1 + 1?") == sample.encode_prompt(policy.tokenizer, "Why 1 + 1?")
        assert other.eos_ids == policy.eos_ids == {1}
        assert not other.model.training
    assert loaded.info == {"lr": 1e-6, "out": "x"}
    sample.save_policy(path, policy, dtype=torch.bfloat16)
    rounded = sample.load_policy(path, device="cpu").model
    assert rounded.dtype == torch.float32 and torch.equal(rounded.get_input_embeddings().weight,
                                                          policy.model.get_input_embeddings().weight.bfloat16().float())
    assert os.listdir(tmp_path) and not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


def test_a_head_of_its_own_under_a_config_that_says_tied(tmp_path):
    """Catches a .pt in which the head has overwritten the embedding, since the config of its folder called the two one."""
    model = make_model("qwen2")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer().save_pretrained(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    folder, ids = sample.load_policy(tmp_path / "hf", device="cpu"), torch.tensor([ragged_prompts(1)[0]])
    sample.save_policy(tmp_path / "p.pt", folder)
    assert torch.equal(folder.model(ids).logits, model(ids).logits)
    assert torch.equal(sample.load_policy(tmp_path / "p.pt", device="cpu").model(ids).logits, model(ids).logits)


def test_a_prompt_does_not_depend_on_the_day():
    """Catches Llama 3's template, which writes today's date where no other is given."""
    template = "{% if not date_string is defined %}{{ strftime_now('%d %b %Y %f') }}{% else %}{{ date_string }}{% endif %}<think>"
    tokenizer = make_tokenizer(template=template)
    assert sample.prompt_text(tokenizer, "x") == "26 Jul 2024<think>"


def test_the_slow_decoder_asks_for_logits_everywhere():
    """Catches a batch whose logits, at every position, are many times what was reserved for it."""
    model = make_model("gpt2")
    assert sample.row_bytes(model, 200) - sample.cache_bytes(model) * 200 == 208 * VOCAB * 4
    fast = make_model("qwen2")
    assert sample.row_bytes(fast, 200) - sample.cache_bytes(fast) * 200 == 8 * VOCAB * 4


def test_bad_checkpoints_get_one_sentence(tmp_path):
    """Catches a traceback, or code run from a file, where the user needs the file's name and what to do."""
    good = tmp_path / "good.pt"
    sample.save_policy(good, policy_of("qwen2"))
    content = torch.load(good, weights_only=True)
    fewer = dict(list(content["weights"].items())[1:-1])
    cases = {"missing.pt": None, "short.pt": good.read_bytes()[:5000], "empty.pt": b"", "text.pt": b"hello",
             "list.pt": [1, 2], "state.pt": {"weights": {}}, "old.pt": {**content, "version": 0}, "thin.pt": {**content, "weights": fewer},
             "noconfig.pt": {k: v for k, v in content.items() if k != "config"}, "pickle.pt": {"format": sample.FORMAT, "x": print}}
    for name, value in cases.items():
        path = tmp_path / name
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif value is not None:
            torch.save(value, path)
        with pytest.raises(data.InputError) as error:
            sample.load_policy(path)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(data.InputError, match="nowhere"):
        sample.load_policy(str(tmp_path / "nowhere"))
    with pytest.raises(data.InputError, match="--ckpt"):
        sample.default_checkpoint("gone.pt")


def test_requests_that_cannot_fit():
    """Catches positions beyond the model's context, which would silently give nonsense."""
    policy = policy_of("qwen2")
    for prompts, limit, word in [([[5] * 256], 1, "prompt of 256"), ([[5] * 200], 100, "--max-new-tokens"), ([[5], []], 5, "empty prompt"),
                                 ([[5]], 0, "--max-new-tokens")]:
        with pytest.raises(data.InputError, match=word):
            sample.generate(policy, prompts, 1, limit)
    assert sample.generate(policy, [], 4) == []
    assert len(sample.generate(policy, [[5] * 200], 1, 56, temperature=0)[0][0].tokens) == 56


def test_a_temperature_near_0_is_refused(script):
    """Bug: logits divided by 1e-39 are infinite, and NaN probabilities draw the last token, without a word."""
    result = script("sample.py", "--temperature", "1e-39")
    assert result.returncode == 2 and "--temperature 1e-39: must be 0" in result.stderr


def test_describe_names_the_slow_path():
    assert "our decode step" in sample.describe(policy_of("llama"))
    assert "slow" in sample.describe(policy_of("gpt2"))


def test_command(script, tiny_file):
    """Catches a command that fails on a checkpoint of sft.py's format, and an exit code other than 2 for a missing file."""
    shown = script("sample.py", "--ckpt", tiny_file, "--n", 2, "--max-new-tokens", 8)
    assert shown.returncode == 0 and "reward" in shown.stdout, shown.stderr
    missing = script("sample.py", "--ckpt", "gone.pt")
    assert missing.returncode == 2 and missing.stderr.startswith("error: gone.pt: ")
