"""The benchmark: what it measures is what main.py does, and what it writes has the promised form."""
import json
import os
import subprocess
import sys

import pytest
import torch

import main as pretraining
import simsiam
from benchmarks import floor, plain, speed
from benchmarks.ours import Ours
from benchmarks.switches import SWITCHES, default_switches
from conftest import REPO
from utils.augment import MEAN, STD
from utils.device import autocast, memory_layout

CPU = torch.device("cpu")
TINY = "--width 4 --batch 16 --rounds 2 --seconds 0.2".split()
SETTINGS = {"device": "cpu", "width": 4, "batch": 16, "data_root": "nowhere", "switches": default_switches("cpu")}


@pytest.fixture
def few_pictures(monkeypatch, shapes):
    monkeypatch.setattr("benchmarks.ours.host_images", lambda settings: shapes.train_images.permute(0, 2, 3, 1).numpy())


def test_our_step_is_main_pys(few_pictures, no_gpu, shapes):
    """Three steps as main.py makes them, on the same pictures with the same draws: the same weights, bit for bit."""
    ours = Ours(SETTINGS)
    torch.manual_seed(0)
    layout = memory_layout(CPU, 4, 16)
    model = simsiam.SimSiam(simsiam.resnet18(4)).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, 0.9, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = pretraining.make_train_step(model, optimizer, scaler, autocast(CPU, "fp32"), False, layout)
    inputs = list(ours.epoch(3))
    model.train()
    for given in inputs:
        step(*given)
    ours.train(inputs, ours.train_step)
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("name", [name for name in SWITCHES if name not in ("compile", "cuda_graph")])
def test_every_switch_still_trains(few_pictures, name):
    switches = {**SETTINGS["switches"], name: not SETTINGS["switches"][name]}
    ours = Ours({**SETTINGS, "switches": switches})
    before = ours.model.backbone.conv1.weight.clone()
    assert ours.end_to_end(2) > 0 and ours.step(1) > 0
    assert not torch.equal(before, ours.model.backbone.conv1.weight)


def test_the_plain_views_are_simsiams():
    """The yardstick's transforms, as torchvision prints them, have the recipe's numbers."""
    text = str(plain.TwoViews(None).transform)
    for part in ("scale=(0.2, 1.0)", "ratio=(0.75, 1.3333)", "brightness=(0.6, 1.4)", "hue=(-0.1, 0.1)", "p=0.8", "Grayscale(p=0.2)",
                 f"mean={MEAN}", f"std={STD}"):
        assert part in text


def test_floor():
    """With arithmetic or memory for nothing, the floor is the other alone: 18.9 MB and 3.33 GFLOP a view in bf16."""
    backbone = simsiam.resnet18()
    assert floor.seconds_per_view(backbone, 1e30, 1.0, 2) == pytest.approx(18.9e6, rel=0.01)
    assert floor.seconds_per_view(backbone, 1.0, 1e30, 2) == pytest.approx(3.33e9, rel=0.01)


def test_limits(few_pictures, monkeypatch):
    """The arithmetic is counted: 3.33 GFLOP a view at width 64, and 1 to 2 % for the heads."""
    monkeypatch.setattr(floor, "matmul_peak", lambda *args: 8e14)
    monkeypatch.setattr(floor, "copy_bandwidth", lambda *args: 3e12)
    limits = Ours({**SETTINGS, "width": 64}).limits()
    assert 3.33e9 * 1.005 < limits["flop_per_view"] < 3.33e9 * 1.025
    bf16 = floor.seconds_per_view(simsiam.resnet18(), 8e14, 3e12, 2)
    assert bf16 == pytest.approx(0.836 / 100_000, rel=0.01)  # the arithmetic done by hand: 0.84 s an epoch
    assert bf16 < limits["floor_per_view"] < 2 * bf16        # float32 here: twice the bytes, the same arithmetic


def run_command(*args):
    """In a process of its own, on the CPU."""
    command = [sys.executable, "benchmarks/speed.py", *map(str, args)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=REPO, env=hidden, capture_output=True, text=True, check=True)


def test_the_command_writes_its_rows(tmp_path):
    """At a tiny size: a row for each figure and pipeline, and the table last."""
    path = tmp_path / "rows.json"
    command = ["--what", "end_to_end", "memory", *TINY, "--rounds", "1", "--data_root", tmp_path, "--json", path]
    done = run_command(*command)
    rows = json.loads(path.read_text())
    assert len(rows) == 4
    for row in rows:
        assert set(row) == {"what", "pipeline", "width", "batch", "unit", "median", "low", "high", "runs"}
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["width"] == 4 and row["batch"] == 16
    assert {(row["what"], row["pipeline"]) for row in rows} == {
        (what, pipeline) for what in ("end_to_end", "memory") for pipeline in ("plain", "ours")
    }
    assert "size: " in done.stdout.splitlines()[0] and "end_to_end" in done.stdout.splitlines()[-1]


def test_the_command_turns_switches(tmp_path):
    """One switch: a row for ours as it is and one for ours without, of the step and of training; no plain pipeline."""
    path = tmp_path / "rows.json"
    done = run_command("--switches", "channels_last", *TINY, "--data_root", tmp_path, "--json", path)
    rows = json.loads(path.read_text())
    assert {(row["what"], row["pipeline"], row["switch"]) for row in rows} == {
        (what, "ours", f"{beside}channels_last off") for what in ("step", "end_to_end") for beside in ("", "beside ")
    }
    medians = {(row["what"], row["switch"]): row["median"] for row in rows}
    ratio = medians["end_to_end", "channels_last off"] / medians["end_to_end", "beside channels_last off"]
    assert done.stdout.splitlines()[-1].endswith(f": {ratio:.3f} times")


@pytest.mark.parametrize("args", [
    ["--width", "0"], ["--json", "no/such/rows.json"], ["--gpu", "99"], ["--what", "nothing"],
    ["--switches", "nothing"], ["--switches", "cuda_graph"], ["--switches", "fused", "--what", "step"],
])
def test_bad_input_is_one_line(args, no_gpu, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed.main(args)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
