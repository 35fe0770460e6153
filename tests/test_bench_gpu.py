"""bench_gpu.py as far as a CPU can: without this, a change of what it calls would show on the day of the GPU."""
import re

import pytest

import bench_gpu


def test_the_parts_that_a_cpu_can_run():
    """Bugs: flags or functions of grpo.py that moved; gaps of the wrong pair (the trainer's own is 0 in fp32)."""
    cells = [line.split("|")[2:5] for line in bench_gpu.bf16(prompts=2, n=2, new_tokens=12)[2:]]
    gaps = {name.strip(): float(mean) for name, mean, _ in cells}
    assert gaps["trainer - fp32"] == 0 and 0 < gaps["sampler - trainer"] == gaps["sampler - fp32"] < 1e-5
    sampled, scored, trained, whole = map(float, bench_gpu.step(prompts=2, n=2, new_tokens=12, steps=2)[2].split("|")[2:6])
    assert whole == pytest.approx(sampled + scored + trained, abs=0.02) and whole > 0


def test_the_first_command_is_found(monkeypatch, tmp_path):
    """Bugs: the installation run as well; a script that is looked for in the wrong folder."""
    seen = []
    monkeypatch.setattr(bench_gpu, "command", lambda words, *_: seen.append(words) or (60.0, "printed"))
    monkeypatch.setattr(bench_gpu, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text((bench_gpu.RESULTS.parent.parent / "README.md").read_text())
    (tmp_path / "results").mkdir()
    assert "1.0 min" in bench_gpu.main_command(60)[0]
    assert re.findall(r"/(\w+\.py)", seen[0]) == ["sft.py", "grpo.py", "eval.py"] and "pip" not in seen[0]
    assert (tmp_path / "results" / "gpu-main.txt").read_text() == "printed"
