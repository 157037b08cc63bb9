"""reproduce.sh: the whole of it on a small run, and how it runs its commands, with a stand-in for the interpreter."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import simsiam
from conftest import REPO
from utils import checkpoint, log
from utils.augment import normalize
from utils.data import load_dataset

NAME = "simsiam_resnet18_w16_cifar10"
SCRIPTS = ("reproduce.sh", "main.py", "main_lincls.py", "export.py", "hubconf.py", "README.md")


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository without released weights and figures."""
    for name in SCRIPTS:
        shutil.copy(REPO / name, tmp_path)
    for name in ("simsiam", "utils", "logs"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def dataset(request):
    """The options for real CIFAR-10 where it is at hand, else for the built-in shapes."""
    try:
        return ["--dataset", "cifar10"], request.getfixturevalue("cifar_root")
    except pytest.skip.Exception:
        return ["--dataset", "shapes"], "none"


def reproduce(folder, *args, python=sys.executable):
    environment = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        ["bash", f"{folder.name}/reproduce.sh", *map(str, args)], cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def outcome(process, seconds=240):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------
# A rehearsal


def test_from_the_data_to_the_table(copy, dataset):
    """A run that a signal stops, and the same command again: the published logs, weights, figures and tables are the run's."""
    which, root = dataset
    size = ["--train_size", "256", "--test_size", "200"]
    pretrain = " ".join([*which, *size, *"--width 16 --dim 64 --pred_dim 16 --batch_size 32 --epochs 3 --eval_freq 3".split()])
    linear = " ".join([*which, *size, *"--features cached --epochs 20".split()])
    command = [copy, "--gpu", "none", "--name", "small", "--weights", NAME, "--data_root", root, "--pretrain", pretrain, "--linear", linear, "--publish"]
    runs = copy / "experiments" / "small"
    before = (copy / "README.md").read_text()

    first = reproduce(*command)
    wait_for(lambda: (runs / "seed0" / "log.jsonl").exists() and (runs / "seed0" / "log.jsonl").read_text())
    first.terminate()
    code, out, err = outcome(first)
    assert code == 128 + signal.SIGTERM and "stopped in epoch" in out and "main_lincls.py" not in out, (out, err)
    assert checkpoint.load(str(runs / "seed0" / "checkpoint.pt"))["epoch"] in (1, 2)
    assert not (copy / "weights").exists() and (copy / "README.md").read_text() == before

    code, out, err = outcome(reproduce(*command))
    assert code == 0, (out, err)
    checks = re.findall(r"said +([\d.]+) % +measured +([\d.]+) %", out)
    assert "by torch.hub" in out and len(checks) == 4 and all(float(a) == float(b) for a, b in checks)

    for part, names in (("", ("config.json", "log.jsonl")), ("-linear", ("config.json", "log.jsonl", "results.json"))):  # the logs
        for name in names:
            assert (copy / "logs" / f"small-seed0{part}" / name).read_bytes() == (runs / f"seed0{part}" / name).read_bytes()
    assert [record["epoch"] for record in log.read(str(copy / "logs" / "small-seed0"))] == [1, 2, 3]
    for folder in (copy / "imgs", runs):  # the figures
        for name in ("loss-plot", "top1-acc"):
            assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    knn = log.read(str(runs / "seed0"))[-1]["knn200"]  # the table
    top1 = json.loads((runs / "seed0-linear" / "results.json").read_text())["test_top1"]
    row = next(line for line in out.splitlines() if line.startswith("| ResNet-18"))
    assert "256 training pictures, 200 test pictures, width 16, batch 32" in row and f"| 3 | 1 | {log.read(str(runs / 'seed0'))[-1]['knn1']:.2f} | {knn:.2f} | {top1:.2f} (" in row

    path, said = copy / "weights" / f"{NAME}.pt", json.loads((copy / "weights" / f"{NAME}.json").read_text())  # the weights
    assert hashlib.sha256(path.read_bytes()).hexdigest() == said["sha256"]
    data = load_dataset(which[1], root, torch.device("cpu"), 256, 200)
    classifier = torch.load(copy / "weights" / f"{NAME}-linear.pt", weights_only=True)
    with torch.no_grad():
        logits = torch.nn.functional.linear(simsiam.load_backbone(path, verbose=False)(normalize(data.test_images)), classifier["weight"], classifier["bias"])
    measured = 100 * (logits.argmax(dim=1) == data.test_labels).double().mean().item()
    assert abs(said["accuracies"]["linear_seed0"] - measured) <= 0.5 and abs(said["accuracies_float32"]["linear_seed0"] - top1) <= 0.5  # a picture of 200

    after = (copy / "README.md").read_text()
    assert f"| `{NAME}` | ResNet-18" in after and f"| {said['accuracies']['knn200']:.2f} |" in after

    def prose(text):
        return re.sub(r"<!-- (results|weights).*?<!-- end of", "", text, flags=re.DOTALL)

    assert prose(after) == prose(before)


# ---------------------------------------------------------------------------------------------------
# The commands, by a stand-in for the interpreter


STAND_IN = r"""#!/usr/bin/env bash
trap 'echo "$1 INT" >> calls; exit 130' INT
trap 'echo "$1 TERM" >> calls; exit 143' TERM
case "$*" in "-c "*) exit "$NO_GPU" ;; esac
echo "$*" >> calls
about=experiments/paper/weights/simsiam_resnet18_cifar10.json
[ -e "$about" ] || { mkdir -p experiments/paper/weights; echo released > "$about"; touch -d "1 minute ago" "$about"; }
case "$*" in *"--trial seed"*) folder=experiments/paper/$(sed 's/.*--trial \([a-z0-9-]*\).*/\1/' <<< "$*") && mkdir -p "$folder" ;; esac
case "$*" in *"$FAIL"*) echo "no luck" >&2; exit 3 ;; esac
case "$*" in *"$SLOW"*) touch began; for ((i = 0; i < ${TENTHS:-300}; i++)); do sleep 0.1; done ;; esac
case "$*" in "main.py"*) touch "$folder/backbone.pt" ;; *"--resume"*) touch "$folder/results.json" ;; esac
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    shutil.copy(REPO / "reproduce.sh", tmp_path)
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    monkeypatch.setenv("FAIL", "nothing fails")
    monkeypatch.setenv("SLOW", "nothing is slow")
    monkeypatch.setenv("NO_GPU", "0")

    def start(*args):
        return reproduce(tmp_path, *args, python=python)

    start.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    start.folder = tmp_path
    return start


def test_the_commands_and_their_order(stand_in):
    code, out, err = outcome(stand_in("--seeds", 2, "--data_root", "somewhere", "--pretrain", "--blur 0.5", "--linear", "--lr 3"))
    assert (code, err) == (0, "")
    weights = "experiments/paper/weights"
    assert stand_in.calls() == [
        *(line for seed in (0, 1) for line in (
            f"main.py --data_root somewhere --gpu 0 --blur 0.5 --seed {seed} --exp_dir experiments/paper --trial seed{seed} --resume auto",
            f"main_lincls.py --gpu 0 --lr 3 --pretrained experiments/paper/seed{seed}/backbone.pt --exp_dir experiments/paper --trial seed{seed}-linear --resume auto somewhere",
        )),
        f"export.py release experiments/paper/seed0 --linear experiments/paper/seed0-linear --name simsiam_resnet18_cifar10 --weights {weights} --data_root somewhere --gpu 0",
        f"main_lincls.py --gpu 0 --lr 3 --evaluate {weights}/simsiam_resnet18_cifar10-linear.pt --pretrained {weights}/simsiam_resnet18_cifar10.pt --exp_dir experiments/paper --trial released somewhere",
        f"export.py check simsiam_resnet18_cifar10 --weights {weights} --evaluation experiments/paper/released --data_root somewhere --gpu 0",
        "-m utils.results experiments/paper/seed0 experiments/paper/seed1 --figures experiments/paper",
    ]
    assert all(f"$ {stand_in.folder}/python {call}" in out for call in stand_in.calls())
    first = stand_in.calls()
    code, out, err = outcome(stand_in("--data_root=somewhere", "--pretrain=--blur 0.4", "--linear=--lr 3"))
    assert code == 2 and 'was begun with --pretrain and --linear "--blur 0.5 | --lr 3"' in err and err.count("\n") == 1 and stand_in.calls() == first
    code, out, err = outcome(stand_in("--seeds=3", "--data_root=somewhere", "--pretrain=--blur 0.5", "--linear=--lr 3"))
    assert code == 0 and "seed0: done before" in out and "seed1: done before" in out
    assert [call.split()[0] for call in stand_in.calls()[len(first):]] == ["main.py", "main_lincls.py", "export.py", "-m"]  # the third seed, release, results
    assert stand_in.calls()[len(first)] == first[0].replace("seed 0", "seed 2").replace("seed0", "seed2")
    (stand_in.folder / "experiments" / "paper" / "seed1" / "backbone.pt").touch()  # made again: the evaluation is of another one, which is for main_lincls.py to see
    count = len(stand_in.calls())
    assert outcome(stand_in("--seeds=3", "--data_root=somewhere", "--pretrain=--blur 0.5", "--linear=--lr 3"))[0] == 0
    assert stand_in.calls()[count:count + 2] == first[2:4]


def test_a_release_that_was_checked_is_not_checked_again(stand_in):
    for checks in (1, 1):
        assert outcome(stand_in())[0] == 0
        assert sum("export.py check" in call for call in stand_in.calls()) == sum("--evaluate" in call for call in stand_in.calls()) == checks
    assert sum("export.py release" in call for call in stand_in.calls()) == 2
    (stand_in.folder / "experiments/paper/weights/simsiam_resnet18_cifar10.json").touch()  # released again
    assert outcome(stand_in())[0] == 0 and sum("export.py check" in call for call in stand_in.calls()) == 2


@pytest.mark.parametrize("fail", ["--seed 1", "seed0-linear", "check"])
def test_a_command_that_fails_ends_it(stand_in, monkeypatch, fail):
    monkeypatch.setenv("FAIL", fail)
    code, _, err = outcome(stand_in("--seeds", 2))
    assert code == 3 and err == "no luck\n" and fail in stand_in.calls()[-1]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_command_once(stand_in, monkeypatch, number, code):
    monkeypatch.setenv("SLOW", "seed0-linear")
    process = stand_in()
    wait_for((stand_in.folder / "began").exists)
    process.send_signal(number)
    assert outcome(process)[0] == code
    assert stand_in.calls()[-1] == f"main_lincls.py {number.name.removeprefix('SIG')}" and len(stand_in.calls()) == 3


def test_slices_give_each_command_what_is_left(stand_in, monkeypatch):
    monkeypatch.setenv("SLOW", "main.py")
    monkeypatch.setenv("TENTHS", "22")
    code, _, _ = outcome(stand_in("--max_minutes", 50))
    assert code == 0
    left = [float(call.split("--max_minutes ")[1].split()[0]) for call in stand_in.calls() if "--max_minutes" in call]
    assert len(left) == 2 and 49 < left[1] <= left[0] - 1.9 / 60 and left[0] <= 50


@pytest.mark.parametrize("minutes, calls", [("0", 0), (".03", 1)])
def test_a_slice_that_is_over_ends_it(stand_in, monkeypatch, minutes, calls):
    monkeypatch.setenv("SLOW", "main.py")
    monkeypatch.setenv("TENTHS", "22")
    code, out, _ = outcome(stand_in("--max_minutes", minutes))
    assert code == 0 and f"stopped after {minutes} minutes; the same command goes on" in out
    assert calls == (len(stand_in.calls()) if calls else (stand_in.folder / "calls").exists())


@pytest.mark.parametrize("path", ["weights/simsiam_resnet18_cifar10.json", "logs/paper-seed2/log.jsonl", "logs/paper-seed0-linear/log.jsonl"])
def test_what_was_published_of_another_run_is_not_replaced(stand_in, path):
    """And what is of this run may be published again."""
    published = stand_in.folder / path
    own = stand_in.folder / "experiments" / "paper" / path.replace("logs/paper-", "")
    for file in (published, own):
        file.parent.mkdir(parents=True)
        file.write_text("a run\n")
    own.write_text("another run\n")
    for _ in range(2):
        code, _, err = outcome(stand_in("--publish"))
        assert code == 2 and f"{path} is of another run, which --publish does not replace" in err and err.count("\n") == 1
        own.unlink(missing_ok=True)
    assert not (stand_in.folder / "calls").exists() and published.read_text() == "a run\n"
    own.write_text("a run\n")
    code, _, err = outcome(stand_in("--publish"))
    assert "is of another run" not in err and len(stand_in.calls()) == 6  # the stand-in leaves no files to be copied


def test_without_a_gpu_it_says_so_at_once(stand_in, monkeypatch):
    monkeypatch.setenv("NO_GPU", "1")
    code, out, err = outcome(stand_in())
    assert code == 2 and out == "" and "--gpu none is for the CPU" in err and err.count("\n") == 1 and not (stand_in.folder / "calls").exists()
    assert outcome(stand_in("--gpu", "none"))[0] == 0 and not any("--gpu" in call for call in stand_in.calls())


@pytest.mark.parametrize("args, words", [
    ("--seed 3", "unrecognized argument --seed"), ("--seeds", "--seeds needs a value"), ("--seeds 0", "from 1 to 999"), ("--seeds two", "--seeds two"),
    ("--max_minutes soon", "--max_minutes soon"), ("--gpu cpu", "--gpu cpu"), ("--name a/b", "a/b"), ("--name ..", ".."), ("--weights -x", "-x"),
    ("--pretrain=--width=16", "--weights"), ("--pretrain=--max_minutes=3", "--max_minutes is set"), ("--linear=--seed=3", "--seed is set"),
])
def test_wrong_options_are_one_line(stand_in, args, words):
    code, out, err = outcome(stand_in(*args.split()))
    assert code == 2 and out == "" and words in err and err.count("\n") == 1 and not (stand_in.folder / "calls").exists()


def test_the_help_lists_every_option(stand_in):
    code, out, _ = outcome(stand_in("--help"))
    options = set(re.findall(r"^    (--\w+)\)", (REPO / "reproduce.sh").read_text(), re.MULTILINE))
    assert code == 0 and options == set(re.findall(r"^(--\w+)", out, re.MULTILINE)) and len(options) == 9
