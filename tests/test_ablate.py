"""ablate.py: its table from logs with known figures, and small studies as they are typed."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import ablate
import main as pretraining
from conftest import REPO, SMALL
from utils import checkpoint, cli, log

CPU_ONLY = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def write_run(folder, trial, knn, std=0.9, epochs=2, **settings):
    """A run whose kNN rises to `knn` in its two epochs, or that ends before."""
    path = folder / trial
    path.mkdir()
    settings = {"epochs": 2, "batch_size": 64} | settings
    checkpoint.write_json(path / "config.json", {"settings": vars(pretraining.make_parser().parse_args([])) | settings})
    records = [{"epoch": i, "loss": -i / 4, "std": std, "knn200": knn - 2 + i} for i in range(1, epochs + 1)]
    (path / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_the_table_in_closed_form(tmp_path, capsys):
    """Means and differences by seed with their std, a collapse, and runs that are not finished or of no variant."""
    for seed, knn in enumerate((30.0, 32.0)):
        write_run(tmp_path, f"default-seed{seed}", knn)
        write_run(tmp_path, f"no-predictor-seed{seed}", knn - 5 - seed, std=0.3)
    write_run(tmp_path, "fixed-predictor-seed1", 26.0, std=0.4)
    write_run(tmp_path, "fixed-predictor-seed0", 26.0, epochs=1)
    write_run(tmp_path, "head-bn-all-seed0", 20.0, epochs=1, head_bn="all")
    write_run(tmp_path, "head-bn-none-seed2", 20.0, std=0.3, head_bn="none")
    write_run(tmp_path, "default-seed0-linear", 60.0)
    assert ablate.main(["predictor", "batch_norm", "similarity", "--table", "--exp_dir", str(tmp_path)]) == 0
    lines, (output, error) = (tmp_path / "ablations.md").read_text().splitlines(), capsys.readouterr()
    assert output.split("\n")[:-1] == [*lines, ""]
    unfinished = (tmp_path / f"{name}-seed0" for name in ("fixed-predictor", "head-bn-all"))
    assert error == "".join(f"warning: {path}: not finished\n" for path in unfinished)
    assert [line for line in lines if line and not line.startswith(("| variant |", "| --- |"))] == [
        "**predictor**",
        "| default | 67.7 | 31.00 ± 1.41 | – | 0.900 ± 0.000 | -0.500 ± 0.000 | 2 |",
        "| no-predictor | 0.1 | 25.50 ± 0.71 | -5.50 ± 0.71 | 0.300 ± 0.000 (collapsed) | -0.500 ± 0.000 | 2 |",
        "| fixed-predictor | 1.5 | 26.00 | -6.00 | 0.400 | -0.500 | 1 |",
        "**batch_norm**",
        "| head-bn-none | 34.6 | 20.00 | – | 0.300 | -0.500 | 1 |",  # collapsed below 0.1
        "| default | 68.1 | 31.00 ± 1.41 | – | 0.900 ± 0.000 | -0.500 ± 0.000 | 2 |"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["batch_norm.png", "predictor.png"]


@pytest.fixture
def calls(monkeypatch):
    """main.main with a stand-in: calls.first is what its first call returns or raises, calls.args what it gets."""
    made = SimpleNamespace(first=0, args=[])

    def stand_in(words):
        made.args.append(pretraining.make_parser().parse_args(words))
        if len(made.args) > 1:
            return 0
        if isinstance(made.first, BaseException):
            raise made.first
        return made.first

    monkeypatch.setattr(pretraining, "main", stand_in)
    return made


def test_the_rate_is_proportional_to_the_batch_and_a_warm_up_takes_a_tenth(tmp_path, calls):
    write_run(tmp_path, "batch-1024-seed0", 30.0, epochs=40)
    options = f"batch-1024 --epochs 40 --batch_size 64 --learning_rate 0.03 --width 8 --exp_dir {tmp_path}"
    assert ablate.main(options.split()) == 0
    run, = calls.args
    assert (run.epochs, run.batch_size, run.learning_rate, run.warmup_epochs, run.width) == (40, 1024, 0.48, 4, 8)


@pytest.mark.parametrize("first, epochs, code, runs", [
    (0, 2, 0, 4), (1, 2, 1, 4), (RuntimeError("bug"), 2, 1, 4), (143, 2, 143, 1),
    (SystemExit(1), 2, 1, 4), (SystemExit(2), 2, 2, 1), (0, 1, 0, 1)])  # the last one: by --max_minutes
def test_the_exit_code_and_whether_the_study_goes_on(tmp_path, calls, capsys, monkeypatch, first, epochs, code, runs):
    trials = ["default-seed0", "cross-entropy-seed0", "default-seed1", "cross-entropy-seed1"]
    for trial in trials:
        write_run(tmp_path, trial, 30.0, epochs=epochs)
    calls.first = first
    command = ["similarity", "--seeds", "2", "--epochs", "2", "--exp_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ablate.py", *command])
    with pytest.raises(SystemExit) as stop:
        cli.run_script(ablate.main)
    assert stop.value.code == code
    assert [run.trial for run in calls.args] == trials[:runs]
    output, error = capsys.readouterr()
    assert (f"Resume with: python ablate.py {' '.join(command)}\n" in output) == (code > 2)
    assert ("RuntimeError: bug" in error) == isinstance(first, RuntimeError)


def start(folder, *args):
    command = [sys.executable, "-u", "ablate.py", "stop_gradient", "--exp_dir", str(folder), *SMALL, *args]
    return subprocess.Popen(command, cwd=REPO, text=True, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=CPU_ONLY)


@pytest.mark.slow
def test_a_study_runs_once_and_its_table_is_of_its_logs(tmp_path):
    results = []
    for _ in range(2):
        process = start(tmp_path, "--epochs", "2")
        output, error = process.communicate()
        assert process.returncode == 0 and error == "", error
        written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint.pt")}
        results.append((output[output.index("**stop_gradient**"):], written))
    assert results[0] == results[1] and len(written) == 2
    default, without = (log.read(tmp_path / f"{name}-seed0")[-1] for name in ("default", "no-stop-gradient"))
    numbers = f"{without['knn200']:.2f} | {without['knn200'] - default['knn200']:.2f} | {without['std']:.3f}"
    assert f"| no-stop-gradient | 0.1 | {numbers} | {without['loss']:.3f} | 1 |\n" in output
    options = [*SMALL, *"--no-stop_gradient --epochs 2 --trial alone --exp_dir".split(), str(tmp_path)]
    subprocess.run([sys.executable, "main.py", *options], cwd=REPO, check=True, env=CPU_ONLY, capture_output=True)
    first, second = (checkpoint.load(tmp_path / name / "backbone.pt") for name in ("alone", "no-stop-gradient-seed0"))
    assert checkpoint.digest(first) == checkpoint.digest(second)  # a study's second run is as good as one alone


@pytest.mark.slow
def test_ctrl_c_stops_main_and_the_command_that_is_printed_resumes_it(tmp_path):
    """As from a terminal: the signal goes to the process group, and main.py gets it once."""
    process, first = start(tmp_path, "--epochs", "6", "--eval_freq", "9"), tmp_path / "default-seed0" / "log.jsonl"
    while not (first.exists() and first.read_text().count("\n") > 1):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, error = process.communicate()
    assert process.returncode == 130 and "Interrupted. Resume with" in output, (output, error)
    assert not list(tmp_path.glob("no-stop-gradient*"))
    command = shlex.split(output.splitlines()[-1].removeprefix("Resume with: python "))
    subprocess.run([sys.executable, *command], cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    assert [record["epoch"] for record in log.read(first.parent)] == list(range(7))
    assert log.read(tmp_path / "no-stop-gradient-seed0")[-1]["epoch"] == 6
