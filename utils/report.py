"""report.html: a run on one page that needs nothing else: results, plots, commands, settings."""
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
body { font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
body { overflow-wrap: anywhere; } pre { background: #f4f4f4; white-space: pre-wrap; }
td { padding: .2rem .8rem .2rem 0; vertical-align: top; } figure { vertical-align: top; }
figure { display: inline-block; width: 28rem; max-width: 100%; margin: 0 1rem 1rem 0; }
figure.wide { width: 100%; } img { width: 100%; } figcaption { font-size: .85rem; color: #555; }
"""
CAPTIONS = {  # in the order of the page
    "loss-plot": "Loss. In pre-training, near −1 with std near 0 is a collapse, not a success.",
    "top1-acc": "Top-1 accuracy on the test images, or on those of --validation.",
    "std": "std of the l2-normalized outputs z, times √d: near 1 is healthy, near 0 collapsed.",
    "effective-rank": "Effective rank of the features: dimensions in use, a few in a collapse.",
    "views": "Images with the outlines of their crops, and the views with what was drawn for them.",
    "confusion": "Confusion of classes by the linear classifier.",
    "neighbors": "Test images and the most similar training images; dashed: of another class.",
    "map": "The test features in two dimensions.",
    "knn-confusion": "Confusion of classes by kNN.",
    "spectrum": "Spectrum of the features' covariance. A dimensional collapse breaks it off.",
}
WIDE = ("views", "neighbors")


def table(rows):
    """An HTML table of rows of cells."""
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def results_table(folder, records):
    """The results of a linear evaluation, or about ten of the evaluated epochs of a pre-training."""
    path = os.path.join(folder, RESULTS)
    if os.path.exists(path):
        results = checkpoint.read_json(path)
        return table((name, results[name]) for name in results if not isinstance(results[name], (list, dict)))
    forms = {"epoch": "d", "loss": ".4f", "std": ".3f", "knn1": ".2f", "knn200": ".2f", "effective_rank": ".1f"}
    evaluated = [each for each in records[:-1] if "knn200" in each or "effective_rank" in each]
    shown = evaluated[::max(1, (len(evaluated) + 1) // 10)] + records[-1:]
    return table([forms] + [[format(each[key], form) if key in each else "–" for key, form in forms.items()]
                            for each in shown])


def embedded(folder, name, caption):
    """The plot folder/name.png with its caption as HTML."""
    with open(os.path.join(folder, f"{name}.png"), "rb") as file:
        content = base64.b64encode(file.read()).decode()
    start = "<figure class=wide>" if name in WIDE else "<figure>"
    image = f'<img alt="{caption}" src="data:image/png;base64,{content}">'
    return f"{start}{image}<figcaption>{caption}</figcaption></figure>"


def evaluation_command(settings, folder, on_cpu):
    """The command that evaluates a run of main.py linearly."""
    words = ["python", "main_lincls.py", "--arch", settings["arch"]]
    words += ["--pretrained", os.path.join(folder, BACKBONE)]
    if on_cpu:
        words += ["--features", "cached"]
    if settings["dataset"] != "cifar10":
        words += ["--dataset", settings["dataset"]]
    for name in ("train_size", "validation"):
        if settings.get(name):
            words += [f"--{name}", str(settings[name])]
    if settings["dataset"] == "folder":
        words += ["--cache_dir", settings["cache_dir"]]
        if settings["skip_broken"]:
            words.append("--skip_broken")
    return shlex.join([*words, settings["data_root"]])


def write_report(folder):
    """Write report.html in the folder of a run of main.py or main_lincls.py. Raises OSError, and ValueError
    without a readable config.json."""
    config, records = read_config(folder), log.read(folder, empty=True)
    settings, device = config["settings"], config["device"]
    kind = "linear evaluation" if "pretrained" in settings else "SimSiam pre-training"
    commands = [shlex.join(["python", *config["argv"]])]
    if config["commit"]:
        commands.insert(0, f"git checkout {config['commit'].removesuffix('-dirty')}")
    has_labels = not records or log.last(records, "knn200") is not None
    if "pretrained" not in settings and has_labels:
        visualize = ["python", "visualize.py", "--pretrained", folder, settings["data_root"]]
        commands += [evaluation_command(settings, folder, device.startswith("CPU")), shlex.join(visualize)]
    commands = html.escape("\n".join(commands))
    plots = [embedded(folder, name, caption) for name, caption in CAPTIONS.items()
             if os.path.exists(os.path.join(folder, f"{name}.png"))]
    title = html.escape(os.path.basename(os.path.abspath(folder)))
    epoch = records[-1]["epoch"] if records else 0
    about = f"{kind}, {settings['arch']}, {settings['dataset']}, {device}: epoch {epoch}."
    content = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{html.escape(about)}</p>
<h2>Results</h2>{results_table(folder, records)}
<h2>Plots</h2>{''.join(plots)}
<h2>Commands</h2><pre>{commands}</pre>
<h2>Settings</h2>{table({**settings, 'device': device, **config['versions']}.items())}
</body></html>
"""
    checkpoint.write(os.path.join(folder, REPORT), content.encode(errors="backslashreplace"))


def draw_run(folder):
    """Draw the plots of a run, so far, and write its report."""
    path = os.path.join(folder, RESULTS)
    if log.read(folder, empty=True):
        plot.plot_runs([folder], folder)
    if os.path.exists(path):
        results = checkpoint.read_json(path)
        confusion = torch.tensor(results["confusion"])
        plot.plot_confusion(folder, confusion, list(results["class_top1"]))
    write_report(folder)


def begin(run, data, order, draws):
    """Say what a run of main.py trains and what to expect; draw views.png of a new one. order and
    draws: of its first epoch."""
    settings, size = run.settings, run.settings["image_size"]
    if run.saved_epoch == settings["epochs"]:
        return info(f"{run.folder}: already finished, epoch {settings['epochs']}")
    held_out = f" (and {settings['validation']} held out)" if settings["validation"] else ""
    info(f"{run.folder}: {settings['arch']}, width {settings['width']}, {settings['dataset']}, "
         f"{len(data.train_images)} images{held_out} of {size} pixels, {describe(run.device)}, "
         f"{settings['precision']}")
    if run.device.type == "cpu":
        info(f"No GPU in use, but {processor()}. Two cores train 50 to 220 views/s at width 64 and 32 "
             "pixels; a smaller --width or --view_size is faster.")
    if settings["bn_batch"] < settings["batch_size"]:
        info(f"Batch norm: statistics of the {settings['bn_batch']} images of each process.")
    if not data.has_classes:
        info("No labels of several classes: no kNN; effective_rank is logged (docs/data.md).")
    if size > 128:
        info(f"The stem for small images keeps {size} pixels: {(size / 32)**2:.0f} times the "
             "arithmetic of 32.")
    if not os.path.exists(run.path("views.png")):
        with run.optional("plots"):
            images, draws = data.train_images[order[:8]].to(run.device), [each.rows(slice(8)) for each in draws]
            plot.plot_views(run.folder, images, make_views(images, draws, size), draws)


def say_end(run, data):
    """Say what a run of main.py has reached, if it is finished, and what comes next."""
    if run.saved_epoch == run.settings["epochs"]:
        say(f"{run.folder}: {log.summary(run.records)}")
        info(f"Plots: {run.path(REPORT)}")
        if data.has_classes:
            info(f"Next: {evaluation_command(run.settings, run.folder, run.device.type == 'cpu')}")
