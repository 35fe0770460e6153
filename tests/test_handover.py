"""What leaves the project for TRL and verl: the exported policy, the reward, the data and the settings."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)

import data
import grpo
import sample
import sft

PROBLEMS = [next(data.generate(ops=(3, 5), seed=seed)) for seed in range(5)]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")


def byte_bpe(rule, special):
    """A byte-level BPE tokenizer, trained on problems, with a family's rule for splitting text into words."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(rule), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    raw.train_from_iterator([p.question + p.response for p in PROBLEMS], trainer)
    raw.add_special_tokens(special)
    return raw


def make_policy(family):
    """A random policy with what a family's real checkpoints have: tokenizer, template, rotary base, biases."""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3)
    torch.manual_seed(0)
    if family == "tiny":
        policy = sft.tiny_policy(width=32, layers=2, heads=2, seed=0)
        policy.model.config.rope_parameters["rope_theta"] = 500.0
        policy.model = Qwen2ForCausalLM(policy.model.config)
    elif family == "qwen":
        raw = byte_bpe(QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                            additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        tokenizer.chat_template = CHATML
        rope = dict(rope_type="default", rope_theta=1e6)
        config = Qwen2Config(**shape, vocab_size=len(tokenizer), rope_parameters=rope, tie_word_embeddings=True,
                             bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
        policy = sample.Policy(Qwen2ForCausalLM(config), tokenizer, torch.device("cpu"))
    else:
        raw = byte_bpe(LLAMA, ["<|begin_of_text|>", "<|end_of_text|>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|begin_of_text|>",
                                            eos_token="<|end_of_text|>")
        rope = dict(rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=64)
        config = LlamaConfig(**shape, vocab_size=len(tokenizer), rope_parameters=rope,
                             eos_token_id=tokenizer.eos_token_id)
        policy = sample.Policy(LlamaForCausalLM(config), tokenizer, torch.device("cpu"))
    for name, parameter in policy.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    policy.model.eval().generation_config.update(do_sample=True, top_k=20, temperature=0.7)
    return policy


READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder, question, response in json.load(open(sys.argv[1])):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    prompt = list(ids if isinstance(ids, list) else ids["input_ids"])
    ids = prompt + tokenizer(response + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    batch = tokenizer([question], return_tensors="pt")
    model.generate(**batch, max_new_tokens=2, pad_token_id=0)
    with torch.no_grad():
        found[folder] = prompt, ids, model(torch.tensor([ids])).logits[0].float(), dict(
            do_sample=model.generation_config.do_sample, temperature=model.generation_config.temperature)
torch.save(found, sys.argv[2])
"""
# Another Python, with transformers 4.57, to read the same folders
PYTHONS = [sys.executable, *filter(None, [os.environ.get("BRIDGE_OTHER_PYTHON")])]


@pytest.mark.parametrize("python", PYTHONS)
def test_export_is_read_as_it_was_meant(python, tmp_path):
    """Bugs: AutoTokenizer builds Qwen's tokenizer for the tiny model and gives other ids; transformers 4.57
    misses rope_parameters and takes a base of 10,000; sampling defaults that an engine applies unasked;
    token_type_ids that `generate` refuses."""
    problem, policies = PROBLEMS[0], {family: make_policy(family) for family in ("tiny", "qwen", "llama3")}
    response = problem.response.removeprefix("<think>")
    for family, policy in policies.items():
        sample.export_policy(policy, tmp_path / family)
    asked = [(str(tmp_path / family), problem.question, response) for family in policies]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    subprocess.run([python, "-c", READ, tmp_path / "asked.json", tmp_path / "found.pt"], check=True,
                   env=os.environ | {"HF_HUB_OFFLINE": "1"})
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for family, policy in policies.items():
        prompt, ids, logits, sampling = found[str(tmp_path / family)]
        assert prompt == sample.encode_prompt(policy.tokenizer, problem.question)
        assert ids == prompt + sample.encode_response(policy.tokenizer, problem.response)
        with torch.no_grad():
            ours = policy.model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, ours, atol=1e-5 * ours.abs().max().item(), rtol=0)
        assert not sampling["do_sample"] and sampling["temperature"] in (None, 1.0)
    kinds = {family: json.loads((tmp_path / family / "config.json").read_text())["model_type"] for family in policies}
    assert kinds == {"tiny": "llama", "qwen": "qwen2", "llama3": "llama"}


def test_an_export_that_differs_is_an_error(tmp_path, monkeypatch):
    """Bug: a folder that gives other ids or logits, found out after a week of training elsewhere."""
    policy = make_policy("qwen")
    monkeypatch.setattr(sample, "frozen_template", lambda tokenizer: CHATML)       # does not end in <think>
    with pytest.raises(data.InputError, match="other tokens or logits"):
        sample.export_policy(policy, tmp_path / "ids")
    monkeypatch.undo()
    monkeypatch.setattr(sample, "_same_ids", lambda policy, folder: False)         # so it becomes a Llama ...
    monkeypatch.setattr(sample, "as_llama", lambda model: make_policy("llama3").model)
    with pytest.raises(data.InputError, match="other tokens or logits"):
        sample.export_policy(policy, tmp_path / "logits")
