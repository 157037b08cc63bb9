"""main.py end to end: its run folder, exact resume, and stopping."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import children
import main as pretraining
import simsiam
from conftest import REPO, SMALL
from utils import checkpoint, log
from utils.device import autocast

FIGURES = ("loss", "std", "lr", "knn1", "knn200")


def figures(folder):
    """What the log says apart from times."""
    return [{key: record[key] for key in FIGURES if key in record} for record in log.read(folder)]


def assert_same_state(first, second):
    first, second = (checkpoint.load(os.path.join(folder, "checkpoint.pt")) for folder in (first, second))
    assert first["epoch"] == second["epoch"] and first["step"] == second["step"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    momenta = [
        [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in (first, second)
    ]
    assert len(momenta[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


def test_the_run_folder_is_complete(finished_run):
    assert sorted(os.listdir(finished_run)) == [
        "backbone.pt", "checkpoint-previous.pt", "checkpoint.pt", "config.json", "learning-rate.png", "learning-rate.svg", "log.jsonl",
        "loss-plot.png", "loss-plot.svg", "report.html", "std.png", "std.svg", "throughput.png", "throughput.svg", "top1-acc.png", "top1-acc.svg",
        "views.png", "views.svg",
    ]
    records = log.read(finished_run)
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert -1 <= record["loss"] <= 1 and 0.1 < record["std"] < 1.2
        assert 0 < record["seconds"] < record["wall_seconds"] and 0 < record["views_per_s"]
        assert 0 <= record["knn1"] <= 100 and 0 <= record["knn200"] <= 100
    assert records[0]["lr"] == pytest.approx(0.03 * 32 / 256)  # the rate follows the batch
    with open(os.path.join(finished_run, "config.json")) as file:
        config = json.load(file)
    assert config["settings"]["seed"] == 0 and config["versions"]["torch"] == torch.__version__
    for name in ("loss-plot.png", "top1-acc.png", "views.png"):
        with open(os.path.join(finished_run, name), "rb") as file:
            assert file.read(4) == b"\x89PNG"


def test_the_backbone_file_is_the_trained_backbone(finished_run):
    backbone = simsiam.resnet18(4)
    state = torch.load(os.path.join(finished_run, "backbone.pt"), weights_only=True)
    backbone.load_state_dict(state)
    trained = checkpoint.load(os.path.join(finished_run, "checkpoint.pt"))["model"]
    assert all(torch.equal(value, trained[f"backbone.{name}"]) for name, value in state.items())
    torch.manual_seed(0)
    assert not torch.equal(simsiam.resnet18(4).conv1.weight, state["conv1.weight"])


def test_two_epochs_equal_one_and_a_resumed_one(run_main, no_gpu):
    """Bit for bit: weights, batch norm buffers, momenta, and the log."""
    settings = ("--epochs", 2, "--eval_freq", 1, "--save_freq", 1)
    assert run_main(*settings, "--trial", "whole") == 0
    # As after a kill: the checkpoint is the first epoch's, the log already has a line of the second.
    assert run_main(*settings, "--trial", "halves") == 0
    os.replace("experiments/halves/checkpoint-previous.pt", "experiments/halves/checkpoint.pt")
    assert checkpoint.load("experiments/halves/checkpoint.pt")["epoch"] == 1
    with open("experiments/halves/log.jsonl", "a") as file:
        file.write('{"epoch": 2, "lo')
    assert run_main("--resume", "auto", "--trial", "halves") == 0
    assert_same_state("experiments/whole", "experiments/halves")
    assert len(log.read("experiments/halves")) == 2
    assert figures("experiments/whole") == figures("experiments/halves")


def test_seeds_differ_and_repeat(run_main, no_gpu):
    for trial, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run_main("--epochs", 1, "--trial", trial, "--seed", seed) == 0
    assert figures("experiments/a") == figures("experiments/b") != figures("experiments/c")


def test_resume_auto_takes_the_newest_and_says_when_it_is_done(run_main, capsys):
    for trial in ("older", "newer"):
        assert run_main("--epochs", 1, "--trial", trial) == 0
    before = log.read("experiments/newer")
    assert run_main("--resume", "auto") == 0
    assert "experiments/newer: already done, epoch 1 of 1" in capsys.readouterr().out
    assert log.read("experiments/newer") == before


def test_resume_auto_goes_by_the_checkpoint_not_by_other_files(run_main, capsys):
    for trial in ("older", "newer"):
        assert run_main("--epochs", 1, "--trial", trial) == 0
    with open("experiments/older/note.txt", "w"):
        pass
    run_main("--resume", "auto")
    assert "experiments/newer: already done" in capsys.readouterr().out


def test_a_signal_before_the_first_step_still_leaves_a_checkpoint(run_main, monkeypatch, no_gpu):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return 0.0, 0.0

    assert run_main("--epochs", 1, "--trial", "whole", "--untrained") == 0
    with monkeypatch.context() as patch:
        patch.setattr("main.knn_accuracy", interrupted)
        assert run_main("--epochs", 1, "--trial", "stopped", "--untrained") == 130
    assert run_main("--resume", "auto", "--trial", "stopped") == 0
    assert_same_state("experiments/whole", "experiments/stopped")
    assert figures("experiments/whole") == figures("experiments/stopped")


def test_resume_auto_starts_where_nothing_is_there(run_main, capsys):
    assert run_main("--epochs", 1, "--trial", "first", "--resume", "auto") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert len(log.read("experiments/first")) == 1


def test_resume_falls_back_to_the_previous_checkpoint(run_main, no_gpu, capsys):
    settings = ("--epochs", 2, "--save_freq", 1)
    run_main(*settings, "--trial", "whole")
    run_main(*settings, "--trial", "damaged")
    with open("experiments/damaged/checkpoint.pt", "r+b") as file:
        file.truncate(5000)
    assert run_main("--resume", "auto", "--trial", "damaged") == 0
    assert "checkpoint-previous.pt" in capsys.readouterr().err
    assert_same_state("experiments/whole", "experiments/damaged")


def test_unnamed_runs_are_numbered(run_main):
    for _ in range(2):
        run_main("--epochs", 1)
    assert sorted(os.listdir("experiments")) == ["1", "2"]


def test_the_untrained_network_is_measured_on_request(run_main):
    assert run_main("--epochs", 1, "--untrained", "--trial", "run") == 0
    records = log.read("experiments/run")
    assert records[0].keys() == {"epoch", "knn1", "knn200"} and records[0]["epoch"] == 0
    torch.manual_seed(0)
    untrained = torch.load("experiments/run/untrained.pt", weights_only=True)
    assert torch.equal(untrained["conv1.weight"], simsiam.resnet18(4).conv1.weight)


def test_collapse_is_warned_of_once_with_its_cause(run_main, monkeypatch, capsys):
    monkeypatch.setattr("main.feature_std", lambda z: 0.01 * z.std())
    run_main("--epochs", 2)
    assert "collapsed" not in capsys.readouterr().err
    run_main("--epochs", 4)
    error = capsys.readouterr().err
    assert error.count("collapsed") == 1 and "epoch 3: std 0.0" in error
    assert "rate too high" in error and "--learning_rate (0.00375)" in error


def test_a_loss_that_is_not_finite_ends_the_run(run_main, capsys):
    """It is said in which step; the checkpoint is from before."""
    assert run_main("--epochs", 3, "--learning_rate", 1e30, "--trial", "run", "--save_freq", 1) == 1
    error = capsys.readouterr().err
    assert "epoch 1, step 2 of 8: the loss is nan" in error and "lower --learning_rate (1e+30)" in error
    assert "run/checkpoint.pt is kept as of epoch 0" in error
    state = checkpoint.load("experiments/run/checkpoint.pt")
    assert state["epoch"] == 0 and all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_are_not_finite_are_not_saved(run_main, capsys):
    """One step an epoch, whose loss is finite and whose update is not."""
    settings = ("--batch_size", 256, "--epochs", 3, "--save_freq", 1, "--trial", "run")
    assert run_main(*settings, "--learning_rate", 1e300) == 1
    assert "epoch 1, step 1 of 1: after it a weight is not a finite number" in capsys.readouterr().err
    state = checkpoint.load("experiments/run/checkpoint.pt")
    assert state["epoch"] == 0 and all(value.isfinite().all() for value in state["model"].values())


def test_skipped_steps_are_told(shapes):
    """A loss scaler whose scale overflows in the backward pass skips the update and lowers the scale."""
    torch.manual_seed(0)
    model = simsiam.SimSiam(simsiam.resnet18(8), 32, 16)
    torch.nn.init.normal_(model.predictor[-1].weight, std=1e-6)  # short outputs have large gradients
    torch.nn.init.zeros_(model.predictor[-1].bias)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9, 0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    step = pretraining.make_train_step(model, optimizer, scaler, autocast(torch.device("cpu"), "fp32"), False)
    order, *draws = pretraining.draw_epoch(0, 0, 64, 64, (32, 32), "cpu")
    before = model.predictor[0].weight.clone()
    told = []
    for _ in range(2):
        told.append(step(shapes.train_images[order], *draws)[2].item())
        moved = not torch.equal(before, model.predictor[0].weight)
        assert moved == (0 in told)
    assert told == [1, 0]


def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch):
    """Stopped inside an epoch by Ctrl-C and resumed, a run ends as if it had not been."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = ("--epochs", "6", "--save_freq", "100", "--eval_freq", "100", "--exp_dir", str(tmp_path))
    process = children.start([*SMALL, *settings, "--trial", "stopped"], tmp_path / "output.txt")
    lines = tmp_path / "stopped" / "log.jsonl"
    while not (lines.exists() and lines.stat().st_size):
        time.sleep(0.02)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert children.finish(process) == 130
    stopped = checkpoint.load(str(tmp_path / "stopped" / "checkpoint.pt"))
    assert 1 <= stopped["epoch"] < 6
    hint = (tmp_path / "output.txt").read_text().split("to go on: python main.py ")[1].split()[:2]
    assert hint == ["--resume", str(tmp_path / "stopped" / "checkpoint.pt")]

    for args in (hint, [*settings, "--trial", "whole"]):
        assert children.finish(children.start([*SMALL, *args], tmp_path / "output.txt")) == 0
    assert_same_state(tmp_path / "whole", tmp_path / "stopped")
    assert figures(tmp_path / "whole") == figures(tmp_path / "stopped")


def test_odd_batches_of_a_narrow_network(tmp_path):
    """In a process of its own: where torch's channels_last kernels fail, they take the process with them."""
    command = [sys.executable, "main.py", *SMALL, "--batch_size", "33", "--epochs", "3", "--exp_dir", str(tmp_path)]
    assert subprocess.run(command, cwd=REPO, capture_output=True).returncode == 0
