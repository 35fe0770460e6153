"""What a run reads and writes: outputs are claimed before anything is computed, inputs verified before they
are used, and whatever goes wrong outside the code ends in one sentence."""
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import data, sample, sft
from conftest import ROOT

NORM = "model.norm.weight"
FEW = ["--n", 8, "--batch", 4, "--ops", 1, 1]  # an SFT run of two steps
SHORT = ["--steps", 2, "--prompts", 2, "--n", 2, "--max-new-tokens", 6, "--ops", 1, 1, "--eval-every", 0]


def refused(result, *words):
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert last.startswith("error: ") and all(word in last for word in words), result.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("command, words", [
    ("sft.py --data d.csv --out d.pt", ["--out d.csv", "--data"]),
    ("sft.py --out notes.pt", ["--out notes.csv", "exists already"]),
    ("sft.py --out run.state.pt", ["--out run.state.pt", ".pt"]),
    ("sft.py --out link.pt", ["--out link.pt", "starts from"]),
    ("sft.py --out new.pt --export folder", ["--export folder", "exists already"]),
    ("sft.py --out new.pt --export folder --resume", ["--export folder", "exists already"]),
    ("sft.py --out new.pt --export new.csv", ["--export new.csv", "--out new.csv"]),
    ("sft.py --out nowhere/new.pt", ["--out nowhere/new.pt", "No such"]),
    ("sft.py --out " + "x" * 240 + ".pt", ["--out xxx", "too long"]),
    ("grpo.py --data d.csv --out d.pt", ["--out d.csv", "--data"]),
    ("eval.py --json a.pt", ["--json a.pt", "a file to read"]),
    ("eval.py --json other.pt", ["--json other.pt", "exists already"]),
    ("eval.py --json train.jsonl", ["--json train.jsonl", "exists already"]),
    ("eval.py --json folder", ["--json folder"]),
    ("eval.py --json /dev/null", ["--json /dev/null"]),
    ("eval.py --results x --json x", ["--json x", "--results"]),
    ("eval.py --results notes.csv", ["--results notes.csv"]),
    ("eval.py --samples 2 --plot p.txt", ["--plot p.txt", ".png"]),
    ("eval.py --samples 2 --plot paper.pdf", ["--plot paper.pdf", "exists already"]),
    ("eval.py --html index.html", ["--html index.html", "exists already"]),
    ("data.py --out a.pt", ["--out a.pt", "exists already"]),
    ("data.py --out chat.jsonl", ["--out chat.jsonl", "exists already"]),
    ("sft.py --behaviors subgoal --p 0.7", ["--p has no effect"]),
    ("inject.py train.jsonl --out ./train.jsonl", ["--out ./train.jsonl", "file to read"]),
    ("grpo.py --ckpt", ["--ckpt ''"]), ("sft.py --data", ["--data ''"]), ("eval.py --json", ["--json ''"])])
def test_outputs_are_claimed_before_anything_is_computed(command, words, script, tmp_path, tiny_file,
                                                         monkeypatch):
    """Bugs: data, a checkpoint or somebody's notes overwritten; two outputs in one file; a name that turns
    out not to be writable after hours; an empty name taken for none."""
    for name in ("a.pt", "other.pt"):
        shutil.copy(tiny_file, tmp_path / name)
    (tmp_path / "link.pt").symlink_to("a.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "notes.csv").write_text("name,phone\n")
    (tmp_path / "chat.jsonl").write_text('{"id": "chat-1", "messages": []}\n')
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.5\n%\xd0\xd4\xc5\xd8\n")
    (tmp_path / "index.html").write_text("<!DOCTYPE html>\n<html>")
    records = [data.to_record(p) for p, _ in zip(data.generate(ops=(1, 2)), range(8))]
    for name in ("d.csv", "train.jsonl"):
        data.write_records(tmp_path / name, records)
    before, (name, *flags) = contents(tmp_path), command.split()
    flags += [""] if flags[-1] in ("--ckpt", "--data", "--json") else []
    start = {"sft.py": ["--model", "a.pt"], "grpo.py": ["--ckpt", "a.pt"], "eval.py": ["--ckpt", "a.pt"]}
    monkeypatch.setattr(sample, "load_policy", None)  # what is refused now is refused before this
    refused(script(name, *start.get(name, []), *flags), *words)
    assert contents(tmp_path) == before


HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
import data
data.claim([("--out", "sft.pt", [b""])])
print("claimed", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_an_output(script, tmp_path, tiny_file):
    """Bugs: two runs with the same --out destroy each other; a lock that outlives its run, by an error or by
    kill -9."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, ROOT], cwd=tmp_path, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "claimed\n"
    base = ["sft.py", "--model", tiny_file, *FEW]
    refused(script(*base), "--out sft.pt", "another run")
    holder.kill()
    holder.wait()
    refused(script(*base[:3], "--data", "nowhere.jsonl"), "nowhere.jsonl")
    assert script(*base).returncode == 0
    assert sorted(contents(tmp_path)) == ["sft.csv", "sft.pt"]


def test_only_our_own_temporaries_are_swept_away(script, tmp_path, tiny_file):
    """Bugs: somebody's x.pt.notes.tmp removed; half a file of a killed save left for ever; an old log
    overwritten."""
    for name in ("sft.pt.notes.tmp", "sft.csv.tmp", f"sft.pt{data.OURS}abc.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sft.csv").write_text("step,loss\n1,2.0\n")  # of a run that was killed before its first save
    (tmp_path / "sft.1.csv").write_text("mine")
    result = script("sft.py", "--model", tiny_file, *FEW)
    assert result.returncode == 0 and "renamed to sft.2.csv" in result.stdout, result.stderr
    assert sorted(contents(tmp_path)) == ["sft.1.csv", "sft.2.csv", "sft.csv", "sft.csv.tmp", "sft.pt",
                                          "sft.pt.notes.tmp"]
    assert (tmp_path / "sft.2.csv").read_text() == "step,loss\n1,2.0\n"


@pytest.fixture
def begun(script, tmp_path, tiny_file, monkeypatch):
    """begun(*flags): an SFT run that was stopped after its first step, and its command."""
    row = sft.Log.row
    with monkeypatch.context() as patch:
        patch.setattr(sft.Log, "row",
                      lambda log, **values: (row(log, **values), os.kill(os.getpid(), signal.SIGTERM)))
        stopped = script("sft.py", "--model", tiny_file, *FEW)
    assert stopped.returncode == 130 and "after step 1," in stopped.stderr, stopped.stderr
    return ["sft.py", "--model", tiny_file, *FEW]


def equal(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_flipped_bit_is_found(begun, tmp_path, tiny_file):
    """Bug: torch.load takes changed weights for good ones. (A bit that no content depends on may flip.)"""
    rng, found = random.Random(0), 0
    for path in (tiny_file, tmp_path / "sft.state.pt"):
        good, truth = path.read_bytes(), sample.read_pt(path, "")
        for _ in range(30):
            changed = bytearray(good)
            changed[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            (tmp_path / "changed.pt").write_bytes(changed)
            try:
                assert equal(sample.read_pt(tmp_path / "changed.pt", "advice"), truth)
            except data.InputError:
                found += 1
    assert found >= 50


def test_a_resumed_run_needs_its_state_and_its_log(begun, script, tmp_path):
    """Bugs: a log with fewer rows than steps; a state of other tensors; a resume that silently begins
    anew."""
    log, state = tmp_path / "sft.csv", tmp_path / "sft.state.pt"
    rows, saved, good = log.read_text(), torch.load(state, weights_only=True), state.read_bytes()
    for text in (rows.split("\n")[0] + "\n", rows.replace("loss", "lost"), ""):
        log.write_text(text)
        refused(script(*begun, "--resume"), "sft.csv", "put it back")
        assert log.read_text() == text
    log.write_text(rows)
    master = saved["optimizer"]["master"]
    for wrong in ([m.flatten() for m in master], [m * float("nan") for m in master], master[1:]):
        torch.save(saved | {"optimizer": saved["optimizer"] | {"master": wrong}}, state)
        refused(script(*begun, "--resume"), "state")
    torch.save(saved | {"step": "1"}, state)
    refused(script(*begun, "--resume"), "sft.state.pt: not a saved state")
    state.write_bytes(good)
    assert script(*begun, "--resume", "--export", "folder").returncode == 0
    result = script(*begun, "--resume", "--export", "./folder/")  # finished: the folder is what it wrote
    assert result.returncode == 0 and "nothing to resume" in result.stdout
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "config.json").write_text("{}")
    refused(script(*begun, "--resume", "--export", "another"), "--export another", "exists already")
    result = script(*begun, "--resume", "--out", "other.pt")
    assert result.returncode == 0 and "no other.state.pt, so nothing to resume" in result.stdout


def changed_folder(folder, change):
    """A Hugging Face folder with other tensors."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def smaller_model(folder):
    """A model of another vocabulary beside the tokenizer."""
    model = sft.tiny_policy(32, 2, 2, 0).model
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (lambda f: changed_folder(f, lambda w: {n: t for n, t in w.items() if "1.mlp" not in n}), "1.mlp"),
    (lambda f: changed_folder(f, lambda w: w | {"extra": torch.zeros(2)}), "extra"),
    (lambda f: changed_folder(f, lambda w: w | {NORM: torch.zeros(3)}), "folder"),
    (lambda f: changed_folder(f, lambda w: {n: t * float("inf") for n, t in w.items()}), "not finite"),
    (lambda f: os.truncate(f / "model.safetensors", 9000), "folder"),
    (lambda f: (f / "config.json").write_text("{"), "folder"),
    (lambda f: (f / "tokenizer.json").unlink(), "folder"),
    (lambda f: smaller_model(f), "more tokens than its model")])
def test_damaged_folders_are_refused(change, words, tmp_path, tiny):
    """Bugs: random weights where a folder has none; tensors left out or ignored; ids beyond the embedding."""
    folder = tmp_path / "folder"
    tiny().model.save_pretrained(folder)
    tiny().tokenizer.save_pretrained(folder)
    sample.load_policy(folder, device="cpu")
    change(folder)
    with pytest.raises(data.InputError, match=words) as error:
        sample.load_policy(folder, device="cpu")
    assert "folder" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (lambda c: c["weights"][NORM].fill_(float("nan")), "not finite"),
    (lambda c: c["weights"].update({NORM: torch.zeros(3)}), "do not make a model"),
    (lambda c: c["weights"].update({NORM: torch.zeros(32, dtype=torch.int8)}), "floating-point"),
    (lambda c: c["weights"].update(extra=torch.zeros(3)), "extra"),
    (lambda c: c["weights"].pop(NORM), NORM),
    (lambda c: c.pop("version"), "format None"), (lambda c: c.pop("info"), "do not make a model"),
    (lambda c: c.update(eos_ids="end"), "do not make a model")])
def test_damaged_checkpoints_are_refused(change, words, tmp_path, tiny_file):
    """Bugs: NaN weights that sample nonsense; a traceback for a key or a type that is not as we write it."""
    content = torch.load(tiny_file, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(data.InputError, match=words) as error:
        sample.load_policy(tmp_path / "changed.pt", device="cpu")
    assert "changed.pt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("question, words", [("\\ud800", "surrogates"),
                                             ("x" * data.LONGEST, "over 200,000 bytes")])
def test_text_is_validated_when_it_is_read(question, words, tmp_path):
    """Bugs: half a surrogate pair that cannot be encoded hours later; a text that no model could read."""
    (tmp_path / "p.jsonl").write_text(f'{{"question": "{question}", "answer": 1}}\n')
    with pytest.raises(data.InputError, match=words) as error:
        data.read_problems(tmp_path / "p.jsonl")
    assert "line 1" in str(error.value)


@pytest.fixture
def small_disk():
    """Files of at most 60 kB, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence(small_disk, script, tmp_path, tiny_file):
    """Bugs: PyTorch's "unexpected pos" with a traceback; half a file; the old result lost."""
    (tmp_path / "big.jsonl").write_text('{"id": 0, "task": "igsm"}\n')
    cannot = ": cannot be written: " + os.strerror(errno.EFBIG)
    refused(script("sft.py", "--model", tiny_file, *FEW), "sft.pt" + cannot)
    refused(script("data.py", "--n", 100, "--ops", 5, 5, "--out", "big.jsonl"), "big.jsonl" + cannot)
    assert sorted(contents(tmp_path)) == ["big.jsonl", "sft.csv"]
    with pytest.raises(data.InputError, match="folder: cannot be written"):
        sample.export_policy(sample.load_policy(tiny_file, device="cpu"), tmp_path / "folder")
    assert (tmp_path / "big.jsonl").read_text() == '{"id": 0, "task": "igsm"}\n'


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left on device", "x.csv"), "error: x.csv: No space left on device"),
    (UnicodeEncodeError("ascii", "\u00e9", 0, 1, "ordinal not in range"), "error: 'ascii' codec"),
    (data.InputError("this and that"), "error: this and that")])
def test_errors_outside_the_code_are_one_sentence(error, words, capsys):
    """Bug: a traceback for what the code cannot help."""
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        data.run_cli(main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith(words) and printed.count("\n") == 1


def test_a_failing_chat_template_is_one_sentence(tiny):
    """Bug: a traceback out of jinja where a template takes no system message."""
    tokenizer = tiny().tokenizer
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(data.InputError, match="chat template fails .no system message"):
        sample.encode_prompt(tokenizer, "q")


@pytest.mark.parametrize("stdout", [None, "ascii"])
def test_stdout_may_be_closed_or_ascii(stdout, script, tiny_file, tmp_path, monkeypatch):
    """Bugs: `None has no isatty`; a rollout or a question that the terminal cannot show ends the run."""
    data.write_records(tmp_path / "p.jsonl", [{"question": "Wie viele \u00c4pfel?", "answer": 1}])
    stream = io.TextIOWrapper(io.BytesIO(), encoding=stdout) if stdout else None
    monkeypatch.setattr(sys, "stdout", stream)
    result = script("sample.py", "--ckpt", tiny_file, "--data", "p.jsonl", "--n", 1, "--max-new-tokens", 4)
    assert result.returncode == 0, result.stderr
    assert stream is None or b"Wie viele \\xc4pfel?" in stream.buffer.getvalue()


def children(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(number, process, tmp_path):
    """Bugs: SIGTERM that leaves half a file and workers behind; workers that hold a killed run's outputs for
    ever."""
    run = process("data.py", "--n", 10**6, "--workers", 2, "--ops", 5, 5, "--out", "x.jsonl")
    workers, patience = [], time.time() + 30
    while len(workers) < 2 and time.time() < patience:
        time.sleep(0.1)
        workers = children(run.pid)
    run.send_signal(number)
    _, printed = run.communicate(timeout=30)
    while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.time() < patience:
        time.sleep(0.1)
    assert len(workers) == 2 and not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    if number != signal.SIGKILL:
        assert run.returncode == 130 and printed == "interrupted\n" and not list(tmp_path.iterdir())


def test_all_prompts_of_a_file_are_measured_before_the_first_step(script, tmp_path, tiny_file):
    """Bug: a long question in line 70 ends the run when it is drawn, hours later."""
    lines = [json.dumps({"question": "What is 1 + 1?" * (300 if i == 70 else 1), "answer": 2})
             for i in range(72)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    few = ["--steps", 2, "--prompts", 2, "--n", 2, "--max-new-tokens", 6, "--eval-every", 0]
    refused(script("grpo.py", "--ckpt", tiny_file, "--data", "p.jsonl", *few), "context of 2048")
    assert not (tmp_path / "grpo.csv").exists()


def test_weights_that_blew_up_are_not_written(script, tmp_path, tiny_file):
    """Bug: the last update makes infinite weights, which no later loss can show: saved, and "done"."""
    base = ["sft.py", "--model", tiny_file, *FEW, "--n", 4, "--weight-decay"]
    refused(script(*base, 1e300), "sft.pt", "not finite")
    refused(script(*base, "inf"), "--weight-decay: inf")
    assert not (tmp_path / "sft.pt").exists()


def test_max_length_is_bound_by_the_context(tiny, script, tmp_path):
    """Bug: trained on positions that the model does not have, since --max-length is 2048 whatever the
    context."""
    policy = tiny()
    policy.model.config.max_position_embeddings = 100
    sample.save_policy(tmp_path / "short.pt", policy)
    result = script("sft.py", "--model", "short.pt", "--n", 30, "--batch", 30, "--ops", 1, 2)
    assert result.returncode == 0, result.stderr
    assert "longer than --max-length 100 tokens: left out" in result.stdout
