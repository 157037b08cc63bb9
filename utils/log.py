"""log.jsonl: one JSON object a line, one line an epoch; and a table of runs from their logs:

    python -m utils.log FOLDER...
"""
import json
import os

from utils.checkpoint import read_json
from utils.cli import Parser

LOG = "log.jsonl"


def append(folder, records):
    """Append lines to the log and flush them to the disk. All or none: raises OSError that names the file."""
    path = os.path.join(folder, LOG)
    content = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(content) < len(content):  # what a disk has room for
                    raise OSError("disk full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error})") from error


def truncate(folder, epoch):
    """Drop the lines after an epoch, which a resumed run writes again, and an unfinished last line."""
    with open(os.path.join(folder, LOG), "rb+") as file:
        end = 0
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["epoch"] > epoch:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        file.truncate(end)


def read(folder, empty=False):
    """The log as a list of dicts of numbers, by epoch; an unfinished last line is ignored.

    Raises OSError without a log, and ValueError if it is not one or, unless `empty`, has no epoch.
    """
    path = os.path.join(folder, LOG)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder}: no {LOG}; not a run's folder")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    try:
        records = [json.loads(line) for line in lines]
        records = sorted({record["epoch"]: record for record in records}.values(), key=lambda record: record["epoch"])
        if not all(isinstance(value, (int, float)) for record in records for value in record.values()):
            raise ValueError("not a number")
    except (ValueError, KeyError, TypeError) as error:
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
    knn = last(records, "knn200")
    return (f"loss {records[-1]['loss']:.4f}, std {records[-1]['std']:.3f}, "
            + (f"kNN {knn:.2f} %, " if knn is not None else "") + f"{records[-1]['views_per_s']:,.0f} views/s")


def summarize(folder):
    """The last figures of a run as a dict: what to print and what to put into tables."""
    records = read(folder)
    path = os.path.join(folder, "config.json")
    config = read_json(path) if os.path.exists(path) else {}
    figures = {"epoch": records[-1]["epoch"]}
    figures |= {
        key: value for key in ("loss", "std", "knn1", "knn200", "train_loss", "test_top1") if
        (value := last(records, key)) is not None
    }
    if records[0]["epoch"] == 0:
        figures["untrained knn200"] = records[0]["knn200"]
    if "test_top1" in figures:
        figures["best_top1"] = max(record["test_top1"] for record in records)
    seconds = records[-1].get("time") or sum(record.get("seconds", 0) for record in records)
    return figures | {"minutes": seconds / 60, "device": config.get("device", "")}


def make_parser():
    parser = Parser(prog="python -m utils.log", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder, with its log.jsonl")
    return parser


def main(argv=None):
    parser = make_parser()
    folders = parser.parse_args(argv).folders
    with parser.user_errors():
        rows = {folder: summarize(folder) for folder in folders}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"| run | {' | '.join(keys)} |\n| {' | '.join(['---'] * (len(keys) + 1))} |")
    for folder, row in rows.items():
        cells = [f"{row[key]:.2f}" if isinstance(row.get(key), float) else str(row.get(key, "–")) for key in keys]
        print(f"| {os.path.basename(os.path.normpath(folder))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
