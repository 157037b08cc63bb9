"""The figures in the documents against the logs, results and weights that they come from."""
import itertools
import json
import re
import statistics

import pytest

from conftest import REPO
from utils import augment, log

LOGS = REPO / "logs"
RUNS = {"cifar10-w32-300ep": ("two CPU cores", "only logged"), "cifar10-w16-84ep": ("one CPU core", "released"),
        "cifar10-w32-4views-60ep": ("two CPU cores", "released")}
COLUMNS = {"loss": "loss", "std": "std", "std·√d": "std", "effective rank": "effective_rank", "kNN, k = 1 (%)": "knn1",
           "kNN, k = 200 (%)": "knn200", "kNN (%)": "knn200", "learning rate": "lr", "test top-1 (%)": "test_top1",
           "linear (%)": "linear_top1"}


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["settings"]


def last_of(name, key):
    return log.last(log.read(LOGS / name), key)


def cell(values, digits=2):
    """A mean as the tables write it, with the standard deviation over seeds if there are several."""
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{std}".replace("-", "−")


def agree(text, value):
    """Assert that a number as written is the value, rounded to the digits that it has."""
    written = text.replace("−", "-").split(" (")[0]
    digits = len(written.partition(".")[2])
    assert abs(float(written) - value) <= 0.5 * 10**-digits + 1e-9, (text, value)


def minutes_of(records):
    """Minutes of training."""
    return sum(record.get("seconds", 0) for record in records) / 60


def tables_in(name):
    """The tables of a document as (heading above, header cells, rows of cells)."""
    found, heading = [], ""
    for block in re.split(r"\n\n+", (REPO / name).read_text(encoding="utf-8")):
        lines = block.splitlines()
        if lines and lines[0].startswith("#"):
            heading = lines[0]
        if len(lines) > 2 and lines[1].startswith("| ---"):
            header, _, *rows = [[each.strip() for each in line.strip("|").split(" | ")] for line in lines]
            found.append((heading, header, rows))
    return found


def folder_of(heading):
    """The first folder of logs/ that a heading names; '*' is seed 0."""
    names = [name.replace("*", "0") for name in re.findall(r"`([^`]+)`", heading)]
    return next((LOGS / name for name in names if (LOGS / name).is_dir()), None)


def test_the_readmes_numbers_are_those_of_the_logs():
    """The results table from log.jsonl, and the table of weights from the .json beside them."""
    text = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())
    for run, (cores, kind) in RUNS.items():
        knn, linear = f"{last_of(run, 'knn200'):.2f}", f"{last_of(f'{run}-linear', 'test_top1'):.2f}"
        minutes, settings = minutes_of(log.read(LOGS / run)), settings_of(LOGS / run)
        time = f"{minutes / 60:.1f} hours" if minutes >= 120 else f"{minutes:.0f} minutes"
        views = "" if settings.get("views", 2) == 2 else f"{settings['views']} "
        assert settings["view_size"] == "16:0.75,24:0.25"
        width, epochs = settings["width"], settings["epochs"]
        differs = (f"width {width}, heads {settings['dim']} / {settings['pred_dim']}, batch {settings['batch_size']}, "
                   f"rate {settings['learning_rate']}, {views}views of 16 and 24 pixels, {settings['precision']}")
        assert f"| ours: {differs} | {epochs} | 1 | {knn} | {linear} (cached features) | {time}, {cores} |" in text
        assert f" trained for {time} " in text and f": kNN {knn} %, linear {linear} %" in text
        if kind != "released":
            continue
        about = json.loads((REPO / "weights" / f"simsiam_resnet18_w{width}_cifar10.json").read_text())
        figures = f"{about['accuracies']['knn200']:.2f} | {about['accuracies']['linear']:.2f}"
        assert f"{epochs} epochs, seed 0 | {figures} | {about['bytes'] / 1e6:.1f} MB |" in text
    for width in (16, 32):
        runs = [f"untrained/untrained-w{width}-seed{seed}" for seed in range(3)]
        knn, linear = ([last_of(f"{run}{part}", key) for run in runs]
                       for part, key in (("", "knn200"), ("-linear", "test_top1")))
        assert (f"| ours: width {width}, untrained, {settings_of(LOGS / runs[0])['precision']} | 0 | 3 | {cell(knn)} | "
                f"{cell(linear)} (cached features) |") in text


def test_tables_of_epochs_are_those_of_the_logs():
    """Each row that begins with an epoch, of the run in the heading; `a / b` are seeds."""
    checked = 0
    for heading, header, rows in tables_in("logs/README.md"):
        if header[0] != "after epoch":
            continue
        folders = [folder_of(heading)]
        if "seed*" in heading:  # the second recipe of that section has three seeds
            kind = "cifar10-5000-w16-b64-30ep" if rows[0][-1].count("/") == 2 else "cifar10-5000-w16-20ep"
            folders = sorted(LOGS.glob(f"{kind}-seed*"))
        records = [{record["epoch"]: record for record in log.read(folder)} for folder in folders]
        for number, *cells in rows:
            for name, text in zip(header[1:], cells):
                for part, of_run in zip(text.split(" / "), records, strict=text != "–"):
                    record = of_run[int(number.split()[0])]
                    if text != "–":
                        agree(part, record[COLUMNS[name]])
                        checked += 1
    assert checked > 150


def test_tables_of_runs_are_those_of_the_logs():
    """Each row that begins with a folder of the heading's: the last metrics, minutes, and settings."""
    checked = 0
    for heading, header, rows in tables_in("logs/README.md"):
        if header[0] != "folder":
            continue
        for name, *cells in rows:
            name = re.match(r"`([^`]+)`", name)[1]
            parent = folder_of(heading)
            folders = sorted(parent.glob(f"{name}-seed*")) or [parent / name]
            logs, settings = [log.read(folder) for folder in folders], settings_of(folders[0])
            known = {"rate": settings.get("learning_rate"), "batch": settings["batch_size"], "views": settings.get("views"),
                     "epochs": len(logs[0]), "minutes": statistics.fmean(map(minutes_of, logs))}
            for title, text in zip(header[1:], cells):
                if title in known:
                    agree(text.split(" of ")[0], known[title])
                    checked += 1
                elif title in COLUMNS and text != "–":
                    last = [log.last(records, COLUMNS[title]) for records in logs]
                    mean, _, std = text.partition(" ± ")
                    agree(mean, statistics.fmean(last))
                    assert bool(std) == (len(last) > 1), text
                    if std:
                        agree(std, statistics.stdev(last))
                    checked += 1
    assert checked > 60


def of_seeds(folder, variant, key):
    runs = sorted((LOGS / folder).glob(f"{variant}-seed*"))
    return [log.last(log.read(run), key) for run in runs]


@pytest.mark.parametrize(("table", "folder", "least"), [(0, "ablations-30ep", 2), (1, "ablations-10ep", 13)])
def test_the_study_is_that_of_its_logs(table, folder, least):
    _, header, rows = [each for each in tables_in("docs/ablations.md") if each[1][0] == "variant"][table]
    default = of_seeds(folder, "default", "knn200")
    found = [re.match("[a-z0-9-]+", row[0])[0] for row in rows]
    for variant, row in zip(found, rows):
        if variant == "the":  # network before training, see below
            continue
        values, cells = of_seeds(folder, variant, "knn200"), dict(zip(header, row))
        assert cells["kNN, k = 200 (%)"] == cell(values), variant
        assert cells["std·√d"].removesuffix(" (collapsed)") == cell(of_seeds(folder, variant, "std"), 3), variant
        if variant != "default":
            assert cells["minus default"] == cell([a - b for a, b in zip(values, default)]), variant
    assert len(found) >= least
    untrained = [log.read(run)[0]["knn200"] for run in sorted((LOGS / folder).glob("default-seed*"))]
    assert [row[1] for row in rows if row[0].startswith("the network before")] == [cell(untrained)]


def test_the_schedules_of_view_sizes_are_those_of_the_logs():
    """Means over seeds of kNN after the epoch whose undisturbed seconds come nearest to the minutes of a column."""
    seconds = {32: 142, 24: 95, 16: 62}
    _, header, rows = tables_in("docs/performance.md")[1]
    columns = [19, 28.5, 33]
    titles = [title.split("(")[0].strip() for title in header[1:]]
    assert titles == ["kNN after 19 minutes", "after 28 to 29", "after 33, the end"]
    for first, *cells in rows:
        sizes, _, epochs = first.replace(" (the default)", "").rpartition(", ")
        spent = list(itertools.accumulate(seconds[size] / 60 for size in augment.view_sizes(sizes, int(epochs))))
        logs = [log.read(run) for run in sorted(LOGS.glob(f"cifar10-w16-*{epochs}ep-seed*"))]
        assert len(logs) == 2
        for minutes, text in zip(columns, cells):
            measured = [record["epoch"] for record in logs[0] if record.get("knn200") and record["epoch"] > 0]
            epoch = min(measured, key=lambda epoch: abs(spent[epoch - 1] - minutes))
            assert text == cell([record["knn200"] for records in logs for record in records
                                 if record["epoch"] == epoch]), (first, minutes)


def test_the_table_of_few_labels_is_that_of_the_results():
    """Shares of CIFAR-10's labels: mean and spread over the draws, the images, and the epochs of both ways."""
    _, header, rows = next(each for each in tables_in("docs/data.md") if each[1][0] == "labels")
    assert header[1:4] == ["linear (%)", "fine-tuned (%)", "from random weights (%)"] and len(rows) == 3
    for labels, *cells, epochs in rows:
        percent, images = re.fullmatch(r"(\d+) % \(([\d,]+)\)", labels).groups()
        folders = {way: sorted((LOGS / "few-labels").glob(f"cifar10-{way}-{percent}pct-seed*"))
                   for way in ("finetuned", "scratch")}
        assert len(folders["finetuned"]) == len(folders["scratch"]) == (1 if percent == "100" else 3)
        for (way, key), text in zip((("finetuned", "linear_top1"), ("finetuned", "test_top1"), ("scratch", "test_top1")),
                                    cells, strict=True):
            assert text == cell([json.loads((each / "results.json").read_text())[key] for each in folders[way]])
        for each in itertools.chain(*folders.values()):
            settings = settings_of(each)
            assert (settings["epochs"], settings["fraction"]) == (int(epochs), int(percent) / 100)
        assert int(images.replace(",", "")) == 500 * int(percent)


def test_percents_in_the_documents_are_those_of_the_logs():
    """Numbers like 65.40, without ±, in README and docs/: from the beginning or end of a run, or of released weights."""
    known = {"91.94", "90.83", "90.51", "11.17"}  # published; millions of parameters
    for path in LOGS.rglob(log.LOG):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for key in ("knn1", "knn200", "test_top1", "linear_top1"):
            values = [record[key] for record in records if key in record]
            known |= {f"{value:.2f}" for value in (*values[:1], *values[-1:])}
    for path in (REPO / "weights").glob("*.json"):
        known |= {f"{value:.2f}" for value in json.loads(path.read_text())["accuracies"].values()}
    documents = [REPO / "README.md", *(REPO / "docs").glob("*.md")]
    found = [number for path in documents
             for number in re.findall(r"(?<![\d.−])\d\d\.\d\d(?!\d| ±)", path.read_text(encoding="utf-8"))]
    assert len(found) > 40 and set(found) <= known
