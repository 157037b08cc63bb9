"""The paper's study (Sec. 4) as named variants of the recipe, and its table and figures from their runs.

    python -m utils.studies experiments/ablations --output DIR      # again, from the runs of ablate.py
"""
import os
import statistics
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from utils import checkpoint, log
from utils.cli import Parser
from utils.metrics import collapse_std
from utils.plot import curve, level, mark_collapse
from utils.run import CONFIG, read_config
from utils.runs import mean_and_std, spread
from utils.style import COLORS, DASHES, FORMATS, drawing, make_folder

TABLE = "ablations.md"
STUDY_FILE = "study.json"  # what all runs of the folder have in common: epochs, batch_size, learning_rate, options
FAILED = "failed.txt"  # in the folder of a run that ended in an error of its own, such as a loss that is not finite: its words
NONE = "–"


class Variant(NamedTuple):
    """One line of a study. Its runs are in folders named NAME-seedN."""

    name: str
    words: str
    options: tuple = ()  # of main.py
    paper: str = NONE    # the paper's linear top-1 on ImageNet, %


class Study(NamedTuple):
    title: str
    source: str          # in the paper
    variants: list


DEFAULT = "default"
BATCH_SIZES = {64: "66.1", 128: "67.3", 256: "68.1", 512: "68.1", 1024: "68.0", 2048: "67.9", 4096: "64.0"}
WARM_BATCH = 1024        # from here on the paper warms up, for 10 of its 100 epochs


def make_studies(epochs, batch_size, learning_rate):
    """The studies by name, for runs of so many epochs whose default has this batch and rate, None for main.py's own. The rate of
    other batches is in proportion to them, which main.py's own is too."""
    warmup = ("--warmup_epochs", str(max(1, epochs // 10)))

    def default(words, paper=NONE):
        return Variant(DEFAULT, words, (), paper)

    def batch(size, paper):
        if size == batch_size:
            return default(f"batch {size:,}", paper)
        options = ("--batch_size", str(size))
        if learning_rate is not None:
            options += ("--learning_rate", f"{learning_rate * size / batch_size:g}")
        if size >= WARM_BATCH:
            options += warmup
        return Variant(f"batch-{size}", f"batch {size:,}", options, paper)

    constant_rate = ("constant-predictor-rate", "predictor's rate not decayed", ("--fix_pred_lr",))
    return {
        "stop_gradient": Study("Stop-gradient", "Sec. 4.1, Figure 2", [
            default("with stop-gradient", "67.7 ± 0.1"),
            Variant("no-stop-gradient", "without", ("--no-stop_gradient",), "0.1"),
        ]),
        "predictor": Study("Predictor", "Sec. 4.2, Table 1", [
            default("learned, rate decayed", "67.7"),
            Variant("no-predictor", "none", ("--predictor", "none"), "0.1"),
            Variant("fixed-predictor", "fixed at random initialization", ("--predictor", "fixed"), "1.5"),
            Variant(*constant_rate, "68.1"),
        ]),
        "batch_size": Study("Batch size", "Sec. 4.3, Table 2", [batch(size, paper) for size, paper in BATCH_SIZES.items()]),
        "batch_norm": Study("Batch norm in the heads", "Sec. 4.4, Table 3", [
            Variant("head-bn-none", "none", ("--head_bn", "none", *warmup), "34.6"),
            Variant("head-bn-hidden", "hidden layers only", ("--head_bn", "hidden"), "67.4"),
            default("default: and the projector's output", "68.1"),
            Variant("head-bn-all", "all: and the predictor's output", ("--head_bn", "all"), "unstable"),
        ]),
        "similarity": Study("Similarity", "Sec. 4.5", [
            default("cosine", "68.1"), Variant("cross-entropy", "cross-entropy of softmaxes", ("--similarity", "cross_entropy"), "63.2"),
        ]),
        "symmetry": Study("Symmetry of the loss", "Sec. 4.6", [
            default("symmetric", "68.1"),
            Variant("asymmetric", "asymmetric", ("--symmetry", "asymmetric"), "64.8"),
            Variant("asymmetric-2x", "asymmetric, two pairs of views", ("--symmetry", "asymmetric_2x"), "67.3"),
        ]),
        "heads": Study("Heads", "Sec. 3; two layers: appendix D", [
            default("default"),
            Variant("projector-3-layers", "projector of 3 layers, not 2", ("--num_proj_layers", "3")),
            Variant("dim-512", "d = 512 and bottleneck 128, not 2048 and 512", ("--dim", "512", "--pred_dim", "128")),
            Variant("pred-dim-128", "predictor's bottleneck 128, not 512", ("--pred_dim", "128")),
            Variant("pred-dim-2048", "predictor without bottleneck: 2048", ("--pred_dim", "2048")),
        ]),
        "practice": Study("What practitioners turn first", "not in the paper, but for the predictor's rate", [
            default("default"),
            Variant("warm-up", "warm-up, a tenth of the epochs", warmup),
            Variant(*constant_rate, "68.1 (67.7 with decay)"),
            Variant("blur", "Gaussian blur, p = 0.5", ("--blur", "0.5")),
            Variant("crop-scale-0.08", "crops from 8 % of the area", ("--crop_scale", "0.08")),
            Variant("weight-decay-1e-3", "weight decay 1e-3", ("--weight_decay", "0.001")),
            Variant("zero-init-residual", "residual branches begin at zero", ("--zero_init_residual",)),
        ]),
    }


STUDIES = tuple(make_studies(100, 256, 0.05))


# ---------------------------------------------------------------------------------------------------
# The runs of a folder


class Result(NamedTuple):
    """The runs of a variant that are whole, and what became of the others."""

    config: dict    # config.json of the first
    runs: dict      # the log's records, by seed
    failures: list  # words


def run_name(variant, seed):
    return f"{variant.name}-seed{seed}"


def read_runs(folder, epochs):
    """What the folder of ablate.py has, by the names of the variants. Raises OSError and ValueError for what cannot be read."""
    results = {}
    for name in sorted(os.listdir(folder)):
        run = os.path.join(folder, name)
        variant, _, seed = name.rpartition("-seed")
        if not (variant and seed.isdecimal() and os.path.exists(os.path.join(run, CONFIG))):
            continue
        result = results.setdefault(variant, Result(read_config(run), {}, []))
        records = log.read(run, empty=True)
        if os.path.exists(os.path.join(run, FAILED)):
            with open(os.path.join(run, FAILED)) as file:
                reason = file.read().strip().removeprefix("main.py: error: ").split(";")[0]
            result.failures.append(f"seed {seed}: {reason}")
        elif records and records[-1]["epoch"] == epochs:
            result.runs[int(seed)] = records
        else:
            result.failures.append(f"seed {seed}: not finished")
    return results


def read_study(folder):
    """What all runs in a folder of ablate.py have in common. Raises OSError and ValueError if it is no such folder."""
    path = os.path.join(folder, STUDY_FILE)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder}: no {STUDY_FILE} in it; a folder of ablate.py is needed")
    common = log.read_json(path)
    if not isinstance(common, dict) or not {"epochs", "batch_size", "learning_rate", "options"} <= common.keys():
        raise ValueError(f"{path}: not what ablate.py wrote")
    return common


# ---------------------------------------------------------------------------------------------------
# The table


def last_values(runs, key):
    return {seed: value for seed, records in runs.items() if (value := log.last(records, key)[0]) is not None}


def row_of(variant, result, base):
    """The cells of a variant's line. base: the Result of the default."""
    if result is None or not result.runs:
        why = "; ".join(result.failures) if result else "not run"
        return [variant.words, variant.paper, why, *4 * [NONE]]
    knn, reference = last_values(result.runs, "knn200"), last_values(base.runs, "knn200") if base else {}
    differences = [knn[seed] - reference[seed] for seed in knn if seed in reference]
    stds = list(last_values(result.runs, "std").values())
    settings = result.config["settings"]
    least = collapse_std(settings["batch_size"], settings.get("head_bn", "default"))
    collapsed = " (collapsed)" if statistics.fmean(stds) < least else ""
    return [
        variant.words, variant.paper, mean_and_std(list(knn.values()), 2),
        mean_and_std(differences, 2) if differences and variant.name != DEFAULT else NONE,
        mean_and_std(stds, 3) + collapsed, mean_and_std(list(last_values(result.runs, "loss").values()), 3),
        "; ".join([f"{len(result.runs)}", *result.failures]),
    ]


def untrained_row(base):
    untrained = {seed: records[0]["knn200"] for seed, records in base.runs.items() if records[0]["epoch"] == 0}
    return [["the network before training", NONE, mean_and_std(list(untrained.values()), 2), NONE, NONE, NONE, str(len(untrained))]] if untrained else []


def table_of(study, results):
    """A study as a Markdown table, and an empty line after it."""
    base = results.get(DEFAULT)
    rows = [row_of(variant, results.get(variant.name), base) for variant in study.variants]
    rows += untrained_row(base) if base else []
    head = ["", "paper: linear, ImageNet (%)", "kNN, k = 200 (%)", "against the default", "std·√d", "loss", "seeds"]
    lines = [head, ["---"] * len(head), *rows]
    return [f"**{study.title}** ({study.source})", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]


def conditions(common, results):
    """What the runs have in common, and how to read the tables."""
    configs = [result.config for result in results.values()]
    settings = configs[0]["settings"]
    size, tests = (f"the first {settings[name]:,}" if settings.get(name) else "all" for name in ("train_size", "test_size"))
    rate = "main.py's own rate" if common["learning_rate"] is None else f"rate {common['learning_rate']:g}"
    devices = ", ".join(sorted({config["device"] for config in configs}))
    versions = ", ".join(sorted({str(config["versions"]["torch"]).split("+")[0] for config in configs}))
    others = " ".join(f"--{name} {value}".strip() for name, value in common["options"].items() if name not in ("train_size", "test_size", "width", "arch", "dataset"))
    return (
        f"{settings['dataset']}, {settings['arch']} of width {settings['width']}, {size} training and {tests} test pictures, batch {common['batch_size']}, "
        f"{rate}, {common['epochs']} epochs{others and f', {others}'}; {devices}, torch {versions}. Mean ± standard deviation over the seeds, after the last epoch; "
        "the differences are of runs with the same seed. The paper's numbers are of another task: linear evaluation of a ResNet-50 on ImageNet after 100 epochs, "
        "where chance is 0.1 %. From its Sec. 4.3 on (68.1) the paper does not decay the predictor's rate; the default here does."
    )


# ---------------------------------------------------------------------------------------------------
# The figures


MARKERS = "osv^D"
PANELS = {"loss": "loss", "std": "std·√d of the outputs", "knn200": "kNN top-1, k = 200 (%)"}  # the paper's Figure 2


def plot_study(study, results, output, name, formats=FORMATS):
    """Loss, std and kNN over the epochs, a line for each variant that has runs: `name` in the folder `output`."""
    present = [variant for variant in study.variants if variant.name in results and results[variant.name].runs]
    with drawing(output, name, width=9, height=2.6 + 0.17 * -(-len(present) // 2), formats=formats) as figure:
        for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
            for i, variant in enumerate(present):
                runs = list(results[variant.name].runs.values())
                if spread(runs, key)[0]:
                    curve(axes, runs, key, variant.words if key == "loss" else None, COLORS[i % len(COLORS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
            axes.set_title(title, loc="left")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            if key == "std":
                axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))
                level(axes, 1, "1: spread evenly over the sphere")
                mark_collapse(axes, [results[variant.name].config["settings"] for variant in present])
        figure.legend(loc="outside lower center", ncols=2)


def write_studies(folder, output, formats=FORMATS):
    """The table and the figures of the studies of which the folder has runs, into the folder `output`; returns the files'
    names. What another study has too, as all have the default, does not bring one up. Raises OSError and ValueError."""
    common = read_study(folder)
    results = read_runs(folder, common["epochs"])
    if not results:
        raise ValueError(f"{folder}: no run of ablate.py in it")
    files, lines, seen = [TABLE], [conditions(common, results), ""], {DEFAULT}
    for name, study in make_studies(common["epochs"], common["batch_size"], common["learning_rate"]).items():
        own = {variant.name for variant in study.variants} - seen
        seen |= own
        if own & results.keys():
            lines += table_of(study, results)
            if any(variant.name in results and results[variant.name].runs for variant in study.variants):
                plot_study(study, results, output, name, formats)
                files += [f"{name}.{ending}" for ending in formats]
    checkpoint.write(os.path.join(output, TABLE), "\n".join(lines).encode())
    return files


def make_parser():
    parser = Parser(prog="python -m utils.studies", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="with the runs of ablate.py, its --exp_dir")
    parser.add_argument("--output", metavar="DIR", help="where the table and the figures go (default: FOLDER)")
    parser.add_argument("--format", nargs="+", choices=("png", "svg", "pdf"), default=list(FORMATS), help="of the figures")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    output = args.folder if args.output is None else args.output
    with parser.user_errors():
        make_folder(output)
        print(f"{output}: {', '.join(write_studies(args.folder, output, args.format))}")


if __name__ == "__main__":
    main()
