"""log.jsonl, one JSON object a line and one line an epoch, and what it says: tables, a collapse."""
import json
import math
import os

from utils import checkpoint

LOG = "log.jsonl"
COLLAPSE_STD = 0.1   # of feature_std, where no batch norm keeps it above 0
COLLAPSE_EPOCHS = 3  # in a row below the threshold, before the warning
TABLE = ("epoch", "loss", "std", "knn1", "knn200", "effective_rank", "train_loss", "test_top1")


def write(folder, records):
    """Write the whole log atomically. Raises OSError that names the file."""
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    checkpoint.write(os.path.join(folder, LOG), lines.encode())


def read(folder, empty=False):
    """The log as a list of dicts of numbers. Raises OSError, and ValueError if it is none or has no epoch."""
    path = os.path.join(folder, LOG)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder}: no {LOG}; not a run's folder")
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        values = [value for record in records for value in (record["epoch"], *record.values())]
        if not all(isinstance(value, (int, float)) for value in values):
            raise ValueError("not a number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the log of a run ({error})") from error
    if not records and not empty:
        raise ValueError(f"{path}: no epoch yet")
    return records


def last(records, key):
    """The last value of `key` in the records, or None."""
    return next((record[key] for record in reversed(records) if key in record), None)


def summary(records):
    """The newest metrics of a pre-training in words, to stand beside a bar; '' if there are none."""
    if not records or "loss" not in records[-1]:
        return ""
    words = "loss {loss:.4f}, std {std:.3f}, ".format(**records[-1])
    for key, form in (("knn200", "kNN {:.2f} %, "), ("effective_rank", "rank {:.1f}, ")):
        value = last(records, key)
        words += "" if value is None else form.format(value)
    return words + "{views_per_s:,.0f} views/s".format(**records[-1])


def row(folder):
    """The last metrics of a run as a dict: a row of the table."""
    records, path = read(folder), os.path.join(folder, "config.json")
    cells = {"run": os.path.basename(os.path.normpath(folder))} | {key: last(records, key) for key in TABLE}
    cells["untrained knn200"] = records[0].get("knn200") if records[0]["epoch"] == 0 else None
    cells["best test_top1"] = max((each["test_top1"] for each in records if "test_top1" in each), default=None)
    cells["minutes"] = (last(records, "time") or sum(each.get("seconds", 0) for each in records)) / 60
    cells["device"] = checkpoint.read_json(path).get("device") if os.path.exists(path) else None
    return {key: value for key, value in cells.items() if value is not None}


def table(folders):
    """The last metrics of runs as a Markdown table. Raises OSError and ValueError without a log."""
    rows = [row(folder) for folder in folders]
    keys = list(dict.fromkeys(key for cells in rows for key in cells))
    lines = [keys, ["---"] * len(keys)]
    for cells in rows:
        values = [cells.get(key, "–") for key in keys]
        lines.append([f"{value:.2f}" if isinstance(value, float) else str(value) for value in values])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def collapse_std(settings):
    """The feature_std (healthy: about 1) below which the outputs of a run have collapsed. Behind a batch norm, 2 /
    sqrt(B) means that all but one point the same way, 2 sqrt(2 / B) that all but two do: 3 / sqrt(B), at most 0.6."""
    if settings.get("head_bn") in ("none", "hidden"):
        return COLLAPSE_STD
    batch = settings.get("bn_batch") or settings["batch_size"]  # older runs lack bn_batch and head_bn
    return max(COLLAPSE_STD, min(3 / math.sqrt(batch), 0.6))


def collapse_warning(records, settings):
    """A warning, once, when std has been below collapse_std for COLLAPSE_EPOCHS epochs; else None."""
    std = [record["std"] for record in records if "std" in record]
    if len(std) < COLLAPSE_EPOCHS or "std" not in records[-1]:
        return None
    threshold = collapse_std(settings)
    low = [value < threshold for value in std]
    if not all(low[-COLLAPSE_EPOCHS:]) or any(low[:-COLLAPSE_EPOCHS][-1:]):  # or warned before
        return None
    return (f"epoch {records[-1]['epoch']}: std {std[-1]:.4f}, for {COLLAPSE_EPOCHS} epochs below {threshold:.2g} "
            "(healthy: about 1): the outputs have collapsed, whatever the loss. Without stop-gradient or predictor "
            "this is expected (Sec. 4); else lower --learning_rate or raise --batch_size")
