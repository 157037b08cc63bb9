"""The choice of a device, of threads and processes, and memory that is used up."""
import os
import resource
import subprocess
import sys

import pytest
import torch

import main as pretraining
import main_lincls
from conftest import CPU_ONLY, REPO, SMALL
from utils import cli, device
from utils import images as image_files
from utils.data import load_dataset


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that compute, except for those in the list that it returns."""
    broken, ones = [], torch.ones
    answers = dict(is_available=True, device_count=2, get_device_name="Tesla K80", set_device=None)
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: broken.insert(0, index))

    def on_cpu(*sizes, **options):
        if broken[0] in broken[1:]:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile ...")
        return ones(*sizes)

    monkeypatch.setattr(torch, "ones", on_cpu)
    return broken


def test_each_process_takes_a_gpu_of_its_own(gpus, monkeypatch):
    monkeypatch.setattr(device, "processes", 4)
    for local_rank in ("0", "1"):
        gpus.clear()
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert device.select_device(None) == torch.device("cuda", int(local_rank))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK 2: CUDA sees GPUs 0 to 1"):
        device.select_device(None)
    with pytest.raises(ValueError, match="omit --gpu"):
        device.select_device(0)
    assert device.select_device("none").type == "cpu"
    gpus[:] = [1]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="LOCAL_RANK 1: Tesla K80 cannot compute"):  # all must do the same
        device.select_device(None)


def test_a_gpu_that_cannot_compute_is_left_alone_or_named(gpus, capsys):
    assert device.select_device("none").type == "cpu" and not gpus
    assert device.select_device(None) == torch.device("cuda", 0)
    gpus[:] = [0]
    assert device.select_device(None) == torch.device("cuda", 1)
    assert "Tesla K80 cannot compute (CUDA error: no kernel image is available for" in capsys.readouterr().err
    gpus[:] = [0, 1]
    assert device.select_device(None).type == "cpu"
    assert capsys.readouterr().err.count("the next GPU, or the CPU, takes over\n") == 2
    with pytest.raises(ValueError, match="--gpu 1: Tesla K80 cannot.*; free its memory, install a PyTorch .* or use --gpu none"):
        device.select_device(1)


@pytest.mark.parametrize("quota, affinity, threads, processes, expected", [
    ("max 100000", 8, 4, 1, 4), ("150000 100000", 8, 4, 1, 1), ("600000 100000", 8, 1, 2, 6), ("", 2, 4, 1, 2),
    ("50000 100000", 8, 4, 1, 1), ("max 100000", 8, 1, 4, 8)])
def test_reading_processes_suit_containers_and_torchrun(quota, affinity, threads, processes, expected, tmp_path,
                                                        monkeypatch):
    """torchrun sets one thread for each process; only one of them reads."""
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(device, "CPU_QUOTA", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(affinity), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(device, "processes", processes)
    assert device.cores() == expected
    assert image_files.decode(9999 * ["x"], 32).num_workers == expected


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")
def test_reading_takes_no_shared_memory(shapes, tmp_path, monkeypatch):
    """A container may have 64 MB of it."""
    monkeypatch.chdir(tmp_path)
    pictures = torch.zeros(40, 64, 64, 3, dtype=torch.uint8).numpy()
    os.makedirs("DIR")
    for i, image in enumerate(pictures):
        image_files.Image.fromarray(image).save(f"DIR/{i}.png")
    monkeypatch.setattr(image_files, "BATCH_BYTES", 3 * 64 * 64)
    monkeypatch.setattr(device, "cores", lambda: 2)
    monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_storage", None)  # of tensors on their way
    assert len(load_dataset("folder", "DIR", torch.device("cpu"), image_size=64).train_images) == 40


def test_memory_that_is_used_up_is_a_line_with_advice(run_main, run_lincls, monkeypatch, capsys):
    errors = [MemoryError("Unable to allocate 4.00 GiB for an array"), RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "17179869184 bytes. Error code 12 (Cannot allocate memory)"), torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB")]
    calls = [(pretraining, "make_forward", lambda: run_main("--epochs", 1), "main.py: error: ", "lower --batch_size"),
             (main_lincls.knn, "extract_features", run_lincls, "main_lincls.py: error: ", "lower --batch_size"),
             (main_lincls.linear, "fit_lbfgs", lambda: run_lincls("--features", "cached"), "main_lincls.py: error: ",
              "--fraction")]
    for error in errors:
        for module, name, call, begin, advice in calls:
            def fail(*args, **options):
                raise error

            with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^1$"):
                patch.setattr(module, name, fail)
                call()
            printed = capsys.readouterr().err
            assert printed.startswith(f"{begin}out of memory (") and advice in printed and printed.count("\n") == 1
            assert "llocate" in printed and "enforce" not in printed
    assert cli.out_of_memory(RuntimeError("shapes cannot be multiplied")) is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_limit_of_memory_ends_training_with_a_line(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (9 * 2**30, 9 * 2**30))

    words = [*SMALL, "--train_size", "9000", "--batch_size", "8192", "--width", "64", "--epochs", "1"]
    done = subprocess.run([sys.executable, REPO / "main.py", *words], cwd=tmp_path, env=CPU_ONLY, preexec_fn=limit,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("main.py: error: out of memory (tried to allocate"), done.stderr
