"""report.html: a run on one page that needs nothing beside it: results, figures, commands, settings."""
import base64
import html
import os
import shlex

import torch

from utils import checkpoint, log, plot
from utils.augment import make_views
from utils.cli import info, say
from utils.device import describe, processor
from utils.run import BACKBONE, RESULTS, read_config

REPORT = "report.html"
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
td { padding: .2rem .8rem .2rem 0; vertical-align: top; } pre { background: #f4f4f4; white-space: pre-wrap; }
figure { display: inline-block; width: 28rem; max-width: 100%; margin: 0 1rem 1rem 0; vertical-align: top; }
figure.wide { width: 100%; } img { width: 100%; } figcaption { font-size: .85rem; color: #555; }
"""
CAPTIONS = {  # in the order of the page
    "loss-plot": "Loss. In pre-training, near −1 with std near 0 is a collapse, not a success.",
    "top1-acc": "Top-1 accuracy on the test images, or on those of --validation.",
    "std": "std of the l2-normalized outputs z, times √d: near 1 is healthy, near 0 collapsed.",
    "effective-rank": "Effective rank of the features: dimensions in use. Falls to a few in a collapse.",
    "views": "Images with the outlines of both crops, and the two views with what was drawn for them.",
    "confusion": "Confusion of classes by the linear classifier.",
    "neighbors": "Test images and their nearest training images by cosine similarity; dashed: of another class.",
    "map": "The test features in two dimensions.",
    "knn-confusion": "Confusion of classes by kNN.",
    "spectrum": "Spectrum of the features' covariance. One that breaks off is a dimensional collapse.",
}
WIDE = ("views", "neighbors")


def table(rows):
    """An HTML table of rows of cells."""
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def results_html(folder, records):
    """What was measured: the results of a linear evaluation, or the evaluated epochs of a pre-training."""
    path = os.path.join(folder, RESULTS)
    if os.path.exists(path):
        return table(item for item in checkpoint.read_json(path).items() if not isinstance(item[1], (list, dict)))
    forms = {"epoch": "d", "loss": ".4f", "std": ".3f", "knn1": ".2f", "knn200": ".2f", "effective_rank": ".1f"}
    shown = [record for record in records if {"knn200", "effective_rank"} & record.keys() or record is records[-1]]
    shown = shown[:-1:max(1, len(shown) // 10)] + shown[-1:]
    return table([forms, *([f"{record[key]:{form}}" if key in record else "–" for key, form in forms.items()]
                           for record in shown)])


def figures_html(folder):
    """Yield the figures in the folder, embedded."""
    for name, words in CAPTIONS.items():
        path = os.path.join(folder, f"{name}.png")
        if os.path.exists(path):
            with open(path, "rb") as file:
                content = base64.b64encode(file.read()).decode()
            yield (f'<figure{" class=wide" * (name in WIDE)}><img alt="{words}" src="data:image/png;base64,{content}">'
                   f"<figcaption>{words}</figcaption></figure>")


def evaluation_command(settings, folder, on_cpu):
    """The command that evaluates a run of main.py linearly."""
    words = ["python", "main_lincls.py", "--arch", settings["arch"], "--pretrained", os.path.join(folder, BACKBONE)]
    words += ["--features", "cached"] * on_cpu + ["--dataset", settings["dataset"]] * (settings["dataset"] != "cifar10")
    for name in ("train_size", "validation"):
        if settings.get(name):
            words += [f"--{name}", str(settings[name])]
    if settings["dataset"] == "folder":
        words += ["--cache_dir", settings["cache_dir"]] + ["--skip_broken"] * settings["skip_broken"]
    return shlex.join([*words, settings["data_root"]])


def write_report(folder):
    """Write report.html in the folder of a run of main.py or main_lincls.py. Raises OSError, and ValueError without a
    readable config.json."""
    config, records = read_config(folder), log.read(folder, empty=True)
    settings = config["settings"]
    commit = str(config["commit"]).removesuffix("-dirty")
    commands = [f"git checkout {commit}"] * bool(config["commit"]) + [shlex.join(["python", *config["argv"]])]
    kind = "linear evaluation"
    if "pretrained" not in settings:
        kind = "SimSiam pre-training"
        if not records or log.last(records, "knn200") is not None:  # else there are no labels
            commands.append(evaluation_command(settings, folder, config["device"].startswith("CPU")))
            commands.append(shlex.join(["python", "visualize.py", "--pretrained", folder, settings["data_root"]]))
    done = f"epoch {records[-1]['epoch'] if records else 0}"
    title = html.escape(os.path.basename(os.path.abspath(folder)))
    content = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{html.escape(f"{kind}, {settings['arch']}, {settings['dataset']}, {config['device']}: {done}.")}</p>
<h2>Results</h2>{results_html(folder, records)}
<h2>Figures</h2>{''.join(figures_html(folder))}
<h2>Commands</h2><pre>{html.escape(chr(10).join(commands))}</pre>
<h2>Settings</h2>{table({**settings, 'device': config['device'], **config['versions']}.items())}
</body></html>
"""
    checkpoint.write(os.path.join(folder, REPORT), content.encode(errors="backslashreplace"))


def draw_run(folder):
    """Draw the figures of a run, so far, and write its report."""
    path = os.path.join(folder, RESULTS)
    if log.read(folder, empty=True):
        plot.plot_runs([folder], folder)
    if os.path.exists(path):
        results = checkpoint.read_json(path)
        plot.plot_confusion(folder, torch.tensor(results["confusion"]), list(results["class_top1"]))
    write_report(folder)


def begin(run, data, order, draws):
    """Say what a run of main.py trains, and what to expect; draw views.png of a new one. order and
    draws: of its first epoch."""
    settings, size = run.settings, run.settings["image_size"]
    if run.saved_epoch == settings["epochs"]:
        return info(f"{run.folder}: already finished, epoch {settings['epochs']}")
    held_out = f" (and {settings['validation']} held out)" if settings["validation"] else ""
    info(f"{run.folder}: {settings['arch']}, width {settings['width']}, {settings['dataset']}, "
         f"{len(data.train_images)} images{held_out} of {size} pixels, {describe(run.device)}, "
         f"{settings['precision']}")
    if run.device.type == "cpu":
        info(f"No GPU in use, but {processor()}. Two CPU cores train 50 to 220 views/s at width 64 and "
             "32 pixels; a smaller --width and --view_size is faster.")
    if settings["bn_batch"] < settings["batch_size"]:
        info(f"Batch norm: statistics of the {settings['bn_batch']} images of each process.")
    if not data.has_classes:
        info("No labels of several classes: no kNN; effective_rank is logged (docs/data.md).")
    if size > 128:
        info(f"The stem for small images keeps {size} pixels: {(size / 32)**2:.0f} times the "
             "arithmetic of 32.")
    if not os.path.exists(run.path("views.png")):
        with run.optional("plots"):
            images, draws = data.train_images[order[:8]].to(run.device), [each.rows(slice(8)) for each in draws[:2]]
            plot.plot_views(run.folder, images, *make_views(images, draws, size), *draws)


def say_end(run, data):
    """Say what a run of main.py has reached, if it is finished, and what comes next."""
    if run.saved_epoch < run.settings["epochs"]:
        return
    say(f"{run.folder}: {log.summary(run.records)}")
    info(f"Figures: {run.path(REPORT)}")
    if data.has_classes:
        info(f"Next: {evaluation_command(run.settings, run.folder, run.device.type == 'cpu')}")
