"""Runs read from their folders, those that differ in the seed alone together: what the figures of runs are drawn from."""
import os
import re
import statistics
from typing import NamedTuple

from utils import log
from utils.resume import EVALUATION, PRETRAINING, STUDY
from utils.run import CONFIG, read_config
from utils.style import printable


class Run(NamedTuple):
    """One run in its folder."""

    folder: str
    records: list  # of its log
    config: dict   # config.json, or {} where there is none

    @property
    def settings(self):
        return self.config.get("settings", {})

    @property
    def is_linear(self):
        return is_linear(self.records)

    @property
    def recipe(self):
        """What all runs that differ in the seed alone have in common; of a run without config.json its folder."""
        if not self.config:
            return self.folder
        names = (*EVALUATION.recipe, "pretrained") if self.is_linear else PRETRAINING.recipe
        whole = self.settings if self.is_linear else {**STUDY, **self.settings}
        return tuple((name, str(whole.get(name))) for name in names if name != "seed")


class Line(NamedTuple):
    """One run, or several that differ in the seed alone, in a figure."""

    label: str
    runs: list     # the log records of each
    settings: dict


def config_of(folder):
    """What is in a folder's config.json, or {} where there is none. Raises ValueError if it is no run's."""
    return read_config(folder) if os.path.exists(os.path.join(folder, CONFIG)) else {}


def read_settings(folder):
    """The settings in a folder's config.json, or {} where there is none. Raises ValueError if it is no run's."""
    return config_of(folder).get("settings", {})


def read_run(folder):
    """The run in a folder. Raises OSError and ValueError for a folder without a log, or with a config.json that is no run's."""
    return Run(folder, log.read(folder), config_of(folder))


def by_recipe(runs):
    """The runs in lists of those that differ in the seed alone."""
    groups = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    return list(groups.values())


def is_linear(records):
    """Whether they are of a linear evaluation."""
    return any("test_top1" in record for record in records)


def read_lines(folders):
    """The runs as Lines, by their recipes; a folder given twice counts once. Raises OSError and ValueError for a folder
    without a log, and for a pre-training beside an evaluation."""
    runs = [read_run(folder) for folder in {os.path.realpath(folder): folder for folder in folders}.values()]
    kinds = {run.is_linear: run.folder for run in runs}
    if len(kinds) == 2:
        raise ValueError(f"{kinds[False]} is a pre-training and {kinds[True]} a linear evaluation: they have no figures in common")
    return [Line(label_of(group), [run.records for run in group], group[0].settings) for group in by_recipe(runs)]


def label_of(runs):
    """What to call one or several runs."""
    names = [printable(os.path.basename(os.path.abspath(run.folder))) for run in runs]
    if len(names) == 1:
        return names[0]
    common = re.sub(r"[-_ ]*(seed)?[-_ ]*$", "", os.path.commonprefix(names))
    if len(common) < 3 or common in names:
        common = ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"
    seeds = {run.settings.get("seed") for run in runs}
    return f"{common}: {len(runs)} {'seeds' if len(seeds) == len(runs) else 'runs'}"


def mean_and_std(values, digits):
    """The mean, and the standard deviation over the seeds where there are several, in words."""
    text = f"{statistics.fmean(values):.{digits}f}".replace("-", "−")
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


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
