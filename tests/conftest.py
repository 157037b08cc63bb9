"""What several tests share: real CIFAR-10 where it is at hand, and small runs of the two scripts."""
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
from utils.data import load_dataset  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore it, and then so would a run

# A run of some seconds: eight steps on the built-in shapes.
SMALL = (
    "--dataset shapes --train_size 256 --test_size 100 --width 4 --dim 32 --pred_dim 16 --batch_size 32 --no-compile"
).split()


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory):
    """A folder with cifar-10-batches-py: data/ of this checkout, else unpacked from a copy beside it, else skip."""
    if (REPO / "data" / "cifar-10-batches-py").is_dir():
        return str(REPO / "data")
    unpack = REPO.parent / "shared" / "data" / "unpack_cifar10.py"
    if not unpack.exists():
        pytest.skip("needs CIFAR-10 in data/ of the checkout")
    root = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, unpack, root], check=True)
    return str(root)


@pytest.fixture(scope="session")
def cifar(cifar_root):
    return load_dataset("cifar10", cifar_root, torch.device("cpu"))


@pytest.fixture(scope="session")
def shapes():
    return load_dataset("shapes", None, torch.device("cpu"), 1000, 500)


@pytest.fixture
def no_gpu(monkeypatch):
    """Hide the GPU: for what holds bit for bit on the CPU only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


DRAWING = ("plot_views", "write_report", "draw_run")  # takes seconds a run, and has tests of its own


@pytest.fixture
def no_drawing(monkeypatch):
    for module in (pretraining, main_lincls):
        for name in DRAWING:
            monkeypatch.setattr(module, name, lambda *args: None, raising=False)


@pytest.fixture
def run_main(tmp_path, monkeypatch, no_drawing):
    """main.py in this process, without figures, its runs in tmp_path/experiments: run_main("--epochs", 2, ...) -> exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: pretraining.main([*SMALL, *map(str, args)])


@pytest.fixture
def run_lincls(tmp_path, monkeypatch, no_drawing):
    monkeypatch.chdir(tmp_path)
    return lambda *args: main_lincls.main(
        ["--dataset", "shapes", "--train_size", "256", "--test_size", "100", *map(str, args)]
    )


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a finished small run."""
    folder = tmp_path_factory.mktemp("finished")
    assert pretraining.main([*SMALL, "--epochs", "2", "--eval_freq", "1", "--exp_dir", str(folder), "--trial", "small"]) == 0
    return os.path.join(folder, "small")
