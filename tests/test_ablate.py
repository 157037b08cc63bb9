"""ablate.py: its table from logs with known figures, and small studies as they are typed."""
import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

import ablate
import main as pretraining
from conftest import REPO, SMALL
from utils import checkpoint, log


def write_run(folder, trial, knn, std=0.9, epochs=2, **settings):
    """A run whose kNN rises to `knn` in its two epochs, or that ends before."""
    path = folder / trial
    path.mkdir()
    settings = {"epochs": 2, "batch_size": 64, "head_bn": "default"} | settings
    checkpoint.write_json(path / "config.json", {"settings": vars(pretraining.make_parser().parse_args([])) | settings})
    log.append(path, [{"epoch": i, "loss": -i / 4, "std": std, "knn200": knn - 2 + i} for i in range(1, epochs + 1)])


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


def test_the_rate_is_proportional_to_the_batch_and_a_warm_up_takes_a_tenth():
    args = ablate.make_parser().parse_args("batch_size --epochs 40 --batch_size 64 --learning_rate 0.03".split())
    options = ablate.complete(ablate.STUDIES["batch_size"]["batch-1024"][0], args)
    run = pretraining.make_parser().parse_args(options)
    assert (run.epochs, run.batch_size, run.learning_rate, run.warmup_epochs) == (40, 1024, 0.48, 4)


@pytest.mark.parametrize("args, words", [
    ("predicter", "did you mean predictor?"), ("predictor no-predicter", "did you mean no-predictor?")])
def test_what_cannot_be_run_is_refused(refused, args, words):
    refused(ablate.main, args.split(), words)


def start(folder, *args):
    command = [sys.executable, "-u", "ablate.py", "stop_gradient", "--exp_dir", str(folder), *SMALL, *args]
    return subprocess.Popen(command, cwd=REPO, text=True, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_a_refusal_of_main_ends_the_study(tmp_path):
    process = start(tmp_path / "runs", "--widht", "8")
    error = process.communicate()[1]
    assert process.returncode == 2 and error.count("\n") == 1 and "did you mean --width?" in error, error


STAND_IN = """
import sys, time
words, began = sys.argv[1:], open("began", "a+")
began.write(" ".join(words[words.index(name) + 1] for name in ("--trial", "--gpu")) + "\\n")
began.flush()
while began.seek(0) or len(began.readlines()) < WAIT:
    time.sleep(0.02)
"""


@pytest.fixture
def on_two_gpus(tmp_path, monkeypatch):
    """Finished runs, and a start_main that waits in each until there are so many."""
    def start_main(wait, options):
        return subprocess.Popen([sys.executable, "-c", STAND_IN.replace("WAIT", str(wait)), *options])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate.torch.cuda, "device_count", lambda: 2)
    for name in ("default", "cross-entropy"):
        for seed in range(2):
            write_run(tmp_path, f"{name}-seed{seed}", 30.0)
    return lambda wait: monkeypatch.setattr(ablate, "start_main", functools.partial(start_main, wait))


def test_variants_run_side_by_side_one_on_each_gpu(on_two_gpus):
    on_two_gpus(wait=2)
    assert ablate.main("similarity --seeds 2 --exp_dir .".split()) == 0
    began = [line.split() for line in open("began")]
    assert sorted(began[:2]) == [["cross-entropy-seed0", "1"], ["default-seed0", "0"]]
    assert sorted(trial for trial, _ in began[2:]) == ["cross-entropy-seed1", "default-seed1"]
    assert sorted(gpu for _, gpu in began[2:]) == ["0", "1"]


def test_with_a_gpu_of_their_own_choice_they_run_one_after_the_other(on_two_gpus):
    on_two_gpus(wait=1)
    assert ablate.main("similarity --gpu 1 --exp_dir .".split()) == 0
    assert [line.split() for line in open("began")] == [["default-seed0", "1"], ["cross-entropy-seed0", "1"]]


def test_a_signal_reaches_the_runs_on_all_gpus_and_no_other_starts(on_two_gpus, capsys):
    on_two_gpus(wait=9)
    def interrupt():
        while not os.path.exists("began") or len(open("began").readlines()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    assert ablate.main("similarity --seeds 2 --exp_dir .".split()) == 128 + signal.SIGTERM
    assert len(open("began").readlines()) == 2
    assert "Resume with: python ablate.py similarity --seeds 2 --exp_dir ." in capsys.readouterr().out


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
    settings = checkpoint.read_json(tmp_path / "no-stop-gradient-seed0" / "config.json")["settings"]
    assert settings["stop_gradient"] is False and settings["seed"] == 0 and settings["epochs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["the start of main.py", "its first epoch"])
def test_ctrl_c_stops_main_and_the_command_that_is_printed_resumes_it(tmp_path, moment):
    """As from a terminal: the signal goes to the process group, and main.py gets it once."""
    process, first = start(tmp_path, "--epochs", "6", "--eval_freq", "9"), tmp_path / "default-seed0" / "log.jsonl"
    assert process.stdout.readline().startswith("default-seed0:")
    time.sleep(0.5)
    while moment == "its first epoch" and not (first.exists() and first.read_text().count("\n") > 1):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, error = process.communicate()
    assert process.returncode == 130 and ("Interrupted in epoch" in output) == first.exists(), (output, error)
    assert not list(tmp_path.glob("no-stop-gradient*"))
    command = shlex.split(output.splitlines()[-1].removeprefix("Resume with: python "))
    subprocess.run([sys.executable, *command], cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    assert [record["epoch"] for record in log.read(first.parent)] == list(range(7))
    assert log.read(tmp_path / "no-stop-gradient-seed0")[-1]["epoch"] == 6
