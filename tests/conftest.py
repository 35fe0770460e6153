"""Shared by the tests: the scripts' folder on the path, a small random policy, and a way to run a script as a user does."""
import importlib, os, subprocess, sys, threading
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


BESIDE = ("course", "test_logprob.py", "test_influence.py", "test_sample.py", "test_handover.py")  # about half of the time


def pytest_configure(config):
    """Where the whole suite is run on two cores or more, a second process takes the tests in BESIDE. Each has half of the
    cores: threads that share one wait for each other."""
    whole = config.args_source == pytest.Config.ArgsSource.INVOCATION_DIR and "BRIDGE_BESIDE" not in os.environ
    config.beside = None
    if whole and (os.cpu_count() or 1) > 1 and not config.option.collectonly:
        os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() // 2)
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, *(ROOT / "tests" / name for name in BESIDE)]
        config.beside = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                         env=os.environ | {"BRIDGE_BESIDE": "1"})
        config.beside.text = []
        config.beside.reader = threading.Thread(target=lambda: config.beside.text.append(config.beside.stdout.read()))
        config.beside.reader.start()


def pytest_ignore_collect(collection_path, config):
    return True if config.beside and collection_path.name in BESIDE else None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    """The second process's verdict counts; where this one was interrupted, it ends too."""
    if beside := session.config.beside:
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            beside.terminate()
        if beside.wait() not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        beside.reader.join()


def pytest_terminal_summary(terminalreporter, config):
    if config.beside:
        terminalreporter.section(f"in the second process: {', '.join(BESIDE)}")
        terminalreporter.write("".join(config.beside.text))


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
