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

    def run(*args, python=sys.executable, start=subprocess.run):
        return start(["bash", tmp_path / "reproduce.sh", *args], cwd=tmp_path.parent, text=True, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE, env={**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""})

    return run


@pytest.mark.slow
def test_the_same_command_leads_from_the_data_to_the_released_weights(reproduce, tmp_path, cifar_root):
    """Stopped before the first step; resumed to the end; once more, when only the release is left to do again."""
    pretrain = "--width 16 --train_size 300 --test_size 200 --batch_size 64 --epochs 2"
    linear = "--features cached --train_size 300 --test_size 200"
    weights, runs, logs = tmp_path / "released", tmp_path / "experiments" / "small", tmp_path / "logs"
    command = ["--gpu=none", "--name", "small", "--weights", str(weights), "--entry", NAME,
               "--data_root", cifar_root, "--pretrain", pretrain, "--linear", linear]
    done = reproduce(*command, "--max_minutes", "0")
    assert done.returncode == 0 and done.stdout.endswith("Stopped after 0 minutes. The same command continues.\n")
    assert not (runs / "seed0-linear").exists() and not (runs / "seed0" / "log.jsonl").read_text()

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
    assert done.returncode == 0 and done.stdout.startswith(f"{weights}/{NAME}.pt: knn1 "), done.stdout + done.stderr
    assert written == {path: path.stat().st_mtime_ns for path in written}


@pytest.mark.parametrize("args, words", [
    ("--seed 3", "unrecognized argument --seed;"), ("--seeds", "--seeds requires a value"),
    ("--name small --gpu", "--gpu requires a value"), ("--seeds 0", "--seeds"), ("--seeds two", "--seeds"),
    ("--max_minutes soon", "--max_minutes"), ("--max_minutes 0.5", "--max_minutes"), ("--name a/b", "--name"),
    ("--gpu 0,", "--gpu"),
])
def test_wrong_options_are_one_line(reproduce, tmp_path, args, words):
    done = reproduce(*args.split(), python="/no/python")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and words in done.stderr
    assert not (tmp_path / "experiments").exists()


STAND_IN = r"""#!/bin/bash
# In place of Python: two GPUs; the training of a seed waits for another one on the other GPU.
case "$*" in
-c*) echo 0,1 ;;
main.py*)
    trap 'echo saved >> {folder}/saved; exit 143' TERM
    [[ "$*" =~ --gpu\ (.)\ .*--seed\ (.)\ .*--quiet ]] && gpu=${{BASH_REMATCH[1]}} seed=${{BASH_REMATCH[2]}}
    echo "$seed $gpu" >> {folder}/began
    run=experiments/paper/seed$seed
    mkdir -p "$run" && touch "$run"/{{config.json,log.jsonl}}
    while [ {wait} -gt "$(wc -l < {folder}/began)" ]; do sleep 0.02; done ;;
main_lincls.py*)
    [[ "$*" =~ --gpu\ .\ .*trial\ (seed.-linear) ]] && run=experiments/paper/${{BASH_REMATCH[1]}}
    mkdir -p "$run" && touch "$run"/{{config.json,log.jsonl,results.json}} ;;
esac
"""


def test_seeds_train_side_by_side_one_on_each_gpu(reproduce, tmp_path):
    (tmp_path / "python").write_text(STAND_IN.format(folder=tmp_path, wait=2))
    (tmp_path / "python").chmod(0o755)
    done = reproduce("--seeds", "3", python=str(tmp_path / "python"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    began = (tmp_path / "began").read_text().splitlines()
    assert sorted(began[:2]) == ["0 0", "1 1"] and began[2:] == ["2 0"]
    logs = [f"paper-seed{seed}{end}" for seed in range(3) for end in ("", "-linear")]
    assert sorted(os.listdir(tmp_path / "logs")) == sorted(logs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_commands_on_all_gpus(reproduce, tmp_path, number):
    (tmp_path / "python").write_text(STAND_IN.format(folder=tmp_path, wait=9).replace("TERM", "TERM INT"))
    (tmp_path / "python").chmod(0o755)
    process = reproduce("--seeds", "3", "--gpu", "1,0", python=str(tmp_path / "python"), start=subprocess.Popen)
    while not (tmp_path / "began").exists() or len((tmp_path / "began").read_text().splitlines()) < 2:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == 128 + number and (tmp_path / "saved").read_text() == "saved\nsaved\n"
    assert sorted((tmp_path / "began").read_text().splitlines()) == ["0 1", "1 0"]


def test_a_signal_while_the_first_seed_starts_keeps_the_others_from_starting(reproduce, tmp_path):
    stand_in = STAND_IN.format(folder=tmp_path, wait=9).replace("config.json,", "", 1)
    (tmp_path / "python").write_text(stand_in)
    (tmp_path / "python").chmod(0o755)
    process = reproduce("--seeds", "3", python=str(tmp_path / "python"), start=subprocess.Popen)
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert (tmp_path / "began").read_text() == "0 0\n" and (tmp_path / "saved").read_text() == "saved\n"


def test_a_command_that_fails_ends_it(reproduce, tmp_path):
    done = reproduce("--gpu", "none", python="false")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "") and not (tmp_path / "logs").exists()


def test_the_help_lists_every_option(reproduce):
    options = re.findall(r"^    (--\w+)\)", (REPO / "reproduce.sh").read_text(), re.MULTILINE)
    text = reproduce("--help").stdout
    assert len(options) == 9 and all(f"{option} " in text for option in options)
