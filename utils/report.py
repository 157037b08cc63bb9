"""report.html: a run on one page that needs nothing else: results, plots, commands, settings."""
import base64
import html
import os
import pathlib
import shlex

import torch

from utils import checkpoint, log, plot
from utils.augment import make_views
from utils.cli import info, say
from utils.device import describe, processor
from utils.run import BACKBONE, RESULTS, read_config

REPORT = "report.html"
CAPTIONS = {  # in the order of the page
    "loss-plot": "Loss. In pre-training, near −1 with std near 0 is a collapse, not a success.",
    "top1-acc": "Top-1 accuracy on the test images, or on those of --validation.",
    "std": "std of the l2-normalized outputs z, times √d: near 1 is healthy, near 0 collapsed.",
    "effective-rank": "Effective rank of the features: dimensions in use, a few in a collapse.",
    "views": "Images with the outlines of their crops, and below them their views.",
    "confusion": "Confusion of classes by the classifier.",
    "neighbors": "Test images and the most similar training images; orange: of another class.",
    "map": "The test features in two dimensions.",
    "knn-confusion": "Confusion of classes by kNN.",
    "spectrum": "Spectrum of the features' covariance. A dimensional collapse breaks it off."}


def table(cells):
    """A dict as an HTML table of two columns, without the lists and dicts in it."""
    lines = []
    for name, value in cells.items():
        if not isinstance(value, (list, dict)):
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            lines.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>")
    return f"<table>{''.join(lines)}</table>"


def evaluation_command(settings, folder, on_cpu):
    """The command that evaluates a run of main.py linearly."""
    words = ["python", "main_lincls.py", "--pretrained", os.path.join(folder, BACKBONE)]
    if on_cpu:
        words += ["--features", "cached"]
    for name in ("arch", "dataset", "train_size", "test_size", "validation", "seed"):
        if settings.get(name):
            words += [f"--{name}", str(settings[name])]
    if settings["dataset"] == "folder":
        words += ["--cache_dir", settings["cache_dir"]]
    if settings.get("skip_broken"):
        words.append("--skip_broken")
    return shlex.join([*words, settings["data_root"]])


def draw_run(folder):
    """Draw the plots of a run of main.py or main_lincls.py, so far, and write its report.html."""
    config, records = read_config(folder), log.read(folder, empty=True)
    settings, device = config["settings"], config["device"]
    results, path = {}, os.path.join(folder, RESULTS)
    if records:
        results = log.row(folder)
        plot.plot_runs([folder], folder)
    if os.path.exists(path):
        results = checkpoint.read_json(path)
        if "confusion" in results:
            plot.plot_confusion(folder, torch.tensor(results["confusion"]), list(results["class_top1"]))
    commands = [shlex.join(["python", *config["argv"]])]
    if log.last(records, "knn200") is not None:  # a pre-training on images with labels
        commands.append(evaluation_command(settings, folder, device.startswith("CPU")))
        commands.append(shlex.join(["python", "visualize.py", "--pretrained", folder]))
    plots = ""
    for name, caption in CAPTIONS.items():
        path = pathlib.Path(folder, f"{name}.png")
        if path.exists():
            content = base64.b64encode(path.read_bytes()).decode()
            plots += f'<figure><img alt="{name}" src="data:image/png;base64,{content}">'
            plots += f"<figcaption>{caption}</figcaption></figure>"
    kind = "linear evaluation" if "pretrained" in settings else "SimSiam pre-training"
    tested = settings.get("evaluate")  # model.pt is its own backbone
    if settings.get("weights") == "finetune" or tested and tested == settings["pretrained"]:
        kind = "fine-tuning"
    about = f"{kind}, {settings['arch']}, {settings['dataset']}, {device}"
    content = pathlib.Path(__file__).with_suffix(".html").read_text(encoding="utf-8").format(
        title=html.escape(os.path.basename(os.path.abspath(folder))), about=html.escape(about),
        results=table(results), plots=plots, commands=html.escape("\n".join(commands)),
        settings=table({**settings, **config["versions"], **config}))
    checkpoint.write(os.path.join(folder, REPORT), content.encode(errors="backslashreplace"))


def begin(run, data, order, draws):
    """Say what a run of main.py trains; draw views.png of a new one. order, draws: of epoch 0."""
    settings, size = run.settings, run.settings["image_size"]
    if run.saved_epoch == settings["epochs"]:
        return info(f"{run.folder}: already finished, epoch {settings['epochs']}")
    info(f"{run.folder}: {settings['arch']}, width {settings['width']}, {settings['dataset']}, "
         f"{len(data.train_images)} images of {size} pixels, {describe(run.device)}, "
         f"{settings['precision']}")
    if run.device.type == "cpu":
        info(f"No GPU in use, but {processor()}. Two cores train 50 to 220 views/s at width 64 and 32 pixels; "
             "a smaller --width or --view_size is faster.")
    if settings["validation"]:
        info(f"--validation: kNN tests {settings['validation']} of the training images, held out, instead.")
    if settings["bn_batch"] < settings["batch_size"]:
        info(f"Batch norm: statistics of the {settings['bn_batch']} images of each process.")
    if not data.has_classes:
        info("No labels of several classes, or no test images: no kNN, no linear evaluation; "
             "effective_rank is logged (docs/data.md).")
    if not os.path.exists(run.path("views.png")):
        with run.optional("plots"):
            images = data.train_images[order[:6]].to(run.device)
            draws = [each.rows(slice(6)) for each in draws]
            plot.plot_views(run.folder, images, make_views(images, draws, size), draws)


def say_end(run, data):
    """Say what a run of main.py has reached, if it is finished, and what comes next."""
    if run.saved_epoch == run.settings["epochs"]:
        say(f"{run.folder}: {log.summary(run.records)}")
        info(f"Plots: {run.path(REPORT)}")
        if data.has_classes:
            info(f"Next: {evaluation_command(run.settings, run.folder, run.device.type == 'cpu')}")
