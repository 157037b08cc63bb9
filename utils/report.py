"""report.html: a run on one page that needs nothing beside it: results, figures, commands, settings.

    python -m utils.report FOLDER...        # again, with the figures of the log, in each run's folder
"""
import datetime
import os
import shlex
import statistics

from utils import checkpoint, log, plot
from utils.cli import Parser
from utils.page import figure, number, page, table, table_of, text
from utils.published import KNN, LINEAR
from utils.resume import NOT_KEPT
from utils.run import BACKBONE, CHECKPOINT, EVALUATION_CHECKPOINT, PAGE_SECONDS, RESULTS, RUNNING, read_config

REPORT, FEATURES = "report.html", "features.json"


# ---------------------------------------------------------------------------------------------------
# What a run has come to


def pretraining_results(records, settings):
    """The epochs that were measured, and what the run took."""
    measured = [record for record in records if record.get("knn200") is not None or record is records[-1]]
    rows = [
        (f"{record['epoch']}{' (untrained)' if record['epoch'] == 0 else ''}", number(record.get("loss"), ".4f"), number(record.get("std"), ".3f"),
         number(record.get("knn1"), ".2f"), number(record.get("knn200"), ".2f"))
        for record in thinned(measured)
    ]
    trained = [record for record in records if record.get("seconds")]
    facts = ""
    if trained:
        minutes = sum(record["seconds"] for record in trained) / 60
        speed = statistics.median(record["views_per_s"] for record in trained)
        facts = f"<p>{minutes:,.1f} minutes of training, without kNN; median {speed:,.0f} views/s.</p>"
    return table(
        ("after epoch", "loss", "std·√d", "kNN k = 1 (%)", "kNN k = 200 (%)"), rows,
        f"kNN on {settings.get('test_size') or 'all'} test pictures, the training pictures in use as the bank.",
    ) + facts


def thinned(rows, most=12):
    """At most so many of the rows, evenly, with the first and the last."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def linear_results(records, results):
    """The last epoch, the best beside it, and the classes; of a saved classifier, which has no epochs, what its test gave."""
    last = records[-1] if records else results
    when = f", last epoch ({last['epoch']})" if records else ""
    rows = [(f"top-1{when}", f"{last['test_top1']:.2f}" + (f" ± {last['test_top1_std']:.2f}" if "test_top1_std" in last else ""))]
    if "test_top5" in last:
        rows.append((f"top-5{when}", f"{last['test_top5']:.2f}"))
    if records:
        best = max(records, key=lambda record: record["test_top1"])
        rows.append((f"top-1, best epoch ({best['epoch']}): chosen on the test pictures and so not the result", f"{best['test_top1']:.2f}"))
    page = table(("linear classifier", "%"), rows, f"{results['pictures']:,} test pictures" if results else "")
    if results:
        page += table(("class", "top-1 (%)"), [(name, number(value, ".1f")) for name, value in results["class_top1"].items()])
    return page


def feature_results(path):
    """The numbers of visualize.py."""
    numbers = log.read_json(path)
    networks = {name: of_one for name, of_one in numbers.items() if isinstance(of_one, dict)}
    rows = [
        (name, number(of_one["alignment"], ".3f"), number(of_one["uniformity"], ".2f"), f"{of_one['effective_rank']:.1f} of {of_one['feature_dim']}")
        for name, of_one in networks.items()
    ]
    words = (
        "Alignment: mean squared distance of two views' l2-normalized features. Uniformity: log of the mean of exp(−2 d²) over all pairs of "
        "test pictures. Only both together mean something: features that are all one have an alignment of 0, and a uniformity of 0, the worst. "
        "Effective rank: exp of the entropy of the eigenvalues of the covariance of l2-normalized features."
    )
    return table(("features", "alignment", "uniformity", "effective rank"), rows) + f"<p class=status>{words}</p>"


def evaluation_command(settings, folder, on_cpu):
    """What to type to evaluate a run of main.py linearly."""
    words = ["python", "main_lincls.py", "--arch", settings["arch"], "--pretrained", os.path.join(folder, BACKBONE)]
    if on_cpu:
        words += ["--features", "cached"]
    words += [settings["data_root"]] if settings["dataset"] == "cifar10" else ["--dataset", settings["dataset"], settings["data_root"]]
    return shlex.join(words)


def typed_again(argv):
    """The command of a run for another one like it: without what is of its process or names its folder."""
    options = {f"--{name}" for name in (*NOT_KEPT, "trial")}
    words, skip = ["python", os.path.basename(argv[0])], False
    for word in argv[1:]:
        if not (skip or word.split("=")[0] in options):
            words.append(word)
        skip = not skip and word in options - {"--quiet"}
    return shlex.join(words)


def commands(config, folder, linear):
    """What makes the run again, and what follows."""
    lines, settings = [typed_again(config["argv"])], config["settings"]
    commit = config["commit"]
    if commit:
        changed = "    # and changes that were not committed" if commit.endswith("-dirty") else ""
        lines.insert(0, f"git checkout {commit.removesuffix('-dirty')}{changed}")
    if not linear:
        lines.append(evaluation_command(settings, folder, config["device"].startswith("CPU")))
        lines.append(shlex.join(["python", "visualize.py", "--pretrained", folder, settings["data_root"]]))
    return "\n".join(lines)


def state_of(records, settings, results, folder):
    """Where a run that is not at work stands, in words."""
    linear, epochs = "pretrained" in settings, settings["epochs"]
    done = records[-1]["epoch"] if records else 0
    if results is not None or (done == epochs and not linear):
        return "Finished."
    script, name = ("main_lincls.py", EVALUATION_CHECKPOINT) if linear else ("main.py", CHECKPOINT)
    how = f" To go on: python {script} --resume {shlex.quote(os.path.join(folder, name))}" if os.path.exists(os.path.join(folder, name)) else ""
    return f"Stopped: {done} of {epochs} epochs done.{how}"


# ---------------------------------------------------------------------------------------------------
# The page


WIDE = {"views.png", "neighbors.png"}  # figures that take both columns


def captions(settings):
    """The figures in the order of the page, as far as a folder may have them, with the words under them: svg where it is drawn,
    png where it is pictures."""
    linear, cifar10 = "pretrained" in settings, settings.get("dataset") == "cifar10"
    published = LINEAR if linear else KNN
    notes = ", ".join(f"{point.source}: {point.top1:g} ({point.note})" for point in published if point.note)
    marks = f" The marks are end points that others published for width 64 and all pictures; their protocols differ: {notes}." if cifar10 else ""
    few = settings.get("dataset") != "cifar100"
    return {
        "loss-plot.svg": "The classifier's cross-entropy on the training batches." if linear else "The loss. Near −1 with std·√d near 0 is a collapse and not a success.",
        "top1-acc.svg": f"Top-1 accuracy of {'the classifier' if linear else 'kNN'} on the test pictures.{marks}",
        "std.svg": "std·√d of the l2-normalized outputs z: near 1 where they spread over all directions, 0 where they are all one.",
        "throughput.svg": "Views that were trained on in a second.",
        "learning-rate.svg": "The learning rate of each epoch.",
        "views.png": "Pictures with the outlines of both crops, and the two views of each, with what was drawn for them: crop (height × width at row, column), flip, color jitter in its order, gray.",
        "confusion.svg": "Which classes the linear classifier takes for which.",
        "neighbors.png": "Test pictures and their nearest training pictures by the cosine similarity of features. Dashed: of another class, which is named.",
        "map-pca.png": f"The test features by their principal components{'; the names are at the medians of their classes' if few else ', a color a class'}.",
        "map-tsne.png": "The test features by t-SNE: nearby points are neighbors; distances between groups mean nothing.",
        "knn-confusion.svg": "Which classes kNN takes for which.",
        "spectrum.svg": "How the features' variance spreads over dimensions. A spectrum that breaks off is a dimensional collapse.",
        "distances.svg": "Distances of the features of two views of a picture, and of two pictures: the first are to be small beside the second.",
    }


def figures(folder, settings):
    """Yield the figures that the folder has, as HTML."""
    for name, words in captions(settings).items():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            yield figure(path, words, name in WIDE)


def write_report(folder, state=None):
    """Write report.html in the folder of a run of main.py or main_lincls.py from what is in it. state: how the run stands, in
    words (default: by what is in the folder); while RUNNING the page loads itself again and again. Raises OSError, and
    ValueError where config.json is none."""
    config, records = read_config(folder), log.read(folder, empty=True)
    path = os.path.join(folder, RESULTS)
    results = log.read_json(path) if os.path.exists(path) else None
    settings = config["settings"]
    linear, running = "pretrained" in settings, state == RUNNING
    name = os.path.basename(os.path.abspath(folder))
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    if running:
        state = f"Running: {records[-1]['epoch'] if records else 0} of {settings['epochs']} epochs done."
    elif state is None:
        state = state_of(records, settings, results, folder)
    reload = f" This page loads itself again every {PAGE_SECONDS} seconds; if its time stands still, the run has ended." if running else ""
    if not records and results is None:
        outcome = "<p>No epoch is done yet.</p>"
    elif linear:
        outcome = linear_results(records, results)
    else:
        outcome = pretraining_results(records, settings)
    path = os.path.join(folder, FEATURES)
    if os.path.exists(path):
        outcome += feature_results(path)
    what = "Linear evaluation" if linear else "SimSiam pre-training"
    status = f"{what}, {settings['arch']}, {settings['dataset']}, {config['device']}. {state} Written {now}.{reload}"
    sections = {
        "Results": outcome,
        "Figures": f"<div class=figures>{''.join(figures(folder, settings))}</div>",
        "Commands": f"<pre><code>{text(commands(config, folder, linear))}</code></pre>",
        "Settings": table_of(settings),
        "Environment": table_of({"device": config["device"], "commit": config["commit"], **config["versions"]}),
    }
    content = page(name, status, sections, PAGE_SECONDS if running else None)
    checkpoint.write(os.path.join(folder, REPORT), content.encode(errors="backslashreplace"))


def draw_run(folder, state=None):
    """The figures of a run, as far as it has come, and the report, `write_report`."""
    plot.plot_run(folder)
    write_report(folder, state)


def make_parser():
    parser = Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder")
    return parser


def main(argv=None):
    parser = make_parser()

    def write(folder):
        draw_run(folder)
        print(os.path.join(folder, REPORT))

    parser.for_each(parser.parse_args(argv).folders, write)


if __name__ == "__main__":
    main()
