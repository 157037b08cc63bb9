"""The tables of results, from the logs of runs and the .json of released weights.

    python -m utils.results                            # of the runs in logs/, on the terminal
    python -m utils.results FOLDER...                  # of these runs
    python -m utils.results --update README.md logs/README.md      # into documents, between the marks of the tables
    python -m utils.results --figures imgs             # and the curves of the first line's runs: loss-plot.png, top1-acc.png

A run's linear evaluation is looked for beside it, in FOLDER-linear, and that of its untrained network in FOLDER-linear-untrained.
"""
import glob
import math
import os
import re
import shutil
import statistics
import tempfile

from utils import checkpoint, log
from utils.augment import MEAN, STD
from utils.cli import Parser
from utils.plot import plot_runs
from utils.published import KNN, LINEAR
from utils.resume import STUDY
from utils.run import UNTRAINED as UNTRAINED_FILE
from utils.runs import by_recipe, mean_and_std, read_run
from utils.style import make_folder

NONE = "–"
FIGURES = ("loss-plot.png", "top1-acc.png")
LINEAR_OF, UNTRAINED = "-linear", "-untrained"
PAPER_WEIGHTS = "simsiam_resnet18_cifar10"  # of the paper's run: in the table before they are there
ENOUGH = 3                                  # seeds, from which on a mean and a spread say something

# The paper's recipe (appendix D), and the protocol of linear evaluation: what differs from them is said in the tables.
RECIPE = {
    "dataset": "cifar10", "train_size": None, "test_size": None, "width": 64, "batch_size": 512, "learning_rate": None,
    "dim": 2048, "pred_dim": 512, "num_proj_layers": 2, "momentum": 0.9, "weight_decay": 5e-4, **STUDY,
}
EPOCHS, RATE_PER_256 = 800, 0.03
PROTOCOL = {
    "dataset": "cifar10", "train_size": None, "test_size": None, "mean": list(MEAN), "std": list(STD), "seeds": 1, "crop_scale": [0.08, 1.0],
    "features": "augmented", "optimizer": "sgd", "schedule": "step", "epochs": 100, "batch_size": 256, "lr": 30.0, "momentum": 0.9,
    "weight_decay": 0.0, "fraction": 1.0,
}
WORDS = {
    "dataset": "{}", "train_size": "{:,} training pictures", "test_size": "{:,} test pictures", "width": "width {}", "batch_size": "batch {}",
    "learning_rate": "rate {:g}", "epochs": "{} epochs", "features": "{} features", "lr": "rate {:g}", "fraction": "{:g} of the labels",
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


def protocol_of(linear, run):
    """In what the settings of a linear evaluation differ from the protocol on the data of its run, in words."""
    return ", ".join(differences(linear, {**PROTOCOL, **{name: run[name] for name in ("dataset", "train_size", "test_size")}}))


def recipe_of(settings):
    """A network and its recipe in words: ResNet-18 alone is the paper's."""
    return ", ".join([settings["arch"].replace("resnet", "ResNet-"), *differences(settings, RECIPE)])


def is_the_papers(settings):
    return recipe_of(settings) == "ResNet-18" and settings["epochs"] == EPOCHS


def percent(values):
    """Their mean, with the standard deviation where there are several; a dash where one is missing."""
    return NONE if None in values else mean_and_std(values, 2)


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
    made = os.path.join(run.settings["exp_dir"], run.settings["trial"])
    where, file = os.path.split(linear.settings["pretrained"])
    if os.path.normpath(where) != os.path.normpath(made) or (file == UNTRAINED_FILE) != untrained:
        raise ValueError(f"{folder}: an evaluation of {linear.settings['pretrained']}, not of {run.folder}")
    return linear


def values_of(runs, value):
    """What value(run) is for these runs: each once, in words."""
    return ", ".join(sorted({str(found) for run in runs if (found := value(run)) is not None}))


def training_time(runs, brief=False):
    """Minutes a run, the device and precision; version of torch and, where they are known, the dates."""
    by_the_clock = all("wall_seconds" in record for run in runs for record in run.records if record["epoch"])
    key, words = ("wall_seconds", "") if by_the_clock else ("seconds", " (steps alone)")
    minutes = statistics.fmean(sum(record.get(key, 0) for record in run.records) / 60 for run in runs)
    where = [
        values_of(runs, value) for value in (
            lambda run: run.config["device"], lambda run: run.settings["precision"],
            lambda run: f"torch {run.config['versions']['torch'].split('+')[0]}", lambda run: run.config.get("date"),
        )
    ]
    return ", ".join([f"{minutes:.{1 if minutes < 10 else 0}f} min{words}", *filter(None, where[:2] if brief else where)])


def linear_cells(runs, untrained=False):
    """The last epoch's accuracy, with what differs from the protocol, and the best one's, over the evaluations of these runs."""
    linears = [read_linear(run, untrained) for run in runs]
    if None in linears:
        return [NONE, NONE]
    protocols = {protocol_of(linear.settings, run.settings) for linear, run in zip(linears, runs)}
    if len(protocols) > 1:
        raise ValueError(f"{runs[0].folder}: the linear evaluations of its seeds have different protocols: {'; '.join(sorted(protocols))}")
    protocol = protocols.pop()
    return [
        percent([log.last(linear.records, "test_top1")[0] for linear in linears]) + (f" ({protocol})" if protocol else ""),
        percent([max(record["test_top1"] for record in linear.records) for linear in linears]),
    ]


def read_groups(folders):
    """Finished runs of main.py in lists of those that differ in the seed alone, the widest and longest first. Raises OSError and ValueError."""
    runs = [read_run(folder) for folder in {os.path.realpath(folder): os.path.normpath(folder) for folder in folders}.values()]
    for run in runs:
        if run.is_linear or not is_whole(run):
            raise ValueError(f"{run.folder}: not a finished run of main.py")
    groups = by_recipe(runs)
    for group in groups:
        if len({run.settings["seed"] for run in group}) < len(group):
            raise ValueError(f"{', '.join(run.folder for run in group)}: runs of the same recipe and seed; they count once")
    return sorted(groups, key=lambda group: (-group[0].settings["width"], -group[0].settings["epochs"]))


def knn_cells(runs, untrained=False):
    """kNN accuracies, k = 1 and k = 200, of the last epoch or of the untrained network."""
    return [percent([run.records[0].get(key) if untrained else log.last(run.records, key)[0] for run in runs]) for key in ("knn1", "knn200")]


def saw_untrained(runs):
    return all(run.records[0]["epoch"] == 0 for run in runs)


def full_table(groups):
    """All that is known of the runs, as a Markdown table: a line for those that differ in the seed alone, and one for their untrained networks."""
    rows = []
    for runs in groups:
        settings = runs[0].settings
        rows.append([recipe_of(settings), str(settings["epochs"]), str(len(runs)), *knn_cells(runs), *linear_cells(runs), training_time(runs)])
        if saw_untrained(runs):
            rows.append(["the same, untrained", "0", str(len(runs)), *knn_cells(runs, untrained=True), *linear_cells(runs, untrained=True), NONE])
    return table(
        ["pre-training", "epochs", "seeds", "kNN, k = 1 (%)", "kNN, k = 200 (%)", "linear, last epoch (%)", "best epoch: not a result", "time a seed"], rows,
    )


def brief_table(groups):
    """The runs' results beside the published ones, as a Markdown table, and below it how many seeds of the paper's run are among them."""
    def cell(trained, untrained):
        return trained if untrained == NONE else f"{trained}; untrained {untrained.split(' (')[0]}"

    rows = []
    for runs in groups:
        untrained = [knn_cells(runs, untrained=True)[1], linear_cells(runs, untrained=True)[0]] if saw_untrained(runs) else [NONE, NONE]
        results = [cell(*pair) for pair in zip((knn_cells(runs)[1], linear_cells(runs)[0]), untrained)]
        rows.append([recipe_of(runs[0].settings), str(runs[0].settings["epochs"]), str(len(runs)), *results, training_time(runs, brief=True)])
    for source in ("paper", "Reza-Safdari"):
        linear = next(point for point in LINEAR if point.source == source)
        knn = next((f"about {point.top1:g}" for point in KNN if point.source == source), NONE)
        rows.append([f"published: {source}", str(linear.epochs), NONE, knn, f"{linear.top1:g}" + (f" ({linear.note})" if linear.note else ""), NONE])
    lines = table(["pre-training", "epochs", "seeds", "kNN, k = 200 (%)", "linear, last epoch (%)", "time a seed"], rows)
    seeds = max((len(group) for group in groups if is_the_papers(group[0].settings)), default=0)
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
            protocol = protocol_of({**linear, "seeds": 1}, recipe)
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
    """Put tables, lists of lines by their names, between the marks <!-- NAME ... --> and <!-- end of NAME --> that a document has. Raises OSError, and
    ValueError where there are none."""
    with open(path) as file:
        text = file.read()
    found = 0
    for name, lines in tables.items():
        content = "\n".join(lines)
        text, count = re.subn(
            rf"(<!-- {name}\b[^>]*-->\n).*?(<!-- end of {name} -->)", lambda match: f"{match[1]}\n{content}\n\n{match[2]}", text, flags=re.DOTALL,
        )
        found += count
    if not found:
        raise ValueError(f"{path}: no marks of a table in it, such as <!-- results --> and <!-- end of results -->")
    checkpoint.write(path, text.encode())


def draw_figures(groups, output):
    """loss-plot.png and top1-acc.png of the first group's runs, into a folder. Raises OSError, and ValueError where there is no run."""
    if not groups:
        raise ValueError("--figures: no runs to draw")
    make_folder(output)
    with tempfile.TemporaryDirectory() as folder:
        plot_runs([run.folder for run in groups[0]], folder, ["png"])
        for name in FIGURES:
            shutil.copyfile(os.path.join(folder, name), os.path.join(output, name))


def make_parser():
    parser = Parser(prog="python -m utils.results", description=__doc__)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="of runs of main.py (default: those in logs/ on all of CIFAR-10 with their linear evaluation)")
    parser.add_argument("--update", nargs="+", metavar="FILE", help="write the tables, and that of the weights in weights/, into these documents, instead of the terminal")
    parser.add_argument("--figures", metavar="DIR", help="draw the first line's runs into this folder")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        groups = read_groups(args.folders or filter(is_a_result, sorted(glob.glob(os.path.join("logs", "*")))))
        tables = {"results": brief_table(groups), "all-results": full_table(groups)}
        if args.update is None:
            print("\n".join([*tables["all-results"], "", *tables["results"]]))
        for path in args.update or ():
            update(path, {**tables, "weights": weights_table()})
            print(f"{path}: written")
        if args.figures is not None:
            draw_figures(groups, args.figures)
            print(f"{args.figures}: {', '.join(FIGURES)}")


if __name__ == "__main__":
    main()
