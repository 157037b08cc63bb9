"""benchmarks/speed.py: both programs do the same work, and both are in what it writes."""
import json
import os
import subprocess
import sys

import pytest

from benchmarks import speed
from conftest import REPO
from utils.augment import MEAN, STD


def test_the_plain_views_are_simsiams():
    views = str(speed.TRANSFORM)
    for part in ("scale=(0.2, 1.0)", "brightness=(0.6, 1.4)", "hue=(-0.1, 0.1)", "p=0.8", "Grayscale(p=0.2)",
                 f"mean={MEAN}, std={STD}"):
        assert part in views


@pytest.mark.parametrize("option", [
    "--width 0", "--json no/rows.json", "--gpu 99", "--precision fp16", "--plain nothing"])
def test_bad_input_is_one_line(refused, no_gpu, option):
    refused(speed.main, option.split(), option.split()[1])


@pytest.mark.slow
def test_both_programs_are_in_what_it_writes(tmp_path):
    options = f"--width 4 --batch_size 16 --rounds 1 --json {tmp_path}/row.json"
    output = subprocess.run([sys.executable, "benchmarks/speed.py", *options.split()], cwd=REPO, text=True, check=True,
                            capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).stdout
    row = json.loads((tmp_path / "row.json").read_text())
    (ours,), (plain,) = row["ours"], row["plain"]
    assert (row["width"], row["batch"]) == (4, 16) and ours > 0 < plain
    assert row["better"] == pytest.approx(ours / plain) and f"ours     [{ours}]" in output


def test_the_plain_script_gets_an_environment_without_what_utils_adds():
    code = "import os; before = dict(os.environ); from benchmarks import speed; assert speed.ENVIRONMENT == before; " \
        "assert speed.ENVIRONMENT != dict(os.environ)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, check=True)
