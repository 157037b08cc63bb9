"""log.jsonl, one JSON object a line and one line an epoch, and what it says: figures, tables, a collapse."""
import contextlib
import json
import math
import os

from utils.checkpoint import read_json

LOG = "log.jsonl"
COLLAPSE_STD = 0.1   # of feature_std, where no batch norm keeps it above 0
COLLAPSE_EPOCHS = 3  # in a row below the threshold, before the warning


def append(folder, records):
    """Append lines to the log and flush them to the disk: all or none. Raises OSError that names the file."""
    path, before = os.path.join(folder, LOG), size(folder)
    try:
        with open(path, "ab") as file:
            file.write("".join(f"{json.dumps(record)}\n" for record in records).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        raise OSError(f"{path} could not be written ({error.strerror or error})") from error


def size(folder):
    """Bytes of the log; 0 if there is none."""
    path = os.path.join(folder, LOG)
    return os.path.getsize(path) if os.path.exists(path) else 0


def truncate(folder, epoch):
    """Drop the lines after an epoch, which a resumed run writes again, and an unfinished last line."""
    with open(os.path.join(folder, LOG), "rb+") as file:
        end = 0
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if line.endswith(b"\n") and json.loads(line)["epoch"] <= epoch:
                    end += len(line)
                    continue
            break
        file.truncate(end)


def read(folder, empty=False):
    """The log as a list of dicts of numbers; an unfinished last line is ignored. Raises OSError without a log, and
    ValueError if it is not one or, unless `empty`, has no epoch."""
    path = os.path.join(folder, LOG)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder}: no {LOG}; not a run's folder")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    try:
        records = [json.loads(line) for line in lines]
        if not all(isinstance(value, (int, float)) for each in records for value in (each["epoch"], *each.values())):
            raise ValueError("not a number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the log of a run ({error})") from error
    if not records and not empty:
        raise ValueError(f"{path}: no epoch yet")
    return records


def last(records, key):
    """The last value of `key` in the records, or None."""
    return next((record[key] for record in reversed(records) if key in record), None)


def figures(records):
    """The newest figures of a pre-training in words, short enough to stand beside a bar; '' if there are none."""
    if "loss" not in (records or [{}])[-1]:
        return ""
    shown = "".join(f"{words} {last(records, key):.{digits}f}{unit}, " for key, words, digits, unit in (
        ("knn200", "kNN", 2, " %"), ("effective_rank", "rank", 1, "")) if last(records, key) is not None)
    return "loss {loss:.4f}, std {std:.3f}, {}{views_per_s:,.0f} views/s".format(shown, **records[-1])


def summarize(folder):
    """The last figures of a run as a dict: a row of the table."""
    records = read(folder)
    keys = ("epoch", "loss", "std", "knn1", "knn200", "effective_rank", "train_loss", "test_top1")
    row = {key: last(records, key) for key in keys if last(records, key) is not None}
    if records[0]["epoch"] == 0 and "knn200" in records[0]:
        row["untrained knn200"] = records[0].get("knn200")
    if "test_top1" in row:
        row["best test_top1"] = max(record["test_top1"] for record in records)
    row["minutes"] = (last(records, "time") or sum(record.get("seconds", 0) for record in records)) / 60
    path = os.path.join(folder, "config.json")
    return row | ({"device": read_json(path).get("device")} if os.path.exists(path) else {})


def table(folders):
    """The last figures of runs as a Markdown table. Raises OSError and ValueError for a folder without a log."""
    rows = [{"run": os.path.basename(os.path.normpath(folder)), **summarize(folder)} for folder in folders]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys)]
    for row in rows:
        cells = (row.get(key, "–") for key in keys)
        lines.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def collapse_std(batch_size, head_bn="default"):
    """The feature_std (healthy: about 1) below which the outputs have collapsed. Behind a batch norm, 2 / sqrt(B) means
    that all outputs but one point the same way, 2 sqrt(2 / B) that all but two do: hence 3 / sqrt(B), at most 0.6."""
    if head_bn in ("none", "hidden"):
        return COLLAPSE_STD
    return max(COLLAPSE_STD, min(3 / math.sqrt(batch_size), 0.6))


def collapse_warning(records, batch_size, head_bn):
    """A warning, once, when std has been below collapse_std for COLLAPSE_EPOCHS epochs of the log; else None."""
    least = collapse_std(batch_size, head_bn)
    low = [record["std"] < least for record in records if "std" in record]
    if len(low) < COLLAPSE_EPOCHS or not all(low[-COLLAPSE_EPOCHS:]) or any(low[:-COLLAPSE_EPOCHS][-1:]):
        return None
    return (f"epoch {records[-1]['epoch']}: std {records[-1]['std']:.4f}, for {COLLAPSE_EPOCHS} epochs below "
            f"{least:.2g} (healthy: about 1): the outputs have collapsed, whatever the loss. Without stop-gradient or "
            "predictor this is expected (Sec. 4); else lower --learning_rate or raise --batch_size")
