"""ablate.py: its table from logs with known figures, and small studies as they are typed."""
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

import ablate
from conftest import REPO, SMALL
from utils import checkpoint, log

TINY = [*SMALL, "--epochs", "2", "--learning_rate", "0.03"]


def write_run(folder, trial, knn, std=0.9, epochs=2, **settings):
    """A run whose kNN rises to `knn` in its two epochs, or that ends before."""
    path = folder / trial
    path.mkdir()
    default = {"arch": "resnet18", "dataset": "cifar10", "data_root": "data", "batch_size": 64, "head_bn": "default"}
    checkpoint.write_json(path / "config.json", {"settings": {**default, "epochs": 2, **settings}})
    log.append(path, [{"epoch": i, "loss": -i / 4, "std": std, "knn200": knn - 2 + i} for i in range(1, epochs + 1)])


def test_the_table_in_closed_form(tmp_path, capsys, monkeypatch):
    """Means and differences by seed with their std, a collapse, and a run that is not finished."""
    curves, curve = [], ablate.curve
    monkeypatch.setattr(ablate, "curve", lambda axes, runs, key, **look: (
        curves.append((key, len(runs))), curve(axes, runs, key, **look)))
    for seed, knn in enumerate((30.0, 32.0)):
        write_run(tmp_path, f"default-seed{seed}", knn)
        write_run(tmp_path, f"no-predictor-seed{seed}", knn - 5 - seed, std=0.3)
    write_run(tmp_path, "fixed-predictor-seed1", 26.0, std=0.4)
    write_run(tmp_path, "fixed-predictor-seed0", 26.0, epochs=1)
    write_run(tmp_path, "head-bn-all-seed0", 20.0, epochs=1, head_bn="all")
    write_run(tmp_path, "head-bn-none-seed0", 20.0, std=0.3, head_bn="none")
    assert ablate.main(["predictor", "batch_norm", "similarity", "--table", "--exp_dir", str(tmp_path)]) == 0
    lines, (output, error) = (tmp_path / "ablations.md").read_text().splitlines(), capsys.readouterr()
    assert output.split("\n")[:-1] == [*lines, ""]
    assert error == "".join(f"warning: {name}-seed0: not finished\n" for name in ("fixed-predictor", "head-bn-all"))
    assert [line for line in lines if line and not line.startswith(("| variant |", "| --- |"))] == [
        "**predictor**",
        "| default | 67.7 | 31.00 ± 1.41 | – | 0.900 ± 0.000 | -0.500 ± 0.000 | 2 |",
        "| no-predictor | 0.1 | 25.50 ± 0.71 | -5.50 ± 0.71 | 0.300 ± 0.000 (collapsed) | -0.500 ± 0.000 | 2 |",
        "| fixed-predictor | 1.5 | 26.00 | -6.00 | 0.400 | -0.500 | 1 |",
        "**batch_norm**",
        "| head-bn-none | 34.6 | 20.00 | -10.00 | 0.300 | -0.500 | 1 |",  # collapsed below 0.1
        "| default | 68.1 | 31.00 ± 1.41 | – | 0.900 ± 0.000 | -0.500 ± 0.000 | 2 |"]
    assert curves[:3] == [("loss", 2), ("loss", 2), ("loss", 1)] and curves[-1] == ("knn200", 2) and len(curves) == 15
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["batch_norm.png", "predictor.png"]


@pytest.mark.parametrize("args, words", [
    ("predicter", "did you mean predictor?"), ("predictor --only blur", "--only blur: choose from default, "),
    ("predictor --seeds 0", "--seeds"), ("predictor --table --exp_dir none", "none"),
])
def test_what_cannot_be_run_is_refused(refused, args, words):
    refused(ablate.main, args.split(), words)


def start(folder, *args):
    command = [sys.executable, "-u", "ablate.py", "stop_gradient", "--exp_dir", str(folder), *args]
    return subprocess.Popen(command, cwd=REPO, text=True, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_a_refusal_of_main_ends_the_study(tmp_path):
    process = start(tmp_path / "runs", *TINY, "--widht", "8")
    error = process.communicate()[1]
    assert process.returncode == 2 and error.count("\n") == 1 and "did you mean --width?" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_study_runs_once_and_its_table_is_of_its_logs(tmp_path):
    outputs, written = [], []
    for _ in range(2):
        process = start(tmp_path, *TINY)
        output, error = process.communicate()
        assert process.returncode == 0 and error == "", error
        outputs.append(output[output.index("**stop_gradient**"):])
        written.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint.pt")})
    assert outputs[0] == outputs[1] and written[0] == written[1] and len(written[0]) == 2
    default, without = (log.read(tmp_path / f"{name}-seed0") for name in ("default", "no-stop-gradient"))
    assert [record["epoch"] for record in default] == [0, 1, 2] and [record["epoch"] for record in without] == [1, 2]
    last, difference = without[-1], without[-1]["knn200"] - default[-1]["knn200"]
    numbers = f"{last['knn200']:.2f} | {difference:.2f} | {last['std']:.3f} | {last['loss']:.3f} | 1 |"
    assert f"| no-stop-gradient | 0.1 | {numbers}\n" in outputs[0]
    settings = checkpoint.read_json(tmp_path / "no-stop-gradient-seed0" / "config.json")["settings"]
    assert settings["stop_gradient"] is False and settings["seed"] == 0 and settings["learning_rate"] == 0.03


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["the start of main.py", "its first epoch"])
def test_ctrl_c_stops_main_and_the_command_that_is_printed_resumes_it(tmp_path, moment):
    """As from a terminal: the signal goes to the process group, and main.py gets it once."""
    process = start(tmp_path, *TINY, "--epochs", "6", "--eval_freq", "9")
    assert process.stdout.readline().startswith("default-seed0:")
    first = tmp_path / "default-seed0" / "log.jsonl"
    time.sleep(0.5)
    while moment == "its first epoch" and not (first.exists() and first.read_text().count("\n") > 1):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, error = process.communicate()
    assert process.returncode == 130, (output, error)
    assert not list(tmp_path.glob("no-stop-gradient*")) and ("Interrupted in epoch" in output) == first.exists()
    command = shlex.split(output.splitlines()[-1].removeprefix("Resume with: python "))
    subprocess.run([sys.executable, *command], cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    assert [record["epoch"] for record in log.read(first.parent)] == list(range(7))
    assert log.read(tmp_path / "no-stop-gradient-seed0")[-1]["epoch"] == 6
