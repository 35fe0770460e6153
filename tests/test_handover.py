"""What leaves the project for TRL and verl: the exported policy, the reward, the data and the settings."""
import itertools
import json
import os
import re
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
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
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
    """A random policy with what its family's checkpoints have: tokenizer, template, rotary base, biases."""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3)
    torch.manual_seed(0)
    if family == "tiny":
        policy = sft.tiny_policy(width=32, layers=2, heads=2, seed=0)
        policy.model.config.rope_parameters["rope_theta"] = 500.0
        policy.model = Qwen2ForCausalLM(policy.model.config)
    elif family == "qwen":
        raw = byte_bpe(QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>",
                                            pad_token="<|endoftext|>",
                                            additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        tokenizer.chat_template = CHATML
        rope = dict(rope_type="default", rope_theta=1e6)
        config = Qwen2Config(**shape, vocab_size=len(tokenizer), rope_parameters=rope,
                             tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
        policy = sample.Policy(Qwen2ForCausalLM(config), tokenizer, torch.device("cpu"))
    else:
        raw = byte_bpe(LLAMA, ["<|begin_of_text|>", "<|end_of_text|>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|begin_of_text|>",
                                            eos_token="<|end_of_text|>")
        rope = dict(rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0,
                    high_freq_factor=4.0, original_max_position_embeddings=64)
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
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
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
    configs = {family: json.loads((tmp_path / family / "config.json").read_text()) for family in policies}
    kinds = {family: config["model_type"] for family, config in configs.items()}
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


# ----------------------------------------------------------------------------------------------- the folder
@pytest.mark.parametrize("response, right", [
    ("a</think>\n<answer>\n\\boxed{-7}\n</answer>", 1.0), ("a</think>\n<answer>\n\\boxed{7}\n</answer>", 0.0),
    ("\\boxed{-7}", 0.0), ("", 0.0)])
def test_rewards_under_other_names(response, right):
    """Bugs: a library that passes conversations, strings for numbers, or columns unknown to the reward."""
    conversation = [{"role": "assistant", "content": response}]
    assert data.trl_reward([response, conversation], answer=[-7, "-7"], prompts=[]) == [right] * 2
    assert data.compute_score("igsm", response, "-7", {"split": "train"}, extra=1) == right
    assert data.reward(response, -7) == right


def test_reward_module_needs_nothing_else(tmp_path):
    """Bug: data.py beside the settings imports a package or a chapter that is not there."""
    (tmp_path / "data.py").write_bytes(open(data.__file__, "rb").read())
    code = "import data; print(data.trl_reward(['</think><answer>\\\\boxed{3}</answer>'], [3]))"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "[1.0]\n", result.stderr


def settings_of(path):
    """Our own YAML: one JSON value a line."""
    lines = (line.split(": ", 1) for line in path.read_text().splitlines())
    return {name: json.loads(value) for name, value in lines}


RL = ["--steps", 3, "--prompts", 2, "--n", 4, "--max-new-tokens", 24, "--beta", 0.1, "--clip", 0.1,
      "--clip-high", 0.3, "--lr", 1e-6]


@pytest.fixture
def handed(script, tiny_file, tmp_path):
    """handed("grpo.py", flags) -> the folder that --hand-over wrote."""
    def make(name, *flags):
        start = {"grpo.py": ["--ckpt", tiny_file, *RL],
                 "sft.py": ["--model", tiny_file, "--n", 12, "--batch", 6]}
        result = script(name, *start[name], *flags, "--hand-over", "folder")
        assert result.returncode == 0, result.stderr
        # the tiny preset's drop_flat does not reach the others: not in silence
        assert ("groups without variance" in result.stdout) == (name == "grpo.py")
        assert sorted(os.listdir(tmp_path)) == ["folder"]          # it trains nothing and writes nothing else
        return tmp_path / "folder"
    return make


def test_rl_records_and_settings(handed, script):
    """Bugs: a field that verl or TRL calls otherwise; a batch of prompts where TRL counts completions; a
    schedule that is lost; an old folder overwritten; a flag that no other library has, or the problems that
    are held out, dropped in silence."""
    folder = handed("grpo.py", "--lr-decay", 0.5, "--epochs", 2, "--eval-every", 5, "--eval-n", 7)
    rows = [json.loads(line) for line in (folder / "rl.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 2
    for index, row in enumerate(rows):
        assert row["extra_info"] == {"split": "train", "index": index} and row["data_source"] == "igsm"
        assert row["reward_model"] == {"style": "rule", "ground_truth": row["answer"]}
        assert row["ability"] == "math"
        (message,) = row["prompt"]
        assert message["role"] == "user" and data.read_question(message["content"]).answer == row["answer"]
    trl = settings_of(folder / "trl-grpo.yaml")
    assert trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] == 2 * 4
    assert (trl["max_steps"], trl["num_iterations"]) == (6, 2)
    assert trl["lr_scheduler_kwargs"]["num_decay_steps"] == 3
    assert trl["adam_beta2"] == 0.95 and trl["use_bias_correction_kl"] is False
    held_out = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    assert [row["extra_info"] for row in held_out] == [{"split": "val", "index": i} for i in range(7)]
    assert not {row["prompt"][0]["content"] for row in held_out} & {row["prompt"][0]["content"] for row in rows}
    verl = (folder / "verl-grpo.sh").read_text()
    for words in ("train_batch_size=2", "rollout.n=4", "use_kl_loss=True", "kl_loss_coef=0.1",
                  "clip_ratio_high=0.3", "loss_agg_mode=seq-mean-token-mean", "no linear decay",
                  "reward.custom_reward_function.path=$PWD/data.py", "val_files=$PWD/val.jsonl",
                  "test_freq=5"):
        assert words in verl
    assert not subprocess.run(["bash", "-n", folder / "verl-grpo.sh"]).returncode
    again = script("grpo.py", *RL, "--hand-over", "folder")
    refused = script("grpo.py", *RL, "--max-kl", 0.1, "--hand-over", "other")
    assert again.returncode == refused.returncode == 2
    assert "exists already" in again.stderr and "--max-kl has no effect with --hand-over" in refused.stderr


def test_sft_records(handed):
    """Bug: labels on the question, or no end token to learn."""
    folder = handed("sft.py", "--method", "vanilla")
    tokenizer = sample.load_policy(folder / "policy", device="cpu").tokenizer
    stream = data.generate(seed=0, **data.TINY["igsm"])
    problems = list(itertools.islice(stream, 12))
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row, problem in zip(rows, problems):
        prompt, response = (sample.encode_prompt(tokenizer, problem.question),
                            sample.encode_response(tokenizer, problem.response))
        assert row == {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
    parquet = pytest.importorskip("pyarrow.parquet")
    for row, problem in zip(parquet.read_table(folder / "sft.parquet").to_pylist(), problems):
        answer = problem.response.removeprefix("<think>")
        assert row == {"messages": [{"role": "user", "content": problem.question},
                                    {"role": "assistant", "content": answer}]}


# ------------------------------------------------------------------- the libraries, where they are installed
def parsed(make_parser, config):
    """The settings file as TRL's own command reads it."""
    return make_parser().parse_args_and_config(["--config", config, "--use_cpu", "true"])


def test_trl_sft_loss_is_ours(handed, monkeypatch):
    """Bugs: labels that TRL does not read, another denominator."""
    pytest.importorskip("trl")
    from trl import SFTTrainer, get_dataset
    from trl.scripts.sft import make_parser
    folder = handed("sft.py")
    monkeypatch.chdir(folder)
    _, config, model, dataset = parsed(make_parser, "trl-sft.yaml")
    trainer = SFTTrainer(model=model.model_name_or_path, args=config,
                         train_dataset=get_dataset(dataset)["train"])
    batch = next(iter(trainer.get_train_dataloader()))
    examples = []
    for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        tokens, prompt = ids[real.bool()].tolist(), int((labels == -100)[real.bool()].sum())
        examples.append((tokens[:prompt], tokens[prompt:]))
    assert len(examples) == 6
    policy = sample.load_policy("policy", device="cpu")
    ours = sft.add_gradient(policy, examples, micro_tokens=300)
    items = (batch["labels"] != -100).sum()
    theirs = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).item()
    assert theirs == pytest.approx(ours, abs=1e-6)
    wrong = [(prompt[:1], prompt[1:] + response) for prompt, response in examples]  # the question, too
    # a random policy finds every token about as unlikely, so all losses are near log V: 50 tolerances away
    assert abs(theirs - sft.add_gradient(policy, wrong, micro_tokens=300)) > 5e-5


@pytest.mark.parametrize("flags, kind", [((), "grpo"), (("--norm", "token"), "bnpo"),
                                         (("--norm", "token"), "dapo"),
                                         (("--norm", "constant", "--no-std"), "dr_grpo")])
def test_trl_grpo_loss_is_ours(handed, monkeypatch, flags, kind):
    """Bugs: a flag translated to another loss, clip or KL term. Wrong: TRL's default, which multiplies the KL
    by the ratio."""
    pytest.importorskip("trl")
    from trl import GRPOTrainer, get_dataset
    from trl.scripts.grpo import make_parser
    folder = handed("grpo.py", *flags)
    monkeypatch.chdir(folder)
    _, config, model, dataset = parsed(make_parser, "trl-grpo.yaml")
    trainer = GRPOTrainer(model=model.model_name_or_path, reward_funcs=data.trl_reward, args=config,
                          train_dataset=get_dataset(dataset)["train"])
    if kind == "bnpo":  # the mean over the tokens of a micro-batch: ours where there is only one
        trainer.loss_type = "bnpo"
    assert trainer.loss_type == kind and config.learning_rate == 1e-6  # YAML alone reads 1e-06 as text
    B, T = 8, 24
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 900, (B, 10 + T), generator=draw)
    mask = torch.arange(T) < torch.tensor([24, 3, 9, 24, 1, 17, 5, 12])[:, None]
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    with torch.no_grad():
        logprob = trainer.model(ids).logits[:, 9:-1].log_softmax(-1).gather(2, ids[:, 10:, None])[:, :, 0]
    old, ref = (logprob + 0.2 * torch.randn(B, T, generator=draw) for _ in range(2))
    advantages = grpo.group_advantages(rewards, std=config.scale_rewards == "group").flatten()
    inputs = dict(prompt_ids=ids[:, :10], prompt_mask=torch.ones(B, 10, dtype=torch.int64),
                  completion_ids=ids[:, 10:], completion_mask=mask.long(), advantages=advantages,
                  old_per_token_logps=old,
                  ref_per_token_logps=ref, num_items_in_batch=mask.sum())
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(trainer.model, inputs).item()
    norm = {"grpo": "sequence", "dr_grpo": "constant"}.get(kind, "token")
    ours = grpo.grpo_loss(logprob, old, ref, advantages, mask, clip=0.1, clip_high=0.3, beta=0.1, norm=norm)
    assert theirs == pytest.approx(ours.item(), abs=1e-6)
    trainer.args.use_bias_correction_kl = True
    assert abs(trainer._compute_loss(trainer.model, inputs).item() - ours.item()) > 1e-5


def test_trl_trains_and_eval_reads(handed, script, monkeypatch, tmp_path):
    """Bugs: settings that TRL's command refuses; a prompt whose ids are not ours; a result that eval.py
    cannot read."""
    pytest.importorskip("trl")
    from trl.scripts import grpo as command
    folder = handed("grpo.py")
    monkeypatch.chdir(folder)
    command.main(*parsed(command.make_parser, "trl-grpo.yaml"))
    state = json.loads((folder / "grpo" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert all("rewards/trl_reward/mean" in row for row in state["log_history"][:3])
    result = script("eval.py", "--ckpt", folder / "grpo", "--n", 4, "--max-new-tokens", 24)
    assert result.returncode == 0 and "95% interval" in result.stdout, result.stderr
    tokenizer = sample.load_policy(folder / "grpo", device="cpu").tokenizer
    ours = sample.load_policy(folder / "policy", device="cpu").tokenizer
    question = PROBLEMS[0].question
    assert sample.encode_prompt(tokenizer, question) == sample.encode_prompt(ours, question)


def test_verl_reads_data_and_settings(handed, monkeypatch):
    """Bugs: prompts that verl's own class drops or encodes otherwise; a setting that its configuration does
    not know."""
    dataset = pytest.importorskip("verl.utils.dataset.rl_dataset")
    hydra, omegaconf = pytest.importorskip("hydra"), pytest.importorskip("omegaconf")
    import verl.trainer
    from verl.trainer.ppo import reward
    folder = handed("grpo.py", "--norm", "constant", "--tis", 2)
    script = (folder / "verl-grpo.sh").read_text().replace("$PWD", str(folder))
    overrides = re.findall(r'^    "(.*=.*)"', script, re.M)
    path = os.path.join(os.path.dirname(verl.trainer.__file__), "config")
    with hydra.initialize_config_dir(path, version_base=None):
        config = hydra.compose("ppo_trainer", overrides)
    actor = config.actor_rollout_ref.actor
    assert (actor.clip_ratio_c, actor.loss_scale_factor, list(actor.optim.betas)) == (1e9, 24, [0.9, 0.95])
    score = reward.get_custom_reward_fn(config)
    assert score("igsm", "</think><answer>\\boxed{3}</answer>", 3) == 1.0
    config.data.filter_overlong_prompts = True
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rows = dataset.RLHFDataset([str(folder / "rl.jsonl")], tokenizer, config.data)
    assert len(rows) == 6
    for row in rows:
        prompt = list(row["raw_prompt"])
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert ids == sample.encode_prompt(tokenizer, prompt[0]["content"])
        assert row["index"] == row["extra_info"]["index"]
        assert row["reward_model"]["ground_truth"] == row["answer"]


def test_verl_sft_trains_on_our_ids(handed):
    """Bug: a template that gives the turns of verl's SFT, encoded one by one, other ids or another mask."""
    dataset = pytest.importorskip("verl.utils.dataset.multiturn_sft_dataset")
    folder = handed("sft.py")
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    theirs = dataset.MultiTurnSFTDataset(str(folder / "sft.parquet"), tokenizer, {"pad_mode": "no_padding"})
    assert len(theirs) == len(rows)
    for row, other in zip(rows, theirs):
        assert other["input_ids"].tolist() == row["input_ids"]
        assert other["loss_mask"].tolist() == [int(label != -100) for label in row["labels"]]


@pytest.mark.parametrize("norm, mode", [("sequence", "seq-mean-token-mean"), ("token", "token-mean"),
                                        ("constant", "seq-mean-token-sum-norm")])
def test_verl_grpo_loss_is_ours(norm, mode):
    """Bugs: an aggregation, a clip or a KL term that verl-grpo.sh asks for and that is another one. Wrong:
    verl's own bound on the ratio of negative advantages."""
    verl = pytest.importorskip("verl.trainer.ppo.core_algos")
    from omegaconf import OmegaConf
    draw, B, T = torch.Generator().manual_seed(0), 8, 24
    logprob = -torch.rand(B, T, generator=draw)
    old, ref = (logprob + size * torch.randn(B, T, generator=draw) for size in (0.7, 0.3))
    mask = torch.arange(T) < torch.tensor([24, 3, 9, 24, 1, 17, 5, 12])[:, None]
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    advantages = grpo.group_advantages(rewards).flatten()
    scores = torch.nn.functional.pad(rewards.view(B, 1), (0, T - 1))
    theirs, _ = verl.compute_grpo_outcome_advantage(scores, mask.float(), [row // 4 for row in range(B)])
    torch.testing.assert_close(theirs, advantages[:, None] * mask)

    def loss(bound):
        config = OmegaConf.create(dict(clip_ratio=0.1, clip_ratio_low=0.1, clip_ratio_high=0.3,
                                       clip_ratio_c=bound, global_batch_info={}))
        pushed, _ = verl.compute_policy_loss_vanilla(old, logprob, theirs, mask.float(), mode, config)
        kl = verl.agg_loss(verl.kl_penalty(logprob, ref, "low_var_kl"), mask.float(), mode)
        return (pushed + 0.1 * kl).item()

    ours = grpo.grpo_loss(logprob, old, ref, advantages, mask, clip=0.1, clip_high=0.3, beta=0.1, norm=norm)
    assert loss(1e9) == pytest.approx(ours.item(), abs=1e-6) and abs(loss(3.0) - ours) > 1e-4
