"""benchmarks/speed.py: both programs do the same work, and both are in what it writes."""
import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import plain, speed
from conftest import REPO
from utils.augment import MEAN, STD


def test_the_plain_views_are_simsiams():
    views = str(plain.TwoViews(None).transform)
    for part in ("scale=(0.2, 1.0)", "brightness=(0.6, 1.4)", "hue=(-0.1, 0.1)", "p=0.8", "Grayscale(p=0.2)",
                 f"mean={MEAN}, std={STD}"):
        assert part in views


@pytest.mark.parametrize("option", ["--width 0", "--json no/rows.json", "--gpu 99", "--what time", "--precision fp16"])
def test_bad_input_is_one_line(refused, no_gpu, option):
    refused(speed.main, option.split(), option.split()[1])


@pytest.mark.slow
def test_rows_have_both_programs(tmp_path):
    options = f"--width 4 --batch 16 --steps 2 --rounds 1 --data_root {tmp_path} --json {tmp_path}/rows.json".split()
    output = subprocess.run([sys.executable, "benchmarks/speed.py", *options], cwd=REPO, text=True, check=True,
                            capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["what"], row["width"], row["batch"]) for row in rows] == [("end_to_end", 4, 16), ("views", None, 16)]
    for row in rows:
        (ours,), (base,) = row["ours"], row["plain"]
        assert ours > 0 < base and row["better"] == pytest.approx(ours / base)
        figures = rf"{row['what']} +{base:,.0f} \(.*\) +{ours:,.0f} \(.*\) +{row['better']:.2f}\n"
        assert re.search(figures, output)


@pytest.mark.slow
def test_the_measurements_on_a_gpu_are_rehearsed_on_the_cpu(tmp_path):
    """benchmarks/gpu.sh: each part alone leaves its results; one that runs out of time leaves what it has so far."""
    small = {"GPU": "none", "PYTHON": sys.executable, "SPEED": "--width 4 --batch 16 --steps 2 --rounds 1",
             "MAIN": "--width 4 --dim 16 --pred_dim 8 --batch_size 16 --train_size 64 --test_size 20"}

    def rehearse(*parts, **more):
        command = ["bash", "benchmarks/gpu.sh", str(tmp_path), "shapes", *parts]
        return subprocess.run(command, cwd=REPO, env={**os.environ, **small, **more}, capture_output=True, text=True)

    done = rehearse("profile", "main", "speed", "views", "eager", "tuning", "graphs", "fp32", "linear")
    assert done.returncode == 0 and done.stdout.count("exit code 0") == 9, done.stdout
    for name in ("speed", "views", "eager", "tuning", "graphs", "fp32"):
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["rows"]) == 1
    assert "aten::" in (tmp_path / "profile-table.txt").read_text()
    assert (tmp_path / "main" / "log.jsonl").read_text().count("\n") == 4
    assert (tmp_path / "linear" / "results.json").exists()
    done = rehearse("main", "nothing", LIMIT="8", MAIN=f"{small['MAIN']} --epochs 100000")
    assert done.returncode == 1 and "exit code 124" in done.stdout and "no part nothing" in done.stdout, done.stdout
    assert (tmp_path / "main" / "log.jsonl").read_text().count("\n") > 4
