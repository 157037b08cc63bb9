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
    "--width 0", "--json no/rows.json", "--gpu 99", "--what time", "--precision fp16", "--plain nothing"])
def test_bad_input_is_one_line(refused, no_gpu, option):
    refused(speed.main, option.split(), option.split()[1])


@pytest.mark.slow
def test_rows_have_both_programs(tmp_path):
    """Without what utils sets: the plain script runs in the environment in which speed.py was started."""
    options = f"--width 4 --batch_size 16 --rounds 1 --json {tmp_path}/rows.json"
    output = subprocess.run([sys.executable, "benchmarks/speed.py", *options.split()], cwd=REPO, text=True, check=True,
                            capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["what"], row["width"], row["batch"]) for row in rows] == [("end_to_end", 4, 16), ("views", 4, 16)]
    for row in rows:
        (ours,), (plain,) = row["ours"], row["plain"]
        assert ours > 0 < plain and row["better"] == pytest.approx(ours / plain)
        figures = f"{row['what']}, width 4, batch 16: plain [{plain}], ours [{ours}] views/s, {row['better']:.2f} times"
        assert figures in output


def test_the_plain_script_gets_an_environment_without_what_utils_adds():
    code = "import os; before = dict(os.environ); from benchmarks import speed; assert speed.ENVIRONMENT == before; " \
        "assert speed.ENVIRONMENT != dict(os.environ)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, check=True)
