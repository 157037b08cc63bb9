"""Draw imgs/few-labels.png from the results beside this file: python logs/few-labels/plot.py"""
import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from utils import plot  # noqa: E402

SHARES = (1, 10, 100)  # percent of the labels
WAYS = {"frozen, linear classifier": ("finetuned", "linear_top1"), "fine-tuned": ("finetuned", "test_top1"),
        "from random weights, as many steps": ("scratch", "test_top1")}

with plot.figure(HERE.parents[1] / "imgs", "few-labels", 4.6, 3.0) as drawing:
    axes = drawing.subplots()
    for (words, (way, key)), color in zip(WAYS.items(), plot.COLORS):
        runs = [HERE.glob(f"cifar10-{way}-{share}pct-seed*/results.json") for share in SHARES]
        values = [[json.loads(path.read_text())[key] for path in paths] for paths in runs]
        spreads = [statistics.stdev(each) if len(each) > 1 else 0 for each in values]
        axes.errorbar(SHARES, [statistics.fmean(each) for each in values], spreads, marker="o", markersize=3,
                      capsize=3, color=color, label=words)
    axes.set(xscale="log", xlabel="share of the labels (%)", ylabel="test top-1 (%)", xticks=SHARES, xticklabels=SHARES)
    axes.minorticks_off()
    axes.grid(True)
    axes.legend()
