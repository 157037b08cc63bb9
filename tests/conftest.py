"""Fixtures of several tests: real CIFAR-10 if it is at hand, and small runs of the scripts in this process."""
import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import main as pretraining  # noqa: E402
import main_lincls  # noqa: E402
from utils import cli, shapes  # noqa: E402
from utils.data import load_dataset  # noqa: E402

# A run of a second: four steps an epoch on the built-in shapes.
SMALL = (
    "--dataset shapes --train_size 128 --test_size 100 --width 4 --dim 32 --pred_dim 16 --batch_size 32 --no-compile"
).split()

CPU_ONLY = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # for processes
shapes.draw_shapes = functools.lru_cache(shapes.draw_shapes)  # half of the time of such a run


def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored, nohup's with HUP
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "slow: takes long; `make test` skips it, `make test-all` does not")


@contextlib.contextmanager
def before_calls(counts, owner, name, act):
    """In the context, act() before each call of owner.name whose number, from 1, is in counts."""
    usual, calls = getattr(owner, name), itertools.count(1)

    def acting(*args, **kwargs):
        if next(calls) in counts:
            act()
        return usual(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, acting)
        yield


def no_room():
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory):
    """A folder with cifar-10-batches-py: data/ of this checkout, else unpacked from a copy beside it, else skip."""
    if (REPO / "data" / "cifar-10-batches-py").is_dir():
        return str(REPO / "data")
    unpack = REPO.parent / "shared" / "data" / "unpack_cifar10.py"
    if not unpack.exists():
        pytest.skip("needs CIFAR-10 in data/")
    root = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, unpack, root], check=True)
    return str(root)


@pytest.fixture(scope="session")
def cifar(cifar_root):
    return load_dataset("cifar10", cifar_root, torch.device("cpu"))


@pytest.fixture(scope="session", name="shapes")
def shapes_data():
    return load_dataset("shapes", None, torch.device("cpu"), train_size=1000, test_size=500)


@pytest.fixture(autouse=True)
def not_quiet(monkeypatch):
    """--quiet of one test is not that of the next in the process."""
    monkeypatch.setattr(cli, "quiet", False)


@pytest.fixture
def no_gpu(monkeypatch):
    """Hide the GPU: for what is exact on the CPU only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    for name in ("cifar.download_and_extract_archive", "stl10.download_and_extract_archive", "svhn.download_url"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", fail)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time of a small run, and have tests of their own."""
    monkeypatch.setattr("utils.plot.plot_views", lambda *args: None)
    monkeypatch.setattr("utils.report.draw_run", lambda *args: None)


@pytest.fixture
def run_main(tmp_path, monkeypatch, no_figures):
    """main.py in this process, its runs in tmp_path/experiments: run_main("--epochs", 2, ...) -> exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", 0)
    return lambda *args: pretraining.main([*SMALL, *map(str, args)])


@pytest.fixture
def run_lincls(tmp_path, monkeypatch, no_figures, finished_run):
    """main_lincls.py in this process, on the backbone of finished_run unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "shapes", "--train_size", "128", "--test_size", "100"]
    backbone = ["--pretrained", os.path.join(finished_run, "backbone.pt")]
    return lambda *args: main_lincls.main([*data, *backbone, *map(str, args)])


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a finished small run, with its figures."""
    folder = tmp_path_factory.mktemp("finished")
    options = "--epochs 2 --eval_freq 1 --untrained --precision fp32 --trial small --exp_dir".split() + [str(folder)]
    assert pretraining.main([*SMALL, *options]) == 0
    return os.path.join(folder, "small")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(main, args, *words): the call exits with 2 and one line on stderr with the words, and writes nothing."""
    monkeypatch.chdir(tmp_path)

    def check(main, args, *words):
        def files():
            return {path for path in tmp_path.rglob("*") if path.name != "experiments" and "cache" not in path.parts}

        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and error.endswith("\n"), error
        assert all(str(word) in error for word in words), error
        assert files() == before

    return check
