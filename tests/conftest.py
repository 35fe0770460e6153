"""Shared by the tests: the scripts' folder on the path, a small random policy, and a way to run a script as a user does."""
import importlib, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def tiny():
    """A factory of equal random policies, small enough to train in a test."""
    import sft
    return lambda seed=0: sft.tiny_policy(width=32, layers=2, heads=2, seed=seed)


@pytest.fixture(scope="session")
def tiny_file(tiny, tmp_path_factory):
    import sample
    path = tmp_path_factory.mktemp("policy") / "tiny.pt"
    sample.save_policy(path, tiny())
    return path


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script("eval.py", "--n", 3) runs the command in an empty folder -> returncode, stdout, stderr.

    In this process, because starting Python and PyTorch takes seconds; `process` below is the real thing."""
    def run(name, *arguments):
        import data
        module, code = importlib.import_module(name.removesuffix(".py")), 0
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        try:
            data.run_cli(module.main)
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)
    return run


@pytest.fixture
def process(tmp_path):
    """process("grpo.py", "--n", 3) starts the command as a user does -> a subprocess.Popen in an empty folder."""
    def start(name, *arguments):
        return subprocess.Popen([sys.executable, ROOT / name, *map(str, arguments)], cwd=tmp_path, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return start
