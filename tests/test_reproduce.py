"""reproduce.sh on a few images: its steps, what they publish, and that the same command continues them."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

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

    def run(*args, python=sys.executable, start=subprocess.run, visible=""):
        return start(["bash", tmp_path / "reproduce.sh", *args], cwd=tmp_path.parent, text=True, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE, env={**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": visible})

    return run


@pytest.mark.slow
def test_the_same_command_leads_from_the_data_to_the_released_weights(reproduce, tmp_path, cifar_root):
    """Stopped before the first step; resumed to the end; once more, when only the release is left to do again."""
    pretrain = "--width 16 --train_size 300 --test_size 200 --batch_size 64 --epochs 2"
    linear = "--features cached --train_size 300 --test_size 200"
    weights, runs, logs = tmp_path / "weights", tmp_path / "experiments" / "small", tmp_path / "logs"
    command = ["--gpu", "none", "--name", "small", "--entry", NAME, "--data_root", cifar_root,
               "--pretrain", pretrain, "--linear", linear]
    done = reproduce(*command, "--max_minutes", "0")
    assert done.returncode == 0 and done.stdout.endswith("Stopped after 0 minutes. The same command continues.\n")
    assert not (runs / "seed0-linear").exists() and (runs / "seed0" / "checkpoint.pt").exists()

    done = reproduce(*command)
    assert done.returncode == 0, done.stderr
    pairs = re.findall(r"published +([\d.]+) % +measured +([\d.]+) %", done.stdout)
    assert len(pairs) == 3 and all(published == measured for published, measured in pairs)
    for part, names in (("", ("config.json", "log.jsonl")), ("-linear", ("config.json", "log.jsonl", "results.json"))):
        for name in names:
            assert (logs / f"small-seed0{part}" / name).read_bytes() == (runs / f"seed0{part}" / name).read_bytes()
    last, results = log.read(logs / "small-seed0")[-1], checkpoint.read_json(logs / "small-seed0-linear/results.json")
    assert last["epoch"] == 2 and results["images"] == 200
    assert re.search(rf"\| seed0 \| 2 \|.* {last['knn200']:.2f} \|", done.stdout)  # the table
    assert re.search(rf"\| seed0-linear \|.* {results['test_top1']:.2f} \|", done.stdout)
    about = checkpoint.read_json(weights / f"{NAME}.json")
    assert about["accuracies_before_rounding"]["linear"] == results["test_top1"] > 10
    assert (runs / "loss-plot.png").exists() and (weights / f"{NAME}.pt").stat().st_size == about["bytes"]

    written = {path: path.stat().st_mtime_ns for path in runs.glob("*/*") if path.suffix != ".png"}
    done = reproduce(*command, "--max_minutes", "0")
    assert done.returncode == 0 and done.stdout.startswith("knn1    in fp32"), done.stdout + done.stderr
    assert written == {path: path.stat().st_mtime_ns for path in written}


@pytest.mark.parametrize("args, words", [
    ("--seed 3", "unrecognized argument --seed;"), ("--name small --gpu", "--gpu requires a value"),
    ("--seeds 0", "--seeds"), ("--max_minutes 0.5", "--max_minutes"), ("--entry resnet", "--entry")])
def test_wrong_options_are_one_line(reproduce, tmp_path, args, words):
    done = reproduce(*args.split(), python="/no/python")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and words in done.stderr
    assert not (tmp_path / "experiments").exists()


STAND_IN = r"""#!/bin/bash
# In place of Python: logs how it is called; main.py waits for a signal if it is to, and exits with a code.
echo "$CUDA_VISIBLE_DEVICES: $* " >> {folder}/began
[[ "$*" =~ --trial\ (seed[^ ]*) ]] && run=experiments/paper/${{BASH_REMATCH[1]}} && mkdir -p "$run"
if [ "$1 {wait}" = "main.py yes" ]; then
    trap 'echo saved >> {folder}/saved; exit {code}' TERM INT
    touch {folder}/waiting
    while true; do sleep 0.02; done
fi
[ "$1" = export.py ] || [ "$1" = -m ] || touch "$run"/{{config.json,log.jsonl,results.json}}
"""


@pytest.fixture
def stand_in(tmp_path):
    def write(wait="no", code=0):
        (tmp_path / "python").write_text(STAND_IN.format(folder=tmp_path, wait=wait, code=code))
        (tmp_path / "python").chmod(0o755)
        return str(tmp_path / "python")
    return write


@pytest.mark.parametrize("gpu, option, visible", [("none", " --gpu none", "7"), ("1", " --gpu 1 ", "7")])
def test_the_seeds_run_one_after_another(reproduce, stand_in, tmp_path, gpu, option, visible):
    done = reproduce("--seeds", "2", "--gpu", gpu, python=stand_in(), visible="7")
    assert done.returncode == 0 and not done.stderr, done.stderr
    began = (tmp_path / "began").read_text().splitlines()
    assert [line.split()[1] for line in began] == 2 * ["main.py", "main_lincls.py"] + 2 * ["export.py"] + 2 * ["-m"]
    assert all(line.startswith(f"{visible}: ") and option in line for line in began[:6])
    logs = [f"paper-seed{seed}{end}" for seed in range(2) for end in ("", "-linear")]
    assert sorted(os.listdir(tmp_path / "logs")) == logs


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_reaches_the_command_and_ends_the_script(reproduce, stand_in, tmp_path, number, code):
    """Also if the command has just finished, with code 0."""
    process = reproduce(python=stand_in("yes", code), start=subprocess.Popen)
    while not (tmp_path / "waiting").exists():
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == 128 + number and (tmp_path / "saved").read_text() == "saved\n"
    assert len((tmp_path / "began").read_text().splitlines()) == 1


def test_a_command_that_fails_ends_it(reproduce, tmp_path):
    done = reproduce("--gpu", "none", python="false")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "") and not (tmp_path / "logs").exists()


def test_the_help_lists_every_option(reproduce):
    listed = re.findall(r"^(--\w+) ", reproduce("--help").stdout, re.MULTILINE)
    assert len(listed) == 8 and f"    {' | '.join(listed)}) ;;\n" in (REPO / "reproduce.sh").read_text()
