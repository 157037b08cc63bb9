"""The tables of results, from the logs of runs and the .json of released weights.

    python -m utils.results                            # of the runs in logs/, on the terminal
    python -m utils.results FOLDER...                  # of these runs
    python -m utils.results --update README.md         # into a document, between the marks of the tables

A run's linear evaluation is looked for beside it, in FOLDER-linear, and that of its untrained network in FOLDER-linear-untrained.
"""
import glob
import math
import os
import re
import statistics

from utils import checkpoint, log
from utils.cli import Parser
from utils.published import KNN, LINEAR
from utils.resume import STUDY
from utils.runs import by_recipe, read_run

NONE = "–"
LINEAR_OF, UNTRAINED = "-linear", "-untrained"
PAPER_WEIGHTS = "simsiam_resnet18_cifar10"  # of the paper's run: in the table before they are there
ENOUGH = 3                                  # seeds, from which on a mean and a spread say something

# The paper's recipe (appendix D), and the protocol of linear evaluation: what differs from them is said in the tables.
RECIPE = {
    "dataset": "cifar10", "train_size": None, "test_size": None, "width": 64, "batch_size": 512, "learning_rate": None, "dim": 2048, "pred_dim": 512, "num_proj_layers": 2, "momentum": 0.9, "weight_decay": 5e-4, **STUDY,
}
EPOCHS, RATE_PER_256 = 800, 0.03
PROTOCOL = {
    "features": "augmented", "optimizer": "sgd", "schedule": "step", "epochs": 100, "batch_size": 256, "lr": 30.0, "momentum": 0.9, "weight_decay": 0.0,
    "fraction": 1.0,
}
WORDS = {
    "dataset": "{}", "train_size": "{:,} training pictures", "test_size": "{:,} test pictures", "width": "width {}", "batch_size": "batch {}", "learning_rate": "rate {:g}", "epochs": "{} epochs", 
    "features": "{} features", "lr": "rate {:g}", "fraction": "{:g} of the labels",
}


# ---------------------------------------------------------------------------------------------------
# Words and numbers


def differences(settings, usual):
    """In what settings differ from the usual ones, in words; a setting that older runs did not have is the usual one."""
    for name, value in usual.items():
        given = settings.get(name, value)
        if name == "learning_rate":
            value = RATE_PER_256 * settings["batch_size"] / 256
            given = value if given is None or math.isclose(given, value) else given
        if given != value:
            yield WORDS.get(name, f"`--{name} {{}}`").format(given)


def architecture(settings):
    return settings["arch"].replace("resnet", "ResNet-")


def recipe_of(settings):
    """A network and its recipe in words: ResNet-18 alone is the paper's."""
    return ", ".join([architecture(settings), *differences(settings, RECIPE)])


def is_the_papers(settings):
    return recipe_of(settings) == "ResNet-18" and settings["epochs"] == EPOCHS


def mean_and_std(values):
    """The mean in percent, with the standard deviation where there are several values."""
    if not values or None in values:
        return NONE
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


# ---------------------------------------------------------------------------------------------------
# The runs


def is_whole(run):
    """Whether a run has come to the end of its epochs."""
    return bool(run.config) and run.records[-1]["epoch"] == run.settings["epochs"]


def is_a_result(folder):
    """Whether a folder has a finished pre-training on all of CIFAR-10 with its linear evaluation beside it."""
    if not os.path.exists(os.path.join(folder, log.LOG)) or not os.path.exists(os.path.join(folder + LINEAR_OF, log.LOG)):
        return False
    run = read_run(folder)
    settings = run.settings
    return not run.is_linear and is_whole(run) and settings["dataset"] == "cifar10" and settings["train_size"] is settings["test_size"] is None


def read_linear(run, untrained=False):
    """The linear evaluation beside a run, or None. Raises ValueError if it is of something else, or not finished."""
    folder = run.folder + LINEAR_OF + UNTRAINED * untrained
    if not os.path.exists(folder):
        return None
    linear = read_run(folder)
    if not linear.is_linear or not is_whole(linear):
        raise ValueError(f"{folder}: not a finished linear evaluation")
    where, file = os.path.split(linear.settings["pretrained"])
    if os.path.basename(where) != run.settings["trial"] or (file == "untrained.pt") != untrained:
        raise ValueError(f"{folder}: an evaluation of {linear.settings['pretrained']}, not of {run.folder}")
    return linear


def values_of(runs, value):
    """What value(run) is for these runs: each once, in words."""
    return ", ".join(sorted({str(found) for run in runs if (found := value(run)) is not None}))


def training_time(runs):
    """Minutes a run, the device, precision, version of torch and, where they are known, the dates."""
    key, words = ("wall_seconds", "") if all("wall_seconds" in record for run in runs for record in run.records if record["epoch"]) else ("seconds", " (steps alone)")
    minutes = statistics.fmean(sum(record.get(key, 0) for record in run.records) / 60 for run in runs)
    where = [
        values_of(runs, value) for value in (
            lambda run: run.config["device"], lambda run: run.settings["precision"],
            lambda run: f"torch {run.config['versions']['torch'].split('+')[0]}", lambda run: run.config.get("date"),
        )
    ]
    return ", ".join([f"{minutes:.0f} min{words}", *filter(None, where)])


def linear_cells(runs, untrained=False):
    """The last epoch's accuracy, with what differs from the protocol, and the best one's, over the evaluations of these runs."""
    linears = [read_linear(run, untrained) for run in runs]
    if None in linears:
        return [NONE, NONE]
    protocols = {", ".join(differences(linear.settings, PROTOCOL)) for linear in linears}
    if len(protocols) > 1:
        raise ValueError(f"{runs[0].folder}: the linear evaluations of its seeds have different protocols: {'; '.join(sorted(protocols))}")
    protocol = protocols.pop()
    return [
        mean_and_std([log.last(linear.records, "test_top1")[0] for linear in linears]) + (f" ({protocol})" if protocol else ""),
        mean_and_std([max(record["test_top1"] for record in linear.records) for linear in linears]),
    ]


def rows_of(runs):
    """The lines of runs that differ in the seed alone: trained, and untrained where that was measured."""
    settings = runs[0].settings
    yield [
        recipe_of(settings), str(settings["epochs"]), str(len(runs)), *(mean_and_std([log.last(run.records, key)[0] for run in runs]) for key in ("knn1", "knn200")),
        *linear_cells(runs), training_time(runs),
    ]
    if all(run.records[0]["epoch"] == 0 for run in runs):
        yield [
            "the same, untrained", "0", str(len(runs)), *(mean_and_std([run.records[0].get(key) for run in runs]) for key in ("knn1", "knn200")),
            *linear_cells(runs, untrained=True), NONE,
        ]


def published_rows():
    """The paper's end points, and those of the best-known script."""
    for source in ("paper", "Reza-Safdari"):
        linear = next(point for point in LINEAR if point.source == source)
        knn = next((point for point in KNN if point.source == source), None)
        top1 = f"{linear.top1:g}" + (f" ({linear.note})" if linear.note else "")
        best = "best epoch" in linear.note
        yield [
            f"published: {source}", str(linear.epochs), NONE, NONE, f"about {knn.top1:g} ({knn.note})" if knn else NONE,
            *([NONE, top1] if best else [top1, NONE]), NONE,
        ]


def results_table(folders):
    """The runs as a Markdown table, the widest and longest first, and below it whether the paper's run is among them. Raises OSError and ValueError."""
    runs = [read_run(folder.rstrip("/")) for folder in folders]
    for run in runs:
        if run.is_linear or not is_whole(run):
            raise ValueError(f"{run.folder}: not a finished run of main.py")
    groups = sorted(by_recipe(runs), key=lambda group: (-group[0].settings["width"], -group[0].settings["epochs"]))
    lines = table(
        ["pre-training", "epochs", "seeds", "kNN, k = 1 (%)", "kNN, k = 200 (%)", "linear, last epoch (%)", "best epoch: not a result", "time a seed"],
        [*(row for group in groups for row in rows_of(group)), *published_rows()],
    )
    seeds = sum(len(group) for group in groups if is_the_papers(group[0].settings))
    if seeds < ENOUGH:
        done = "is not among these yet" if not seeds else f"has {seeds} seed{'s' * (seeds > 1)} so far"
        lines += ["", f"The paper's own run (ResNet-18, {EPOCHS} epochs, batch 512) {done}."]
    return lines


# ---------------------------------------------------------------------------------------------------
# Released weights


def weights_table(folder="weights"):
    """The released weights of a folder as a Markdown table."""
    rows = []
    for about in sorted(glob.glob(os.path.join(folder, "*.json"))):
        said = log.read_json(about)
        accuracies, linear, recipe = said["accuracies"], said["linear_evaluation"], said["recipe"]
        top1 = NONE
        if linear is not None:
            protocol = ", ".join(differences(linear, PROTOCOL))
            top1 = f"{accuracies['linear_seed' + str(linear['seeds'][0])]:.2f}" + (f" ({protocol})" if protocol else "")
        rows.append([
            f"`{said['file'].removesuffix('.pt')}`", f"{recipe_of(recipe)}, {recipe['epochs']} epochs, seed {recipe['seed']}", f"{accuracies['knn200']:.2f}", top1,
            f"{said['bytes'] / 1e6:.1f} MB",
        ])
    if not any(row[0] == f"`{PAPER_WEIGHTS}`" for row in rows):
        rows.insert(0, [f"`{PAPER_WEIGHTS}`", f"the paper's, {EPOCHS} epochs", "not released yet", NONE, NONE])
    return table(["`torch.hub` name", "run", "kNN, k = 200 (%)", "linear, last epoch (%)", "size"], rows)


# ---------------------------------------------------------------------------------------------------
# Tables in documents


def table(head, rows):
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def update(path, tables):
    """Put tables, lists of lines by their names, between the marks <!-- NAME ... --> and <!-- end of NAME --> of a document. Raises OSError, and
    ValueError where marks are missing."""
    with open(path) as file:
        text = file.read()
    for name, lines in tables.items():
        marks = re.compile(rf"(<!-- {name}\b[^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if len(marks.findall(text)) != 1:
            raise ValueError(f"{path}: there has to be one pair of marks <!-- {name} --> and <!-- end of {name} -->")
        text = marks.sub(lambda match: f"{match[1]}\n{chr(10).join(lines)}\n\n{match[2]}", text)
    checkpoint.write(path, text.encode())


def make_parser():
    parser = Parser(prog="python -m utils.results", description=__doc__)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="of runs of main.py (default: those in logs/ on all of CIFAR-10 with their linear evaluation)")
    parser.add_argument("--update", metavar="FILE", help="write the tables of results and of the weights in weights/ into this document, instead of the terminal")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        results = results_table(args.folders or filter(is_a_result, sorted(glob.glob(os.path.join("logs", "*")))))
        if args.update is None:
            print("\n".join(results))
        else:
            update(args.update, {"results": results, "weights": weights_table()})
            print(f"{args.update}: written")


if __name__ == "__main__":
    main()
