"""Progress on a terminal and in a log file, silence, TensorBoard, and how often a run draws."""
import fcntl
import io
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios

import pytest

import main as pretraining
import main_lincls
from conftest import REPO, SMALL
from utils import log, progress
from utils.board import FOLDER
from utils.progress import Progress, say, set_quiet
from utils.run import DRAWING_SHARE, PAGE_SECONDS, RunWriter


class Clock:
    """Stands in for the module time: its monotonic clock is set by hand."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_file_gets_a_line_every_so_often(clock, capsys):
    """1,000 epochs of 100 steps in 1,000 s: a line in 30 s at most, and those that are kept."""
    with Progress(1000, 0) as bar:
        for epoch in range(1000):
            for step in range(1, 101):
                clock.now += 0.01
                bar.update(epoch + step / 100)
            bar.epoch(epoch + 1, f"loss {-epoch / 1000:.3f}", (epoch + 1) % 250 == 0, "")
    output, error = capsys.readouterr()
    lines = output.splitlines()
    assert error == "" and "\r" not in output
    assert 1000 / 31 - 5 < len(lines) < 1000 / 30 + 5
    kept = [line for line in lines if line.startswith((" 250/1000", "epoch  250/1000"))]
    assert kept == ["epoch  250/1000  loss -0.249, 12:30 left"]  # a quarter took 250 s
    assert lines[-1] == "epoch 1000/1000  loss -0.999, 00:00 left"


def test_a_long_epoch_shows_how_far_it_is_and_a_resumed_run_what_is_left_of_it(clock, capsys):
    with Progress(4, 2.0) as bar:
        for step in range(1, 11):
            clock.now += 60
            bar.update(2 + step / 10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 3/4  10 % of the epoch, 19:00 left"  # 2 epochs of 600 s, less 60 s
    assert len(lines) == 9  # at its end come its figures


def test_epochs_of_any_length_show_their_figures(clock, capsys):
    """Of 40 s and of 300 s: the lines in between do not take their place."""
    for seconds in (40, 300):
        with Progress(6, 0) as bar:
            for epoch in range(6):
                for step in range(1, 101):
                    clock.now += seconds / 100
                    bar.update(epoch + step / 100)
                bar.epoch(epoch + 1, "loss", False, "")
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0] for line in lines if "loss" in line] == [f"epoch {epoch}/6" for epoch in range(1, 7)]
        assert not any("  0 % of" in line for line in lines)


def test_quiet_is_silent(clock, capsys):
    set_quiet(True)
    try:
        with Progress(10, 0) as bar:
            for epoch in range(10):
                clock.now += 100
                bar.epoch(epoch + 1, "loss 0", True, "loss 0")
        say("a line")
        assert capsys.readouterr() == ("", "")
    finally:
        set_quiet(False)


def test_quiet_scripts_print_the_result_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pretraining.main([*SMALL, "--epochs", "1", "--quiet"]) == 0
    output, error = capsys.readouterr()
    assert output.startswith("experiments/1: epoch 1  loss") and output.count("\n") == 1 and error == ""
    arguments = "--dataset shapes --train_size 256 --test_size 100 --features cached --epochs 2 --quiet --pretrained experiments/1/backbone.pt"
    assert main_lincls.main(arguments.split()) == 0
    output, error = capsys.readouterr()
    assert output.startswith("linear top-1: ") and "left" not in output and "matched" not in output and error == ""


def test_a_terminal_gets_a_bar(tmp_path):
    """One that is drawn over itself, with loss, std, kNN and speed beside it."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "main.py", *SMALL, "--epochs", "2", "--eval_freq", "1", "--exp_dir", str(tmp_path)],
        cwd=REPO, stdout=subprocess.PIPE, stderr=its,
    )
    os.close(its)
    shown = io.BytesIO()
    while True:
        try:
            shown.write(os.read(ours, 4096))
        except OSError:  # the other side is closed
            break
    output = process.communicate(timeout=120)[0].decode()
    bar = next(part for part in reversed(shown.getvalue().decode().split("\r")) if part.strip())
    assert process.returncode == 0
    assert len(bar.strip()) <= 80
    for word in ("█| 2.0/2 epochs [", "loss ", "std ", "views/s]", "kNN "):
        assert word in bar
    assert output.count("left") == 2  # an epoch that was measured stays as a line
    assert shlex.join(["python", "main.py", *SMALL, "--epochs", "2"]) in (tmp_path / "1" / "report.html").read_text()


def test_drawing_takes_a_hundredth_of_the_time_and_the_page_is_new_all_the_same(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("utils.run.time", clock)
    writer = RunWriter(str(tmp_path))
    drawn, pages = [], []

    def draw(folder, state):
        drawn.append(clock.now)
        clock.now += 2.0

    for _ in range(10_000):
        clock.now += 1.0
        writer.show_progress(draw, lambda folder, state: pages.append(clock.now))
    assert drawn[0] == 1.0  # at once
    assert 0.9 * DRAWING_SHARE < 2.0 * len(drawn) / clock.now < 1.1 * DRAWING_SHARE
    shown = sorted(drawn + pages)
    assert max(b - a for a, b in zip(shown, shown[1:])) < PAGE_SECONDS + 4


def test_what_goes_wrong_with_figures_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    """Somebody changes config.json while it runs."""
    monkeypatch.chdir(tmp_path)
    usual = log.append

    def append(folder, record):
        usual(folder, record)
        (tmp_path / "experiments" / "run" / "config.json").write_text("{}")

    monkeypatch.setattr(log, "append", append)
    assert pretraining.main([*SMALL, "--epochs", "2", "--trial", "run"]) == 0
    assert "no figures" in capsys.readouterr().err


def test_tensorboard_has_the_log_and_the_figures(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    settings = [*SMALL, "--eval_freq", "1", "--trial", "run"]
    assert pretraining.main([*settings, "--epochs", "2", "--tensorboard"]) == 0
    events = accumulator.EventAccumulator(f"experiments/run/{FOLDER}", {"images": 0, "scalars": 0})
    events.Reload()
    records = log.read("experiments/run")
    for name in ("loss", "std", "lr", "knn1", "knn200", "views_per_s"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(record["epoch"], pytest.approx(record[name])) for record in records]
    assert {"views", "loss-plot", "top1-acc"} <= set(events.Tags()["images"])


def test_without_tensorboard_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # import raises ImportError
    with pytest.raises(SystemExit) as stop:
        pretraining.main([*SMALL, "--epochs", "1", "--tensorboard"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "pip install tensorboard" in error
    assert not os.path.exists("experiments")
