"""reproduce.sh on a few images: each step once, published where it says, and resumed by the same command."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import REPO
from utils import checkpoint, log

NAME = "simsiam_resnet18_w16_cifar10"


@pytest.fixture
def reproduce(tmp_path):
    """reproduce.sh of a copy of this repository, on the CPU: reproduce(*args) -> the finished process."""
    for name in ("reproduce.sh", "main.py", "main_lincls.py", "export.py", "hubconf.py"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("simsiam", "utils"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*args, python=sys.executable):
        return subprocess.run(["bash", tmp_path / "reproduce.sh", *args], cwd=tmp_path.parent, capture_output=True,
                              text=True, env={**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""})

    return run


@pytest.mark.slow
def test_from_the_data_to_the_released_weights(reproduce, tmp_path, cifar_root):
    """Stopped before the first step, in the middle, and not at all, by the same command; then nothing is left to do."""
    pretrain = "--width 16 --train_size 300 --test_size 200 --batch_size 64 --epochs 2"
    command = ["--gpu", "none", "--data_root", cifar_root, "--name", "small", "--entry", NAME, "--pretrain", pretrain,
               "--linear", "--features cached --train_size 300 --test_size 200", "--weights", str(tmp_path / "released")]
    runs, logs = tmp_path / "experiments" / "small", tmp_path / "logs"
    stopped = reproduce(*command, "--max_minutes", "0")
    assert stopped.returncode == 0 and stopped.stdout == "Stopped after 0 minutes. The same command continues.\n"
    assert not runs.exists()
