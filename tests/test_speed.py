"""benchmarks/speed.py: both programs do the same work, and both are in what it writes."""
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import plain, speed
from conftest import REPO
from utils.augment import MEAN, STD
from utils.knn import knn_predict


def test_the_plain_knn_and_the_plain_views_are_simsiams():
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(600, 8, generator=generator), torch.randn(900, 8, generator=generator)
    search = queries, bank, torch.randint(10, (900,), generator=generator), 200, 0.1, 10
    assert (plain.knn_predict(*search) == knn_predict(*search)).double().mean() > 0.99  # but for ties
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
    assert [(row["what"], row["unit"]) for row in rows] == list(speed.UNITS.items())
    for row in rows:
        (ours,), (base,) = row["ours"], row["plain"]
        better = ours / base if row["unit"] == "views/s" else base / ours
        assert ours > 0 < base and row["better"] == pytest.approx(better)
        assert f"{row['what']:10} {row['unit']:7}" in output and f"{row['better']:.2f}\n" in output
