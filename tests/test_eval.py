"""eval.py: intervals, the baseline, and the table's figures."""
import json

import pytest

import data, eval as evaluation, sample


@pytest.mark.parametrize("correct, n, low, high", [(0, 100, 0.0, 0.03699), (50, 100, 0.40383, 0.59617), (99, 100, 0.94549, 0.99823),
                                                   (1, 1, 0.20655, 1.0)])
def test_wilson(correct, n, low, high):
    """Bug: the textbook interval p +- 1.96 sqrt(p(1-p)/n), which has width 0 at 0 of 100 and passes 1 at 99."""
    assert evaluation.wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_majority_answer():
    """Bug: a baseline that always answers 0 where another answer is more frequent."""
    problems = [data.Problem("", answer, "", {}) for answer in (0, 7, 7, 0, 7, 3)]
    assert evaluation.majority(problems) == 0.5


def test_table_and_json(script, tmp_path, tiny_file):
    """Bugs: a split that mixes its figures up with another's; JSON that says something else than the table."""
    result = script("eval.py", "--ckpt", tiny_file, tiny_file, "--n", 12, "--max-new-tokens", 24, "--samples", 2, "--json", "scores.json")
    assert result.returncode == 0, result.stderr
    scores = json.load(open(tmp_path / "scores.json"))["checkpoints"]
    assert [s["path"] for s in scores] == [str(tiny_file)] * 2
    for s in scores:
        assert set(s["splits"]) == {"id", "ood"}
        for split in s["splits"].values():
            assert split["n"] == 12 and split["ci95"][0] <= split["accuracy"] <= split["ci95"][1]
            assert abs(sum(split["rollouts"]["histogram"]) - 1) < 1e-9
            assert f"{split['accuracy']:.1%}" in result.stdout
    problems = [p for p, _ in zip(data.generate(ops=data.TINY["ops"], max_value=data.TINY["max_value"], split="test"), range(12))]
    assert scores[0]["splits"]["id"]["majority"] == evaluation.majority(problems)


@pytest.mark.parametrize("arguments, words", [
    (["--ckpt", "nowhere.pt"], ["nowhere.pt"]), (["--ckpt", "cut.pt"], ["cut.pt"]), (["--ckpt", "foreign.pt"], ["foreign.pt"]),
    (["--data", "empty.jsonl"], ["empty.jsonl"]), (["--plot", "x.png"], ["--samples"]), (["--ood", "9", "3"], ["--ops 9 3"]),
    (["--max-new-tokens", "5000"], ["--max-new-tokens", "2048"]), (["--sample", "3"], ["--sample"])])
def test_bad_input_is_one_sentence(script, tmp_path, tiny_file, arguments, words):
    """Bug: a traceback for a missing, truncated or foreign checkpoint, an empty file, a prompt beyond the context."""
    import torch
    (tmp_path / "cut.pt").write_bytes(tiny_file.read_bytes()[:5000])
    torch.save({"model": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "empty.jsonl").write_text("")
    result = script("eval.py", *(() if "--ckpt" in arguments else ("--ckpt", tiny_file)), *arguments)
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr and all(word in last for word in words), result.stderr
