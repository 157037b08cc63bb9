"""Draw imgs/few-labels.png: accuracy against the share of the labels, from the results.json of these runs.

    python logs/few-labels/plot.py
"""
import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from utils import plot  # noqa: E402

WAYS = {"frozen, linear classifier": ("finetuned", "linear_top1"), "fine-tuned": ("finetuned", "test_top1"),
        "from random weights, as many steps": ("scratch", "test_top1")}

with plot.figure(HERE.parents[1] / "imgs", "few-labels", 4.6, 3.0) as drawing:
    axes = drawing.subplots()
    for (words, (way, key)), color in zip(WAYS.items(), plot.COLORS):
        accuracies = {}
        for path in sorted(HERE.glob(f"cifar10-{way}-*pct-seed*/results.json")):
            percent = int(path.parent.name.split("-")[2].removesuffix("pct"))
            accuracies.setdefault(percent, []).append(json.loads(path.read_text())[key])
        shares = sorted(accuracies)
        means = [statistics.fmean(accuracies[share]) for share in shares]
        spreads = [statistics.stdev(accuracies[share]) if len(accuracies[share]) > 1 else 0 for share in shares]
        axes.errorbar(shares, means, spreads, marker="o", markersize=3, capsize=3, color=color, label=words)
    axes.set(xscale="log", xlabel="share of the labels (%)", ylabel="test top-1 (%)")
    axes.set_xticks(shares, [f"{share}" for share in shares])
    axes.minorticks_off()
    axes.grid(True)
    axes.legend()
