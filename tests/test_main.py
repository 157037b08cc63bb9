"""main.py end to end: the run's folder, exact resume, stopping, and what is kept when something fails."""
import errno
import gc
import json
import os
import shutil
import signal
import sys

import pytest
import torch

import main as pretraining
import simsiam
from conftest import SMALL, before_calls, no_room
from utils import checkpoint, cli, distributed, log
from utils.device import processor
from utils.run import Run

TIMES = ("seconds", "time", "views_per_s")
WHOLE = ("--epochs", 3, "--eval_freq", 1, "--untrained")
SGD, KNN = torch.optim.SGD, sys.modules["utils.knn"]


def log_of(trial):
    """The lines of a log as they are in the file, without times. trial: a name or a path."""
    with open(os.path.join("experiments", trial, "log.jsonl")) as file:
        return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in file]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with WHOLE's settings that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert pretraining.main([*SMALL, *map(str, WHOLE), "--exp_dir", str(folder), "--trial", "run"]) == 0
    return folder / "run"


def assert_same_run(whole, trial):
    """The same log, line by line, and the same weights, buffers and momenta, bit for bit. Names or paths."""
    assert log_of(whole) == log_of(trial)
    states = [checkpoint.load(os.path.join("experiments", folder, "checkpoint.pt")) for folder in (whole, trial)]
    parts = [{key: state[key] for key in ("epoch", "model", "optimizer")} for state in states]
    leaves = [torch.utils._pytree.tree_flatten_with_path(part)[0] for part in parts]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path


def state_of(trial):
    return checkpoint.load(f"experiments/{trial}/checkpoint.pt")


def test_the_folder_of_a_run_is_complete(finished_run):
    assert sorted(os.listdir(finished_run)) == [
        ".lock", "backbone.pt", "checkpoint-previous.pt", "checkpoint.pt", "config.json", "effective-rank.png",
        "log.jsonl", "loss-plot.png", "report.html", "std.png", "top1-acc.png", "untrained.pt", "views.png",
    ]
    untrained, *records = log.read(finished_run)
    assert untrained.keys() == {"epoch", "knn1", "knn200", "effective_rank"}
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert -1 <= record["loss"] <= 1 and 0 < record["std"] < 1.2
        assert 0 < record["seconds"] < record["time"] and record["views_per_s"] > 0
        assert 0 <= record["knn1"] <= 100 and 0 <= record["knn200"] <= 100
    assert records[0]["lr"] == pytest.approx(0.03 * 32 / 256)  # follows the batch
    config = checkpoint.read_json(os.path.join(finished_run, "config.json"))
    assert config["settings"]["seed"] == 0 and config["versions"]["torch"] == torch.__version__
    # backbone.pt is the trained backbone, untrained.pt the initial one.
    model, trained, untrained = (checkpoint.load(os.path.join(finished_run, name))
                                 for name in ("checkpoint.pt", "backbone.pt", "untrained.pt"))
    torch.manual_seed(0)
    for name, initial in simsiam.resnet18(4).state_dict().items():
        assert torch.equal(trained[name], model["model"][f"backbone.{name}"]) and torch.equal(untrained[name], initial)
    assert not torch.equal(untrained["conv1.weight"], trained["conv1.weight"])


def test_seeds_repeat_and_differ_and_unnamed_runs_are_numbered(run_main, no_gpu):
    for seed in (1, 1, 2):
        assert run_main("--epochs", 1, "--seed", seed) == 0
    assert sorted(os.listdir("experiments")) == ["1", "2", "3"]
    assert log_of("1") == log_of("2") != log_of("3")


# ---- Resume


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize("count, owner, name", [
    (7, SGD, "step"), (3, KNN, "vote"), (5, log, "write"), (19, os, "fsync"), (5, checkpoint, "save"),
    (13, os, "replace"), (1, log, "write"),
])
def test_a_killed_run_resumes_exactly_with_one_line_an_epoch(whole, run_main, no_gpu, count, owner, name):
    """Killed in a step, in kNN, before a log line, between log line and checkpoint, inside a write, at the start."""
    def dies():
        raise Killed

    with before_calls([count], owner, name, dies), pytest.raises(Killed):
        run_main(*WHOLE, "--trial", "killed")
    gc.collect()  # closes the log, and so releases its lock, as the kernel does
    assert run_main(*WHOLE, "--trial", "killed", "--resume", "auto") == 0
    assert [line["epoch"] for line in log_of("killed")] == [0, 1, 2, 3]
    assert_same_run(whole, "killed")


@pytest.mark.parametrize("number, place, position", [
    *((number, ([6], SGD, "step"), (1, 2)) for number in cli.STOP_SIGNALS),  # this step is finished
    (signal.SIGTERM, ([1], KNN, "normalize"), (0, 0)),  # in the kNN of the initial weights
    (signal.SIGTERM, ([3], KNN, "normalize"), (0, 4)),  # in that of the first epoch
])
def test_a_signal_saves_and_resumes_exactly(whole, run_main, no_gpu, capsys, number, place, position):
    """Ctrl-C, and the signals of terminals and queues. A kNN ends before its next batch, and the resumed run
    repeats it."""
    usual = signal.getsignal(number)
    with before_calls(*place, lambda: signal.raise_signal(number)):
        assert run_main(*WHOLE, "--trial", "stopped") == 128 + number
    assert signal.getsignal(number) == usual
    assert (state_of("stopped")["epoch"], state_of("stopped")["step"]) == position
    assert [line["epoch"] for line in log_of("stopped")] == {(1, 2): [0, 1], (0, 0): [], (0, 4): [0]}[position]
    command = capsys.readouterr().out.split("Resume with: python main.py ")[1].split()[:2]
    assert command == ["--resume", "experiments/stopped/checkpoint.pt"]
    assert run_main(*command) == 0
    assert_same_run(whole, "stopped")


def test_a_second_signal_acts_as_usual(run_main):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with before_calls([2], SGD, "step", twice), pytest.raises(KeyboardInterrupt):
        run_main("--epochs", 1)


def test_a_time_limit_exits_with_zero_and_slices_are_one_run(whole, run_main, monkeypatch, no_gpu):
    for _ in range(2):
        with monkeypatch.context() as patch:  # the time is up in the third step of each slice
            with before_calls([3], SGD, "step", lambda: patch.setattr(distributed.StopRequest, "requested", True)):
                assert run_main(*WHOLE, "--trial", "slices", "--resume", "auto", "--max_minutes", 10) == 0
    state = state_of("slices")
    assert (state["epoch"], state["step"]) == (1, 2)
    del state["config"]["sync_bn"], state["config"]["bn_batch"]  # as if the option were newer than the checkpoint
    checkpoint.save("experiments/slices/checkpoint.pt", state)
    assert run_main("--resume", "auto", "--trial", "slices") == 0
    assert_same_run(whole, "slices")


def test_resume_auto_takes_the_latest_checkpoint_and_knows_what_is_finished(run_main, capsys):
    for trial in ("older", "newer"):
        assert run_main("--epochs", 1, "--trial", trial, "--resume", "auto") == 0
        assert "nothing to resume" in capsys.readouterr().out
    os.utime("experiments/older/config.json")
    before = log_of("newer")
    assert run_main("--resume", "auto") == 0
    assert "experiments/newer: already finished" in capsys.readouterr().out and log_of("newer") == before


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(whole, run_main, no_gpu, capsys):
    """Of epoch 2; the log's line of epoch 3 and one that a kill has left unfinished are dropped."""
    assert run_main(*WHOLE, "--trial", "run") == 0
    with open("experiments/run/checkpoint.pt", "r+b") as file:
        file.seek(20_000)
        file.write(b"damage")
    with open("experiments/run/log.jsonl", "a") as file:
        file.write('{"epoch": 4, "lo')
    assert run_main("--resume", "auto", "--trial", "run") == 0
    words = "truncated or damaged; resuming from experiments/run/checkpoint-previous.pt, epoch 2"
    assert words in capsys.readouterr().err
    assert_same_run(whole, "run")


@pytest.mark.parametrize("seconds, expected", [(0, [(0, 0), (0, 4), (1, 4), (2, 4), (3, 0)]),
                                               (60, [(0, 0), (2, 4), (3, 0)])])
def test_checkpoints_are_written_each_minute_and_before_the_first_knn(run_main, monkeypatch, seconds, expected):
    positions, usual = [], Run.write

    def write(run, position):
        positions.append((position.epoch, position.step))
        usual(run, position)

    monkeypatch.setattr(Run, "write", write)
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", seconds)
    assert run_main("--epochs", 3) == 0 and positions == expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_knn_that_cannot_be_made_costs_no_training(whole, run_main, monkeypatch, no_gpu, capsys, error):
    """What is trained is on the disk before the kNN; without kNN the same weights are trained."""
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", 60)
    saved = []

    def fails(*args, **options):
        saved.append((state_of("run")["epoch"], state_of("run")["step"]))
        raise error

    monkeypatch.setattr("utils.knn.monitor", fails)
    assert run_main("--epochs", 3, "--eval_freq", 1, "--trial", "run") == 0
    assert saved == [(0, 4), (1, 4), (2, 4)] and capsys.readouterr().err.count("no kNN (") == 3
    assert [(line["epoch"], "knn1" in line) for line in log_of("run")] == [(1, False), (2, False), (3, False)]
    first, second = (checkpoint.load(f"{folder}/backbone.pt") for folder in (whole, "experiments/run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("schedule, count, sizes", [
    ("16:0.5,24:0.25,32:0.25", 3, 4 * 2 * [16] + 4 * [24] + 4 * [32]), ("16", 2, 4 * 4 * [16]),
])
def test_views_reach_the_network_and_survive_a_stop(run_main, no_gpu, monkeypatch, schedule, count, sizes):
    seen, usual = [], simsiam.SimSiam.forward

    def forward(model, *views):
        assert len(views) == count
        seen.append(views[-1].shape[2])
        return usual(model, *views)

    monkeypatch.setattr(simsiam.SimSiam, "forward", forward)
    options = ("--epochs", 4, "--eval_freq", 2, "--view_size", schedule, "--views", count)
    assert run_main(*options, "--trial", "whole") == 0
    assert seen == sizes
    for record in log.read("experiments/whole"):
        assert record["views_per_s"] == pytest.approx(4 * 32 * count / record["seconds"], rel=0.1)
    with before_calls([11], SGD, "step", lambda: signal.raise_signal(signal.SIGTERM)):
        assert run_main(*options, "--trial", "stopped") == 128 + signal.SIGTERM
    assert run_main("--resume", "auto", "--trial", "stopped") == 0
    assert_same_run("whole", "stopped")


def test_a_checkpoint_of_another_memory_layout_is_resumed_as_any_other(run_main, no_gpu, monkeypatch):
    """Width 8, which is channels_last here, resumed contiguous, as on a GPU of another age, and with the momenta changed
    by hand: a fused optimizer walks weights and momenta side by side."""
    options = ("--width", 8, "--epochs", 3, "--precision", "fp32", "--trial", "run")
    with before_calls([5], SGD, "step", lambda: signal.raise_signal(signal.SIGTERM)):
        assert run_main(*options) == 128 + signal.SIGTERM
    results = []
    for strided in (False, True):
        shutil.copytree("experiments/run", f"experiments/{strided}")
        state = state_of(str(strided))
        momenta = state["optimizer"]["state"].values()
        assert not all(each["momentum_buffer"].is_contiguous() for each in momenta)
        for each in momenta if strided else ():
            each["momentum_buffer"] = each["momentum_buffer"].contiguous()
        checkpoint.save(f"experiments/{strided}/checkpoint.pt", state)
        assert run_main(*options[:-1], strided, "--resume", "auto") == 0
        results.append(checkpoint.load(f"experiments/{strided}/backbone.pt"))
    monkeypatch.setattr("utils.device.memory_layout", lambda *args: torch.contiguous_format)
    assert run_main(*options, "--resume", "auto") == 0
    first, second, third = *results, checkpoint.load("experiments/run/backbone.pt")
    for name in first:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], third[name], rtol=0.05, atol=0.01)


def test_a_run_has_one_process_at_a_time_and_a_record_of_each(run_main, refused, no_gpu, monkeypatch, capsys):
    """Another machine is said. As from a checkpoint of a GPU in fp16, which a CPU resumes in another precision only."""
    assert run_main("--epochs", 1, "--trial", "run", "--max_minutes", 0) == 0
    with checkpoint.lock("experiments/run/.lock"):
        refused(pretraining.main, ["--resume", "auto"], "experiments/run: another process")
    state = state_of("run")
    state["config"]["precision"], state["scaler"] = "fp16", torch.amp.GradScaler("cpu").state_dict()
    checkpoint.save("experiments/run/checkpoint.pt", state)
    refused(pretraining.main, ["--resume", "auto"], "fp16 requires a CUDA GPU", "use fp32 or bf16")
    monkeypatch.setattr("utils.run.machine", lambda device: {"device": "another", "processor": "Z80", "torch": "9"})
    monkeypatch.setattr("utils.run.processor", lambda: "Z80")
    assert run_main("--resume", "auto", "--precision", "bf16") == 0
    error = capsys.readouterr().err
    assert "resuming on another, Z80, 9: not bit-identical" in error
    assert "--precision bf16, not fp16 as before" in error and state_of("run")["config"]["precision"] == "bf16"
    config = checkpoint.read_json("experiments/run/config.json")
    first, second = config["slices"]
    assert first == {key: config[key] for key in first} and first["epoch"] == second["epoch"] == 0
    assert first["processor"] == processor() and second["processor"] == "Z80" and second["commit"] == first["commit"]


# ---- What goes wrong


@pytest.mark.parametrize("options, words", [
    (("--learning_rate", 1e30), ("epoch 1, step 2 of 4: the loss is not finite", "--learning_rate (1e+30)")),
    (("--learning_rate", 1e300, "--batch_size", 128), ("epoch 1, step 1 of 1: a weight is not finite",)),
])
def test_what_is_not_finite_ends_the_run_with_the_checkpoint_before(run_main, capsys, options, words):
    """A loss; and with one step an epoch a weight, after a finite loss."""
    assert run_main("--epochs", 3, *options, "--trial", "run") == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert state_of("run")["epoch"] == 0 and all(value.isfinite().all() for value in state_of("run")["model"].values())


@pytest.mark.parametrize("full, code", [(range(13, 15), 0), (range(13, 200), 1)])  # each file is two flushes
def test_a_full_disk_costs_no_epoch_if_there_is_room_again(whole, run_main, no_gpu, capsys, full, code):
    """The log cannot be written before and after the first epoch's kNN; or nothing can, from there to the end:
    an error, and the last checkpoint is kept."""
    with before_calls(full, os, "fsync", no_room):
        assert run_main(*WHOLE, "--trial", "run") == code
    error = capsys.readouterr().err
    assert error.count("log.jsonl could not be written (No space left on device); the run continues") >= 2
    assert ("everything after epoch 0 is lost" in error) == (code == 1)
    assert not any(name.endswith(".partial") for name in os.listdir("experiments/run"))
    if code == 1:
        assert state_of("run")["epoch"] == 0
        assert run_main("--resume", "auto", "--trial", "run") == 0
    assert_same_run(whole, "run")


def test_what_a_file_system_lacks_is_not_required(whole, run_main, no_gpu, monkeypatch, capsys):
    """As on some network and shared file systems: no fsync, of folders or at all, and no locks."""
    def fails(number):
        return lambda *args: (_ for _ in ()).throw(OSError(number, os.strerror(number)))

    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    monkeypatch.setattr(checkpoint.fcntl, "flock", fails(errno.ENOLCK))
    assert run_main(*WHOLE, "--trial", "run") == 0
    assert_same_run(whole, "run")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be locked (No locks available)" in error


def test_a_collapse_is_warned_of_with_its_cause(run_main, monkeypatch, capsys):
    monkeypatch.setattr(simsiam, "feature_std", lambda z: 0.01 * z.std())
    run_main("--epochs", 4)
    error = capsys.readouterr().err
    assert error.count("collapsed") == 1 and "epoch 3: std 0.0" in error and "lower --learning_rate" in error


# ---- The terminal


def test_quiet_prints_the_result_and_warnings_alone(run_main, monkeypatch, capsys):
    """As of figures, without which a run goes on."""
    monkeypatch.setattr("utils.report.draw_run", lambda folder: {}["config.json was edited"])
    assert run_main("--epochs", 1, "--quiet") == 0
    output, error = capsys.readouterr()
    assert output.startswith("experiments/1: loss ") and output.count("\n") == error.count("\n") == 1
    assert error.startswith("warning: ") and "no plots ('config.json was edited')" in error


def test_without_a_terminal_there_is_a_line_an_epoch(capsys):
    with cli.progress_bar(3, 0.5) as progress:
        for epoch in range(3):
            progress.update(0.5)
            cli.show_epoch(progress, epoch + 1, f"loss {epoch}", keep=False)
    output, error = capsys.readouterr()
    assert output.splitlines() == ["epoch 1/3  loss 0", "epoch 2/3  loss 1", "epoch 3/3  loss 2"] and error == ""


def test_tensorboard_has_the_log(run_main):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run_main("--epochs", 2, "--eval_freq", 1, "--trial", "run", "--tensorboard") == 0
    events = accumulator.EventAccumulator("experiments/run/tensorboard")
    events.Reload()
    for name in ("loss", "std", "lr", "knn200"):
        expected = [(record["epoch"], pytest.approx(record[name])) for record in log.read("experiments/run")]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


@pytest.mark.parametrize("error", [TypeError("Descriptors cannot be created directly.\nDowngrade protobuf"), ImportError()])
def test_a_tensorboard_that_is_missing_or_broken_is_a_line(error, refused, monkeypatch):
    class Broken:
        @property
        def SummaryWriter(self):
            raise error

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken())
    refused(pretraining.main, [*SMALL, "--tensorboard"], "--tensorboard requires a tensorboard that works (pip install ")
    assert os.listdir("experiments") == []


# ---- Going on


def test_a_run_starts_from_any_backbone(run_main, refused, finished_run, no_gpu, capsys):
    """Of the same width, unless another is given; a resumed run does not need the file again."""
    backbone = checkpoint.load(f"{finished_run}/backbone.pt")
    options = [*SMALL[:6], *SMALL[8:], "--init"]  # without --width
    code = pretraining.main([*options, f"{finished_run}/checkpoint.pt", "--untrained", "--epochs", "2", "--trial", "run",
                             "--max_minutes", "0"])
    assert code == 0 and "tensors matched" in capsys.readouterr().out and state_of("run")["config"]["width"] == 4
    assert checkpoint.digest(checkpoint.load("experiments/run/untrained.pt")) == checkpoint.digest(backbone)
    state = state_of("run")
    checkpoint.save("experiments/run/checkpoint.pt", state | {"config": state["config"] | {"init": "gone.pt"}})
    assert run_main("--trial", "run", "--resume", "auto") == 0
    assert log.read("experiments/run")[0]["knn200"] == pytest.approx(log.read(finished_run)[-1]["knn200"], abs=1.01)
    foreign = {f"net.{name}": value for name, value in backbone.items()}
    checkpoint.save("foreign.pt", {"state_dict": foreign, "pytorch-lightning_version": "1"})
    assert run_main("--init", "foreign.pt", "--epochs", 1) == 0
    refused(pretraining.main, [*options, "foreign.pt", "--width", "8"], "foreign.pt: ", "of width 4")
    refused(pretraining.main, [*options, "nowhere.pt"], "nowhere.pt")
    refused(pretraining.main, ["--resume", "experiments/run/checkpoint.pt", "--epochs", "9"], "has 2; a new run", "--init")


def test_the_batch_is_the_default_or_all_images(run_main, no_gpu):
    words = " ".join([*SMALL, "--epochs 1 --trial run"]).replace("--batch_size 32", "").split()
    assert pretraining.main(words) == 0
    config = checkpoint.read_json("experiments/run/config.json")["settings"]
    assert config["batch_size"] == 128 and config["learning_rate"] == 0.03 * 128 / 256
