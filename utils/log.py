"""log.jsonl: one JSON object a line, one line an epoch; and a table of runs from it.

    python -m utils.log FOLDER...        # prints the last figures of each run
"""
import json
import os

from utils import checkpoint
from utils.cli import Parser

LOG = "log.jsonl"
OF_SEEDS = "test_top1_of_seeds"  # the one figure of a line that is a list


def append(folder, record):
    """Add one line to the folder's log, on the disk when this returns; a line that a killed run left unfinished is
    closed first. Raises OSError that names the file."""
    path = os.path.join(folder, LOG)
    try:
        with open(path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error})") from error


def write_json(path, content):
    """Write a JSON file, whole or not at all. Raises OSError that names it."""
    checkpoint.write(path, f"{json.dumps(content, indent=2)}\n".encode())


def read_json(path):
    """What is in a JSON file. Raises OSError, and ValueError for a file that is none."""
    try:
        with open(path) as file:
            return json.load(file)
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{path}: no JSON ({error})") from error


def read(folder, empty=False):
    """The log as a list of dicts, by epoch. An epoch that a resumed run did again counts once, as it was
    last written; an unfinished line does not count. Raises OSError if there is no log, and, unless it may be empty,
    ValueError if it has no epoch; ValueError if a figure is no number."""
    path = os.path.join(folder, LOG)
    records = {}
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder}: no {LOG} in it; a run's folder is needed")
    with open(path, errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("epoch"), int):
                for name, value in record.items():
                    if not isinstance(value, (int, float)) and name != OF_SEEDS:
                        raise ValueError(f"{path}: epoch {record['epoch']}: {name} is {value!r:.50} and not a number")
                records[record["epoch"]] = record
    if not records and not empty:
        raise ValueError(f"{path!r}: no epoch in it")
    return [records[epoch] for epoch in sorted(records)]


def last(records, key):
    """The last value of `key` in the records and its epoch, or None and None."""
    for record in reversed(records):
        if key in record:
            return record[key], record["epoch"]
    return None, None


def summarize(folder):
    """One line of text on a run of main.py or main_lincls.py."""
    records = read(folder)
    if any("test_top1" in record for record in records):
        final, epoch = last(records, "test_top1")
        return f"linear top-1 {final:.2f} % (epoch {epoch})"
    parts = [f"epoch {records[-1]['epoch']}"]
    for key, label, form in (
        ("loss", "loss", ".4f"), ("std", "std", ".3f"), ("knn1", "kNN k=1", ".2f"), ("knn200", "k=200", ".2f"),
    ):
        value, _ = last(records, key)
        untrained, _ = last([record for record in records if record["epoch"] == 0], key)
        if value is not None:
            parts.append(f"{label} {value:{form}}" + ("" if untrained is None else f" (untrained {untrained:{form}})"))
    return "  ".join(parts)


def make_parser():
    parser = Parser(prog="python -m utils.log", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder, with its log.jsonl")
    return parser


def main(argv=None):
    parser = make_parser()
    folders = parser.parse_args(argv).folders
    width = max(len(folder) for folder in folders)
    parser.for_each(folders, lambda folder: print(f"{folder:{width}}  {summarize(folder)}"))


if __name__ == "__main__":
    main()
