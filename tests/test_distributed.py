"""Several processes: torchrun with two of them on the CPU, against one process, and what ends them."""
import contextlib
import glob
import os
import re
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import in_float64
import main as pretraining
from conftest import CPU_ONLY, REPO
from simsiam.weights import flatten
from test_main import assert_same_run, log_of
from utils import augment, checkpoint, cli, device, distributed
from utils.augment import draw_views, make_views

SMALL = ("--dataset shapes --train_size 640 --test_size 100 --width 4 --dim 32 --pred_dim 16 --batch_size 32 "
         "--learning_rate 0.05 --precision fp32 --exp_dir experiments --trial").split()
linux = pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds processes in /proc")


def torchrun(*args, script="main.py", restarts=0, count=2):
    """A started torchrun of `count` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += ["--max_restarts", str(restarts), os.path.join(REPO, script), *map(str, args)]
    environment = CPU_ONLY | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Exit code, output and errors, these without torchrun's own; nothing is left of the processes."""
    begin = time.monotonic()
    output, error = process.communicate(timeout=120)
    assert "UserWarning" not in error, error
    assert not processes_of("experiments") and time.monotonic() - begin < 60
    messages = [line for line in error.splitlines() if line.startswith(("main.py:", "warning:"))]
    return process.returncode, output, messages


def processes_of(folder, rank=None):
    """Process ids of main.py with this --exp_dir in this directory, of one rank or all."""
    found = []
    for path in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):
            words, variables = (open(f"{path}/{name}", "rb").read().split(b"\0") for name in ("cmdline", "environ"))
            ours = os.readlink(f"{path}/cwd") == os.getcwd() and folder.encode() in words
            if ours and (f"RANK={rank}".encode() in variables or rank is None):
                found.append(int(path.split("/")[2]))
    return found


def wait_for(lines, trial):
    """Until the run's log has so many lines."""
    path, limit = f"experiments/{trial}/log.jsonl", time.monotonic() + 120
    while not os.path.exists(path) or len(open(path).readlines()) < lines:
        assert time.monotonic() < limit
        time.sleep(0.02)


def send(signal_number, rank):
    os.kill(max(processes_of("experiments", rank)), signal_number)  # torchrun's child, not torchrun, has the variable


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def reference(words):
    """Ten steps written out: the halves of a batch with their own statistics, the mean of the gradients, SGD. The
    running statistics are those of the first half."""
    args = pretraining.make_parser().parse_args(words)
    _, device, data, model, optimizer, _ = pretraining.prepare(args)
    model.train()
    order, draws = pretraining.draw_epoch(args, 0, data.train_images, device)
    for step in range(len(data.train_images) // args.batch_size):
        optimizer.zero_grad()
        before = {name: value.clone() for name, value in model.named_buffers()}
        for half in (1, 0):
            for name, value in model.named_buffers():
                value.copy_(before[name])
            first = step * args.batch_size + half * args.batch_size // 2
            rows = slice(first, first + args.batch_size // 2)
            views = make_views(data.train_images[order[rows]], [each.rows(rows) for each in draws], 32)
            p1, p2, p3, z1, z2, z3 = model(*(view.double() for view in views))
            pairs = (p1, z2 + z3), (p2, z1 + z3), (p3, z1 + z2)
            loss = -sum(F.cosine_similarity(p, z).mean() for p, z in pairs) / 3
            (loss / 2).backward()
        optimizer.step()
    return model.state_dict()


def test_two_processes_are_a_process_that_takes_the_mean_of_two_halves(here, monkeypatch):
    """In float64, within 1e-10."""
    words = [*SMALL, "run", "--epochs", "1", "--train_size", "320", "--width", "8", "--views", "3"]  # 8: in channels_last
    assert finish(torchrun(*words, script="tests/in_float64.py"))[0] == 0
    for module, name in ((augment, "make_views"), (pretraining.knn, "monitor"), (pretraining.simsiam, "SimSiam")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be restored
    monkeypatch.setitem(pretraining.simsiam.DISTANCES, "cosine", None)
    in_float64.patch()
    found, expected = checkpoint.load("experiments/run/checkpoint.pt")["model"], reference(words)
    assert found["backbone.conv1.weight"].dtype == torch.float64 and found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)


@linux
@pytest.mark.slow
def test_a_run_that_is_stopped_and_killed_ends_with_the_same_bits(here):
    """SIGTERM to one process stops all inside an epoch; torchrun starts again after SIGKILL of one; one log, one bar.
    Of three processes, since with two each order of a sum gives the same bits."""
    options = "--epochs", 5, "--eval_freq", 3, "--batch_size", 48
    code, output, error = finish(torchrun(*SMALL, "whole", *options, count=3))
    assert code == 0 and not error and output.count("epoch 3/5") == 1 and os.listdir("experiments") == ["whole"]
    assert "CPU, 1 thread, 3 processes" in output and "statistics of the 16 images of each process" in output

    stopped = torchrun(*SMALL, "stopped", *options, count=3)
    wait_for(2, "stopped")
    send(signal.SIGTERM, rank=1)
    code, output, error = finish(stopped)
    assert code == 1 and output.count("Interrupted.") == 1 and not error
    state = checkpoint.load("experiments/stopped/checkpoint.pt")
    assert state["epoch"] >= 2

    killed = torchrun(*SMALL, "stopped", *options, "--resume", "auto", restarts=1, count=3)
    wait_for(state["epoch"] + 1, "stopped")
    send(signal.SIGKILL, rank=1)
    code, output, error = finish(killed)
    assert code == 0 and output.count("stopped: resnet18") == 2, (output, error)
    assert_same_run(os.path.abspath("experiments/whole"), "stopped")


@linux
@pytest.mark.slow
def test_torchrun_that_is_terminated_waits_for_the_checkpoint(here):
    """Also where the processes have got the signal before torchrun passes it on, as from a queue."""
    process = torchrun(*SMALL, "run", "--epochs", 1000, "--eval_freq", 1000)
    wait_for(1, "run")
    for rank in range(2):
        send(signal.SIGTERM, rank)
    process.terminate()
    code, output, error = finish(process)
    assert code and "Interrupted." in output and not error
    assert checkpoint.load("experiments/run/checkpoint.pt")["epoch"] >= 1


def fill_the_disk_of_the_first():
    limit = os.path.getsize("experiments/run/log.jsonl") + 10
    resource.prlimit(max(processes_of("experiments", 0)), resource.RLIMIT_FSIZE, (limit, limit))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("act, options, words", [
    (lambda: send(signal.SIGKILL, rank=1), ("--epochs", 1000), "lost another process: "),
    (fill_the_disk_of_the_first, ("--epochs", 3), "everything after epoch 0 is lost"),
    (None, ("--epochs", 3, "--learning_rate", "1e30"), "is not finite; the checkpoint of epoch 0 is kept"),
])
def test_what_ends_a_process_ends_both_with_one_error_and_a_good_checkpoint(here, act, options, words):
    process = torchrun(*SMALL, "run", "--eval_freq", 1000, *options)
    if act:
        wait_for(1, "run")
        act()
    code, _, (*warnings, error) = finish(process)
    assert code == 1 and error.startswith("main.py: error:") and words in error
    assert all("File too large" in line for line in warnings) and (act or not warnings), warnings
    assert checkpoint.load("experiments/run/checkpoint.pt")["epoch"] == 0
    assert not glob.glob("experiments/run/*.partial")


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_resumed_by_one_and_the_other_way_round(here, no_gpu, capsys):
    """The losses are close, though not the same bits. The learning rate is low: at SMALL's, the statistics of half
    batches and rounding lead so small a network to other losses within ten steps."""
    options = "--epochs", "2", "--eval_freq", "9", "--learning_rate", "3e-3", "--seed", "1"
    stop, resume = (*options, "--max_minutes", "0"), (*options, "--resume", "auto")
    code, output, error = finish(torchrun(*SMALL, "two-one", *stop))
    assert code == 0 and output.count("Interrupted.") == 1 and not error
    pretraining.main([*SMALL, "one-two", *stop])
    pretraining.main([*SMALL, "one", *options])
    capsys.readouterr()
    assert pretraining.main([*SMALL, "two-one", *resume]) == 0
    assert re.search("written on .*2 processes.*not bit-identical", capsys.readouterr().err)
    code, _, error = finish(torchrun(*SMALL, "one-two", *resume))
    assert code == 0 and len(error) == 1 and "not bit-identical" in error[0]
    losses = [[record["loss"] for record in log_of(trial)] for trial in ("one", "two-one", "one-two")]
    assert all(other == pytest.approx(losses[0], abs=0.02) for other in losses[1:])


@pytest.mark.slow
@pytest.mark.parametrize("args, words", [
    ("--batch_size 33", "must be a multiple of 2 and at least 4"), ("--batch_sise 32", "--batch_sise 32"),
])
def test_bad_input_is_one_line_of_one_process(here, args, words):
    code, _, lines = finish(torchrun(*SMALL[:-1], *args.split()))
    assert code and len(lines) == 1 and words in lines[0] and not os.listdir(".")


# ---- In this process


def test_processes_that_draw_other_images_do_not_train(monkeypatch):
    monkeypatch.setattr(distributed, "processes", 2)
    order, draws = torch.arange(9), [draw_views(9, torch.Generator().manual_seed(0))]
    other = [draws[0]._replace(gray=~draws[0].gray)]
    for words, tensors in (("b", [order, draws]), ("a", [order.flip(0), draws]), ("a", [order, other])):
        monkeypatch.setattr(distributed, "gather", lambda value: [value, theirs])
        theirs = [words, checkpoint.digest(dict(flatten(tensors)))]
        with pytest.raises(ValueError, match="the processes have different images"):
            distributed.require_same("images", "a", [order, draws])
    theirs = ["a", checkpoint.digest(dict(flatten([order.clone(), draws])))]
    distributed.require_same("images", "a", [order, draws])


@pytest.mark.parametrize("at_once, words", [(True, "the processes cannot connect: "), (False, "lost another process: ")])
def test_a_break_at_the_start_and_one_later_are_told_apart(monkeypatch, capsys, at_once, words):
    ended = []

    def breaks(*args, **options):
        raise RuntimeError("[gloo/pair.cc:9] Connection refused. At host")

    for module in (distributed, cli):
        monkeypatch.setattr(module, "processes", 2)
    monkeypatch.setattr(distributed, "rendezvous", lambda *args, **options: iter([(None, 0, 2)]))
    monkeypatch.setattr(distributed.distributed, "destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(distributed.distributed, "init_process_group", breaks if at_once else lambda *args, **options: 0)
    with pytest.raises(SystemExit, match="^1$"), distributed.joined():
        breaks()
    assert f"error: {words}Connection refused\n" in capsys.readouterr().err and not ended
    if not at_once:
        with pytest.raises(SystemExit, match="^2$"), distributed.joined():
            sys.exit(2)
        assert ended


def test_synchronized_batch_norm_keeps_the_names(monkeypatch):
    cpu, args = torch.device("cpu"), pretraining.make_parser().parse_args(SMALL[:-1])
    args.bn_batch, args.steps = args.batch_size, 1
    local = pretraining.build(args, cpu)[0]
    monkeypatch.setattr(distributed, "processes", 2)
    model = pretraining.build(args, cpu)[0]
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(torch.nn.SyncBatchNorm) == 23 and not {torch.nn.BatchNorm1d, torch.nn.BatchNorm2d} & {*kinds}
    assert list(model.state_dict()) == list(local.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), local.state_dict().values()))
    monkeypatch.setattr(device, "compile_for", lambda *args: "compiled")
    monkeypatch.setattr(distributed, "average_gradients", lambda model, function: function)
    for choice, compiled in ((None, False), (True, True)):
        args.compile = choice
        assert (pretraining.make_forward(args, model, cpu) == "compiled") == compiled
    args.bn_batch = args.batch_size // 2  # --no-sync_bn, or a CPU
    assert torch.nn.SyncBatchNorm not in [type(module) for module in pretraining.build(args, cpu)[0].modules()]
    monkeypatch.setattr(device, "processes", 2)  # 17 images each: channels_last would corrupt memory
    assert device.memory_layout(cpu, 8, 34) == torch.contiguous_format


def test_a_compiled_step_is_not_cut_for_ddp(monkeypatch):
    monkeypatch.setattr(distributed, "processes", 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda step: step)
    with torch._dynamo.config.patch(optimize_ddp=True):
        step = distributed.average_gradients(torch.nn.Linear(2, 2), abs)
        assert torch._dynamo.config.optimize_ddp is False and step(-3) == 3


def test_a_request_to_stop_reaches_all_one_step_later(monkeypatch):
    """Three processes in turn, with an all_reduce that is finished when the last one has called it."""
    calls = []

    def all_reduce(code, operation, async_op):
        assert async_op and operation == torch.distributed.ReduceOp.MAX
        calls.append(code)
        if len(calls) % 3 == 0:
            for each in calls[-3:]:
                each.fill_(max(each.item() for each in calls[-3:]))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(distributed, "processes", 3)
    monkeypatch.setattr(distributed.distributed, "all_reduce", all_reduce)
    stops = [distributed.StopRequest() for _ in range(3)]
    assert [stop.agreed() for stop in stops] == 3 * [False]
    stops[1].note(signal.SIGTERM, None)
    assert [stop.agreed() for stop in stops] == 3 * [False]
    assert [stop.agreed() for stop in stops] == 3 * [True]
    assert [(stop.requested, stop.exit_code) for stop in stops] == 3 * [(True, 143)]
