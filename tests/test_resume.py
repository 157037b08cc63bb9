"""Killed, refused, and out of room: what a run leaves behind, and how it goes on."""
import errno
import os
import resource
import shutil
import signal
import time

import pytest
import torch

import children
import kills
from conftest import SMALL
from utils import checkpoint, log

pytestmark = pytest.mark.usefixtures("no_gpu_in_children")


@pytest.fixture
def no_gpu_in_children(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def runs(tmp_path):
    """runs(*args, before=...) -> exit code and output of main.py, its runs in tmp_path."""
    def finish(*args, before=()):
        output = tmp_path / "output.txt"
        output.unlink(missing_ok=True)
        code = children.finish(children.start([*SMALL, "--exp_dir", tmp_path, *args], output, *before))
        return code, output.read_text()
    return finish


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_runs_end_as_the_uninterrupted_one(tmp_path):
    hits = kills.kill_runs(str(tmp_path), 5, seed=1)
    assert sum(hits.values()) == 5


def test_killed_between_link_and_rename_resumes_from_the_checkpoint(tmp_path, runs):
    """The sixth replace is the first epoch's checkpoint taking its name, after config.json, the start's two files, the first
    epoch's backbone and the link; both files are there and good."""
    code, _ = runs("--trial", "run", "--epochs", 2, "--save_freq", 1, before=[(children.kill_at, ("before rename", 6))])
    assert code == -signal.SIGKILL
    assert checkpoint.load(str(tmp_path / "run" / "checkpoint.pt"))["epoch"] == 0
    assert (tmp_path / "run" / "checkpoint-previous.pt").exists()


def limit_file_size(count):
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


def raise_limit_after(epochs):
    """Have no file grow beyond 50 kB from the epoch on, as on a full disk."""
    usual = log.append

    def append(folder, record):
        usual(folder, record)
        if record["epoch"] == epochs:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    log.append = append


def room_again_after(epochs):
    usual = log.append

    def append(folder, record):
        usual(folder, record)
        if record["epoch"] == epochs:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    log.append = append


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, runs):
    """Training goes on, each failure is said with the file's name, and the run ends with 1."""
    code, output = runs("--trial", "run", "--epochs", 4, "--save_freq", 1, before=[(raise_limit_after, (2,))])
    assert code == 1, output
    assert output.count("checkpoint.pt could not be written (File too large)") + output.count("backbone.pt could not be written (File too large)") >= 3
    assert "the last good checkpoint is of epoch 1; the run goes on" in output and "what came after epoch 1 is lost" in output
    assert "Traceback" not in output
    assert len(log.read(str(tmp_path / "run"))) == 4
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".partial")]
    assert checkpoint.load(str(tmp_path / "run" / "checkpoint.pt"))["epoch"] == 1
    assert runs("--trial", "whole", "--epochs", 4, "--save_freq", 1)[0] == 0
    code, output = runs("--trial", "run", "--resume", "auto")
    assert code == 0, output
    kills.compare(str(tmp_path / "whole"), str(tmp_path / "run"))


def test_room_again_makes_the_run_whole(tmp_path, runs):
    before = [(raise_limit_after, (1,)), (room_again_after, (3,))]
    code, output = runs("--trial", "run", "--epochs", 3, "--save_freq", 1, before=before)
    assert code == 0 and "could not be written" in output
    assert checkpoint.load(str(tmp_path / "run" / "checkpoint.pt"))["epoch"] == 3


def test_no_room_at_the_start_is_refused(tmp_path, runs):
    code, output = runs("--trial", "run", before=[(limit_file_size, (50_000,))])
    assert code == 2 and "could not be written (File too large)" in output and output.count("\n") == 1
    assert not (tmp_path / "run").exists()


def forbid_writing():
    """Refuse to open checkpoints for writing, but for the first, as a folder without permission does; root, who may run
    the tests, has every permission."""
    usual, written = open, []

    def refusing(path, mode="r"):
        if mode == "wb" and "checkpoint" in path:
            written.append(path)
            if len(written) > 1:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return usual(path, mode)

    checkpoint.open = refusing


def test_no_permission_names_the_file(tmp_path, runs):
    code, output = runs("--trial", "run", "--epochs", 2, before=[(forbid_writing, ())])
    assert code == 1
    assert f"{tmp_path}/run/checkpoint.pt could not be written (Permission denied)" in output and "Traceback" not in output
    assert checkpoint.load(str(tmp_path / "run" / "checkpoint.pt"))["epoch"] == 0


def test_output_that_cannot_be_written_does_not_end_a_run(tmp_path):
    """Output that cannot be written, here for want of room, costs no epoch."""
    argv = [*SMALL, "--exp_dir", tmp_path, "--epochs", 2, "--eval_freq", 1, "--trial", "run"]
    assert children.finish(children.start(argv, "/dev/full")) == 0
    assert [record["epoch"] for record in log.read(str(tmp_path / "run"))] == [1, 2]


def remove_folder(epoch):
    usual = log.append

    def append(folder, record):
        usual(folder, record)
        if record["epoch"] == epoch:
            shutil.rmtree(folder)

    log.append = append


def test_a_removed_folder_is_made_again(tmp_path, runs):
    code, output = runs("--trial", "run", "--epochs", 3, "--save_freq", 2, before=[(remove_folder, (1,))])
    assert code == 0, output
    assert "was gone and is made again" in output
    assert [record["epoch"] for record in log.read(str(tmp_path / "run"))] == [2, 3]
    assert checkpoint.load(str(tmp_path / "run" / "checkpoint.pt"))["epoch"] == 3


def test_a_second_process_is_refused_while_the_first_lives(tmp_path, runs):
    first = children.start([*SMALL, "--exp_dir", tmp_path, "--trial", "run", "--epochs", 200], tmp_path / "first.txt")
    try:
        wait_for((tmp_path / "run" / "checkpoint.pt").exists)
        for resume in (("--resume", "auto"), ("--resume", "auto", "--trial", "run"), ("--resume", tmp_path / "run" / "checkpoint.pt")):
            args = [str(arg) for arg in resume]
            output = tmp_path / "second.txt"
            code = children.finish(children.start([*args, *([] if "run/checkpoint.pt" in args[-1] else ["--exp_dir", tmp_path])], output))
            text = output.read_text()
            assert code == 2 and "another process is at work" in text and text.count("\n") == 1, text
            output.unlink()
    finally:
        first.kill()
        first.join()
    code, output = runs("--resume", "auto", "--trial", "run", "--max_minutes", "0.01")
    assert code == 0 and "stopped in epoch" in output  # the dead process's lock is not in the way


def test_a_time_limit_stops_and_goes_on_exactly(tmp_path, runs):
    settings = ("--epochs", 4, "--eval_freq", 2, "--save_freq", 100)
    assert runs(*settings, "--trial", "whole")[0] == 0
    begin = time.monotonic()
    code, output = runs(*settings, "--trial", "slices", "--max_minutes", 0)
    assert code == 0 and "stopped in epoch 1; to go on: python main.py --resume" in output and "done; next" not in output
    for i in range(50):  # ever longer slices: a slow machine needs the first ones to start, and makes no step in them
        code, output = runs("--resume", "auto", "--trial", "slices", "--max_minutes", 0.015 * 1.2**i)
        assert code == 0, output
        if "done; next" in output:
            break
    kills.compare(str(tmp_path / "whole"), str(tmp_path / "slices"))
    records = log.read(str(tmp_path / "slices"))  # its time is that of all slices
    assert sum(record["seconds"] for record in records) < sum(record["wall_seconds"] for record in records) < time.monotonic() - begin


def slow_knn(folder):
    """A kNN evaluation that takes a minute, and says when it begins."""
    import main

    def sleep(*args):
        with open(os.path.join(folder, "knn"), "w"):
            pass
        time.sleep(60)

    main.knn_accuracy = sleep


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_does_not_wait_for_the_knn(tmp_path, runs, number):
    settings = ("--epochs", "2", "--eval_freq", "1")
    assert runs(*settings, "--trial", "whole")[0] == 0
    process = children.start([*SMALL, "--exp_dir", tmp_path, *settings, "--trial", "run"], tmp_path / "first.txt", (slow_knn, (str(tmp_path),)))
    wait_for((tmp_path / "knn").exists)
    os.kill(process.pid, number)
    assert children.finish(process, 20) == 128 + number
    state = checkpoint.load(str(tmp_path / "run" / "checkpoint.pt"))
    assert (state["epoch"], state["step"]) == (0, 8)
    assert runs("--resume", "auto", "--trial", "run")[0] == 0
    kills.compare(str(tmp_path / "whole"), str(tmp_path / "run"))


def set_threads(count):
    torch.set_num_threads(count)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_run(tmp_path, runs, threads):
    for trial in ("a", "b"):
        assert runs("--epochs", 2, "--trial", trial, before=[(set_threads, (threads,))])[0] == 0
    kills.compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert runs("--epochs", 2, "--trial", "c", "--seed", 1, before=[(set_threads, (threads,))])[0] == 0
    with pytest.raises(AssertionError):
        kills.compare(str(tmp_path / "a"), str(tmp_path / "c"))


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, runs):
    code, _ = runs("--trial", "run", "--epochs", 1, before=[(children.kill_at, ("checkpoint write", 2))])
    assert code == -signal.SIGKILL and not (tmp_path / "run" / "checkpoint.pt").exists()
    assert runs("--trial", "run", "--epochs", 1, "--resume", "auto")[0] == 0
    assert log.read(str(tmp_path / "run"))[-1]["epoch"] == 1
