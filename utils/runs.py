"""Runs read from their folders, those that differ in the seed alone together: what the figures of runs are drawn from."""
import os
import re
import statistics
from typing import NamedTuple

from utils import log
from utils.resume import EVALUATION, PRETRAINING, STUDY
from utils.run import CONFIG, read_config
from utils.style import printable


class Line(NamedTuple):
    """One run, or several that differ in the seed alone, in a figure."""

    label: str
    runs: list     # the log records of each
    settings: dict


def read_settings(folder):
    """The settings in a folder's config.json, or {} where there is none. Raises ValueError if it is no run's."""
    return read_config(folder)["settings"] if os.path.exists(os.path.join(folder, CONFIG)) else {}


def is_linear(records):
    """Whether they are of a linear evaluation."""
    return any("test_top1" in record for record in records)


def read_lines(folders):
    """The runs as Lines, by their recipes; a folder given twice counts once. Raises OSError and ValueError for a folder
    without a log, and for a pre-training beside an evaluation."""
    groups, kinds = {}, {}
    for folder in {os.path.realpath(folder): folder for folder in folders}.values():
        records, settings = log.read(folder), read_settings(folder)
        linear = is_linear(records)
        names = (*EVALUATION.recipe, "pretrained") if linear else PRETRAINING.recipe
        whole = settings if linear else {**STUDY, **settings}
        recipe = tuple((name, str(whole.get(name))) for name in names if name != "seed") if settings else folder
        groups.setdefault(recipe, []).append((folder, records, settings))
        kinds[linear] = folder
    if len(kinds) == 2:
        raise ValueError(f"{kinds[False]} is a pre-training and {kinds[True]} a linear evaluation: they have no figures in common")
    return [Line(label_of(runs), [records for _, records, _ in runs], runs[0][2]) for runs in groups.values()]


def label_of(runs):
    """What to call one or several runs."""
    names = [printable(os.path.basename(os.path.abspath(folder))) for folder, _, _ in runs]
    if len(names) == 1:
        return names[0]
    common = re.sub(r"[-_ ]*(seed)?[-_ ]*$", "", os.path.commonprefix(names))
    if len(common) < 3 or common in names:
        common = ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"
    seeds = {settings.get("seed") for _, _, settings in runs}
    return f"{common}: {len(runs)} {'seeds' if len(seeds) == len(runs) else 'runs'}"


def spread(runs, key):
    """Of the epochs in which all runs have `key`: the epochs, the mean over the runs, and their standard deviation, each a list.
    One run has its log's own deviation, of an evaluation with several seeds, or zeros."""
    values = [{record["epoch"]: record[key] for record in records if key in record} for records in runs]
    epochs = sorted(set.intersection(*map(set, values)))
    columns = [[of_run[epoch] for of_run in values] for epoch in epochs]
    own = {record["epoch"]: record.get(f"{key}_std", 0.0) for record in runs[0]}
    return epochs, [statistics.fmean(column) for column in columns], [
        statistics.stdev(column) if len(runs) > 1 else own[epoch] for epoch, column in zip(epochs, columns)
    ]
