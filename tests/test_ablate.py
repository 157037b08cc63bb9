"""ablate.py end to end on small runs, and its table from logs whose figures are known."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import ablate
import children
from conftest import REPO, SMALL
from utils import log, studies
from utils.runs import read_settings

TINY = [*SMALL, "--epochs", "2", "--learning_rate", "0.03"]
FAST = [*TINY, "--eval_freq", "100"]


class Forked(ablate.Running):
    """A run in a process that starts in a moment, without figures."""

    def __init__(self, name, options, folder, threads):
        self.name, self.folder, self.output = name, folder, f"{os.path.dirname(folder)}-{name}.txt"
        pathlib.Path(self.output).unlink(missing_ok=True)
        self.process = Forked.Process(children.start(options, self.output))

    def words(self):
        with open(self.output) as file:
            return "\n".join(line.strip() for line in file if "error:" in line or "warning:" in line)

    class Process:
        def __init__(self, process):
            self.process = process
            self.wait = process.join
            self.kill = process.kill

        def poll(self):
            return self.process.exitcode

        def send_signal(self, number):
            os.kill(self.process.pid, number)

        @property
        def returncode(self):
            return self.process.exitcode


@pytest.fixture
def run_ablate(tmp_path, monkeypatch, no_gpu):
    """ablate.py in this process: run_ablate("predictor", ...) -> exit code; its runs are in tmp_path/ablations."""
    monkeypatch.setattr(ablate, "Running", Forked)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = str(tmp_path / "ablations")
    return folder, lambda *args: ablate.main([*map(str, args), "--exp_dir", folder])


def test_a_study_runs_and_its_table_is_of_its_logs(tmp_path):
    """As it is typed, in processes of its own, two at a time."""
    folder = str(tmp_path / "ablations")
    command = [sys.executable, "ablate.py", "stop_gradient", "--jobs", "2", "--exp_dir", folder, *TINY]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0 and result.stderr == "", result.stderr
    names = ["default-seed0", "no-stop-gradient-seed0"]
    assert sorted(name for name in os.listdir(folder) if "-seed" in name) == names
    default, without = (log.read(os.path.join(folder, name)) for name in names)
    assert [record["epoch"] for record in default] == [0, 1, 2] and [record["epoch"] for record in without] == [1, 2]
    with open(os.path.join(folder, "ablations.md")) as file:
        table = file.read()
    assert table in result.stdout and "**Stop-gradient** (Sec. 4.1, Figure 2)" in table and "**Predictor**" not in table
    line = next(line for line in table.splitlines() if line.startswith("| without |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    last = without[-1]
    numbers = [f"{last['knn200']:.2f}", f"{last['knn200'] - default[-1]['knn200']:.2f}", f"{last['std']:.3f}", f"{last['loss']:.3f}"]
    assert cells[1:] == ["0.1", *(number.replace("-", "−") for number in numbers), "1"]
    settings = [read_settings(os.path.join(folder, name)) for name in names]
    assert [each["stop_gradient"] for each in settings] == [True, False]
    for name in ("stop_gradient.png", "stop_gradient.svg", "default-seed0/report.html"):
        assert os.path.getsize(os.path.join(folder, name)) > 5000


def test_what_is_done_is_left_out_and_other_recipes_are_refused(run_ablate, capsys):
    folder, run = run_ablate
    assert run("similarity", "--seeds", 2, "--jobs", 2, *FAST) == 0
    names = [f"{variant}-seed{seed}" for variant in ("cross-entropy", "default") for seed in (0, 1)]
    assert sorted(name for name in os.listdir(folder) if "-seed" in name) == names
    assert [read_settings(os.path.join(folder, name))["seed"] for name in names] == [0, 1, 0, 1]
    written = [os.stat(os.path.join(folder, name, "checkpoint.pt")).st_mtime_ns for name in names]
    capsys.readouterr()
    assert run("similarity", "--seeds", 2, *FAST) == 0
    assert capsys.readouterr().out.count("done before") == 4
    for other in (["--weight_decay", 0.1], ["--no-stop_gradient"], ["--epochs", 3]):  # also of a variant that is not there yet
        with pytest.raises(SystemExit) as stop:
            run("symmetry", *FAST, *other)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and other[0].lstrip("-") in error and "take another --exp_dir" in error
    assert run("similarity", *FAST, "--save_freq", 5) == 0  # of the process, not of the recipe
    assert written == [os.stat(os.path.join(folder, name, "checkpoint.pt")).st_mtime_ns for name in names]


def test_a_stopped_study_goes_on_exactly(run_ablate, capsys):
    """Ctrl-C in its first run, and the same command again: the logs are those of a study that was not stopped."""
    folder, run = run_ablate
    args = ("symmetry", "--only", "asymmetric", "--seeds", 2, *FAST, "--epochs", 4)
    first = os.path.join(folder, "asymmetric-seed0")

    def interrupt():
        while not ablate.epochs_done(first):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(*args) == 130
    thread.join()
    assert "to go on: python ablate.py symmetry --only asymmetric" in capsys.readouterr().out
    assert ablate.epochs_done(first) < 4 and not os.path.exists(os.path.join(folder, "asymmetric-seed1"))
    assert run(*args) == 0
    resumed = [log.read(os.path.join(folder, f"asymmetric-seed{seed}")) for seed in (0, 1)]
    shutil.rmtree(folder)
    assert run(*args) == 0
    whole = [log.read(os.path.join(folder, f"asymmetric-seed{seed}")) for seed in (0, 1)]
    same = ("epoch", "loss", "std", "lr")
    assert [[[record[key] for key in same] for record in records] for records in whole] == [[[record[key] for key in same] for record in records] for records in resumed]
    assert whole[0][-1]["loss"] != whole[1][-1]["loss"]


def test_a_run_that_diverges_does_not_end_the_study(run_ablate, capsys):
    """It is noted in its folder and in the table, and tried again by the same command."""
    folder, run = run_ablate
    args = ("batch_norm", "--only", "head-bn-none", "default", *FAST, "--learning_rate", "1e30")
    assert run(*args) == 1
    assert capsys.readouterr().err.count("the loss is nan") == 2
    with open(os.path.join(folder, "head-bn-none-seed0", "failed.txt")) as file:
        assert "step 2 of 8: the loss is nan" in file.read()
    with open(os.path.join(folder, "ablations.md")) as file:
        assert "| none | 34.6 | seed 0: epoch 1, step 2 of 8: the loss is nan | –" in file.read()
    assert run(*args) == 1
    assert capsys.readouterr().err.count("the loss is nan") == 2


@pytest.mark.parametrize("args, words", [
    ("nothing", ["'nothing'", "batch_norm"]),
    ("predicter", ["did you mean predictor?"]),
    ("predictor --only blur", ["--only blur", "fixed-predictor"]),
    ("predictor --seed 3", ["--seed is set by ablate.py"]),
    ("predictor --resume=auto", ["--resume is set by ablate.py"]),
    ("predictor --jobs 0", ["--jobs", "at least 1"]),
])
def test_what_cannot_be_run_is_refused(capsys, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ablate.main(args.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words)
    assert not os.listdir(tmp_path)


def test_what_main_refuses_in_the_first_run_ends_the_study_at_once(run_ablate, capsys):
    folder, run = run_ablate
    assert run("all", *TINY, "--jobs", 4, "--widht", 16) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "did you mean --width?" in error and not os.path.exists(folder)


def test_what_main_refuses_in_one_variant_leaves_the_others(run_ablate, capsys):
    folder, run = run_ablate
    assert run("batch_size", "--only", "batch-64", "batch-512", "batch-128", *FAST, "--batch_size", 32, "--jobs", 2) == 2
    output, error = capsys.readouterr()
    assert error.count("\n") == 1 and "batch-512-seed0: main.py: error: --batch_size 512: there are 256 training pictures" in error
    assert sorted(name for name in os.listdir(folder) if "-seed" in name) == ["batch-128-seed0", "batch-64-seed0"]
    assert "batch 32, rate 0.03" in output and "| batch 512 | 68.1 | not run |" in output
    assert len([line for line in output.splitlines() if line.startswith(("| batch 64 | 66.1 |", "| batch 128 | 67.3 |")) and line.endswith("| 1 |")]) == 2


def test_a_time_limit_is_for_the_whole_study(run_ablate, capsys):
    folder, run = run_ablate
    assert run("similarity", *FAST, "--epochs", 1000, "--max_minutes", 0.03) == 0
    assert "to go on: python ablate.py similarity" in capsys.readouterr().out
    assert ablate.epochs_done(os.path.join(folder, "default-seed0")) < 1000 and not os.path.exists(os.path.join(folder, "cross-entropy-seed0"))


# ---------------------------------------------------------------------------------------------------
# The table


def write_run(folder, name, knn, std=0.9, epochs=4, **settings):
    path = folder / name
    path.mkdir(parents=True)
    given = {"arch": "resnet18", "width": 16, "dataset": "cifar10", "data_root": "data", "epochs": 4, "batch_size": 64, "learning_rate": 0.03, "train_size": 5000, "test_size": None}
    config = {"argv": [], "commit": None, "device": "CPU, 1 thread", "versions": {"torch": "2.14.1"}, "settings": {**given, **settings}}
    log.write_json(str(path / "config.json"), config)
    with open(path / "log.jsonl", "w") as file:
        if name.startswith("default"):
            file.write(json.dumps({"epoch": 0, "knn1": 20.0, "knn200": 25.0}) + "\n")
        for epoch in range(1, epochs + 1):
            file.write(json.dumps({"epoch": epoch, "loss": -0.5, "std": std, "knn200": knn - 4 + epoch}) + "\n")


def write_study(folder):
    log.write_json(str(folder / "study.json"), {"epochs": 4, "batch_size": 64, "learning_rate": 0.03, "options": {"weight_decay": "0.1"}})


def test_the_table_in_closed_form(tmp_path):
    """Means, deviations, differences by seed, a collapse, and runs that are missing, unfinished or failed."""
    for seed, knn in ((0, 30.0), (1, 32.0)):
        write_run(tmp_path, f"default-seed{seed}", knn)
        write_run(tmp_path, f"no-predictor-seed{seed}", knn - 5 - seed, std=0.3, predictor="none")
    write_run(tmp_path, "fixed-predictor-seed0", 26.0)
    write_run(tmp_path, "fixed-predictor-seed1", 26.0, epochs=3)
    write_run(tmp_path, "head-bn-all-seed0", 20.0, epochs=1, head_bn="all")
    (tmp_path / "head-bn-all-seed0" / "failed.txt").write_text("epoch 2: the loss is nan")
    (tmp_path / "notes-seed").mkdir()
    write_study(tmp_path)
    files = studies.write_studies(str(tmp_path), str(tmp_path), ("png",))
    assert files == ["ablations.md", "predictor.png", "batch_norm.png"]
    lines = (tmp_path / "ablations.md").read_text().splitlines()
    assert "cifar10, resnet18 of width 16, the first 5,000 training and all test pictures, batch 64, rate 0.03, 4 epochs, --weight_decay 0.1; CPU, 1 thread, torch 2.14.1" in lines[0]
    assert "| learned, rate decayed | 67.7 | 31.00 ± 1.41 | – | 0.900 ± 0.000 | −0.500 ± 0.000 | 2 |" in lines
    assert "| none | 0.1 | 25.50 ± 0.71 | −5.50 ± 0.71 | 0.300 ± 0.000 (collapsed) | −0.500 ± 0.000 | 2 |" in lines
    assert "| fixed at random initialization | 1.5 | 26.00 | −4.00 | 0.900 | −0.500 | 1; seed 1: not finished |" in lines
    assert "| predictor's rate not decayed | 68.1 | not run | – | – | – | – |" in lines
    assert "| all: and the predictor's output | unstable | seed 0: epoch 2: the loss is nan | – | – | – | – |" in lines
    assert "| the network before training | – | 25.00 ± 0.00 | – | – | – | 2 |" in lines


def test_the_three_curves_of_figure_2(tmp_path, monkeypatch):
    seen = []
    usual = studies.curve
    monkeypatch.setattr(studies, "curve", lambda axes, runs, key, *rest: seen.append((key, len(runs))) or usual(axes, runs, key, *rest))
    for seed in (0, 1):
        write_run(tmp_path, f"default-seed{seed}", 30.0)
        write_run(tmp_path, f"no-stop-gradient-seed{seed}", 22.0, std=0.3, stop_gradient=False)
    write_study(tmp_path)
    studies.write_studies(str(tmp_path), str(tmp_path), ("png",))
    assert seen == [(key, 2) for key in ("loss", "std", "knn200") for _ in range(2)]


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    write_study(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path, tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(SystemExit) as stop:
            studies.main([str(folder)])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
