"""Plots, report.html, metrics of features, and tables of logs, against closed forms and other implementations."""
import base64
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import main_lincls
import simsiam
import visualize
from utils import checkpoint, knn, log, plot, report
from utils.augment import draw_views, make_views, normalize


def write_log(folder, records):
    """log.jsonl, one JSON object a line."""
    Path(folder, log.LOG).write_text("".join(f"{json.dumps(record)}\n" for record in records))


def write_run(folder, value=1.0, argv=("main.py",), **settings):
    """The folder of a run of two epochs, with kNN after the second."""
    folder.mkdir()
    settings = {"arch": "resnet18", "epochs": 2, "dataset": "cifar10", "data_root": "data", "batch_size": 64} | settings
    config = {"argv": argv, "commit": None, "device": "CPU, <1> thread", "versions": {}, "settings": settings}
    checkpoint.write_json(folder / "config.json", config)
    first, second = ({"epoch": epoch, "loss": -0.1 * value * epoch, "std": 0.9} for epoch in (1, 2))
    write_log(folder, [first, second | {"knn1": 30.0 * value, "knn200": 40.0 * value}])
    return str(folder)


@pytest.fixture
def drawn(monkeypatch):
    """The saved plots by name, as Figures."""
    plots, savefig = {}, Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: [
        plots.update({os.path.basename(path).removesuffix(".png"): figure}), savefig(figure, path)])
    return plots


def curves(figure):
    """The points of the curves by label, and the heights of the level lines, which have none."""
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    return ({label: points for label, points in lines.items() if label[0] != "_"},
            [points[0][1] for label, points in lines.items() if label[0] == "_"])


def read_page(path):
    """The words and images of a page that needs nothing beside it and is XML, but for void elements."""
    text = re.sub(r"<(meta|link|img)([^>]*)>", r"<\1\2/>", Path(path).read_text(encoding="utf-8"))
    page = ElementTree.fromstring(text.replace("class=wide", 'class="wide"'))
    assert not {"script", "iframe", "object", "i"} & {element.tag for element in page.iter()}
    links = [value for element in page.iter() for name, value in element.items() if name in ("src", "href")]
    words = " ".join(page.itertext())
    assert all(link.startswith("data:") for link in links) and "@import" not in words and "url(" not in words
    return words, [base64.b64decode(element.get("src").split(",")[1]) for element in page.iter("img")]


def test_a_run_has_curves_and_levels_to_compare_them_with(tmp_path, drawn):
    report.draw_run(write_run(tmp_path / "run"))
    assert curves(drawn["loss-plot"]) == ({"loss": [[1, -0.1], [2, -0.2]]}, [])
    assert curves(drawn["top1-acc"]) == ({"kNN, k = 200": [[2, 40]], "kNN, k = 1": [[2, 30]]}, [90])  # the paper's
    assert curves(drawn["std"]) == ({"std": [[1, 0.9], [2, 0.9]]}, [1, 3 / 8])  # spread, collapse in batches of 64
    report.draw_run(write_run(tmp_path / "shapes", dataset="shapes"))
    assert curves(drawn["top1-acc"])[1] == []


def test_runs_of_several_seeds_are_a_mean_with_a_band_of_one_std(tmp_path, drawn):
    folders = [write_run(tmp_path / f"run-seed{seed}", value) for seed, value in enumerate((1.0, 1.2, 1.7))]
    plot.main([*folders, write_run(tmp_path / "other", 0.5), "--output", str(tmp_path)])
    points, std = curves(drawn["loss-plot"])[0], numpy.std([0.1, 0.12, 0.17], ddof=1)
    assert points == {"run": [[1, pytest.approx(-0.13)], [2, pytest.approx(-0.26)]], "other": [[1, -0.05], [2, -0.1]]}
    corners = {(x, round(y, 9)) for x, y in drawn["loss-plot"].axes[0].collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(epoch, round(epoch * (-0.13 + sign * std), 9)) for epoch in (1, 2) for sign in (-1, 1)}


@pytest.mark.parametrize("name, label", [
    ("a $b$", r"a \$b\$"), ("\udcff", r"\udcff"), ("a\nb", "a?b"), ("日本", "日本"), ("x" * 250, "x" * 40), ("_x", " _x")])
@pytest.mark.filterwarnings("error")
def test_a_folder_of_any_name_has_figures_and_a_page(tmp_path, drawn, name, label):
    report.draw_run(write_run(tmp_path / name))
    plot.plot_runs([str(tmp_path / name), write_run(tmp_path / "other")], str(tmp_path))
    labels = [text.get_text() for text in drawn["std"].legends[0].get_texts()]
    assert labels == [label, "other"] and len(read_page(tmp_path / name / "report.html")[1]) == 3


@pytest.mark.parametrize("count", [2, 4])
def test_views_show_the_images_with_their_crops_and_the_normalized_views(tmp_path, drawn, shapes, count):
    images, draws = shapes.train_images[:2], [draw_views(2, torch.Generator().manual_seed(i)) for i in range(count)]
    views = make_views(images, draws)
    plot.plot_views(str(tmp_path), images, views, draws, columns=2)
    pixels = [torch.tensor(axes.images[0].get_array()).permute(2, 0, 1) for axes in drawn["views"].axes]
    assert torch.equal(torch.stack(pixels[:2]), images)
    torch.testing.assert_close(normalize(torch.stack(pixels[2:])), torch.cat(views))
    for i, axes in enumerate(drawn["views"].axes[:2]):
        outlines = [(*patch.get_xy(), patch.get_height(), patch.get_width()) for patch in axes.patches]
        assert outlines == [(view.left[i] - 0.5, view.top[i] - 0.5, view.height[i], view.width[i]) for view in draws]


def test_the_page_of_a_run_has_its_last_metrics_and_the_next_command(finished_run):
    (words, images), last = read_page(f"{finished_run}/report.html"), log.read(finished_run)[-1]
    assert f"2 {last['loss']:.4f} {last['std']:.3f} {last['knn1']:.2f} {last['knn200']:.2f}" in words
    command = next(line for line in words.splitlines() if "main_lincls.py" in line)
    args = main_lincls.make_parser().parse_args(shlex.split(command)[2:])
    assert (args.pretrained, args.dataset) == (f"{finished_run}/backbone.pt", "shapes")
    assert images == [Path(finished_run, f"{name}.png").read_bytes() for name in
                      "loss-plot top1-acc std effective-rank views".split()]


def test_the_page_of_an_evaluation_has_its_confusion_and_escapes_what_was_typed(tmp_path, drawn):
    folder = write_run(tmp_path / "<i> & 'c'", 1.0, ["main_lincls.py", "<i> &amp;"], pretrained="<script>x</script>")
    results = {"test_top1": 51.5, "class_top1": {"cat": 75.0, "dog": None}, "confusion": [[3, 1], [0, 0]]}
    checkpoint.write_json(f"{folder}/results.json", results)
    report.draw_run(folder)
    assert drawn["confusion"].axes[0].images[0].get_array().tolist() == [[75, 25], [0, 0]]  # percent of the true class
    for words in ("<i> & 'c'", "pretrained <script>x</script>", "CPU, <1> thread: epoch 2.", "test_top1 51.5",
                  " python main_lincls.py '<i> &amp;' "):
        assert words in read_page(f"{folder}/report.html")[0]


def test_visualize_shows_the_nearest_images_and_measures_as_the_log(finished_run, tmp_path, drawn, shapes, no_gpu):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    visualize.main(["--pretrained", str(folder), "--precision", "fp32"])
    numbers, records = checkpoint.read_json(folder / "features.json"), log.read(folder)
    for name, epoch, key in (("untrained", 0, "knn1"), ("trained", 2, "knn1"), ("trained", 2, "knn200")):
        assert numbers[name][key] == pytest.approx(records[epoch][key], abs=1.001)  # an image of 100
    assert len(read_page(folder / "report.html")[1]) == 9
    bank = checkpoint.read_json(folder / "config.json")["settings"]["train_size"]
    images = torch.cat((shapes.train_images[:bank], shapes.test_images[:100]))
    labels = torch.cat((shapes.train_labels[:bank], shapes.test_labels[:100]))
    features = simsiam.load_backbone(folder / "backbone.pt")(normalize(images)).detach()
    similarities, queries = F.cosine_similarity(features[:, None], features[:bank], dim=2), []
    pixels = [torch.tensor(axes.images[0].get_array()).permute(2, 0, 1) for axes in drawn["neighbors"].axes]
    for i in range(0, 12 * 7, 7):
        query, *found = ((images == image).flatten(1).all(dim=1).nonzero().item() for image in pixels[i:i + 7])
        torch.testing.assert_close(similarities[query, found], similarities[query].topk(6).values, rtol=0, atol=2e-6)
        for axes, index in zip(drawn["neighbors"].axes[i + 1:i + 7], found):
            assert (axes.spines["top"].get_linestyle() == "-") == (labels[index] == labels[query])
        queries.append(query)
    assert min(queries) >= bank and len(set(queries)) == 12 and len(labels[queries].unique()) == 10


def test_visualize_takes_any_checkpoint(finished_run, tmp_path, drawn, shapes, monkeypatch, refused, no_gpu):
    """Without scikit-learn the map shows principal components: their variances are those of an SVD."""
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    tensors = checkpoint.load(f"{finished_run}/backbone.pt")
    torch.save({"state_dict": {f"module.backbone.{name}": tensors[name] for name in tensors}}, tmp_path / "other.pt")
    command = "--pretrained other.pt --dataset shapes --train_size 30 --test_size 20".split()
    refused(visualize.main, command, "--output DIR is required")
    visualize.main([*command, "--output", "plots", "--precision", "fp32"])
    features = F.normalize(simsiam.load_backbone(tensors)(normalize(shapes.test_images[:20])).detach().double(), dim=1)
    points = torch.tensor(drawn["map"].axes[0].collections[0].get_offsets())
    variances = torch.linalg.svdvals(features - features.mean(dim=0))[:2].square()
    torch.testing.assert_close(points.T @ points, variances.flip(0).diag(), rtol=1e-3, atol=1e-6)


def test_metrics_of_features_are_those_of_their_papers():
    """Uniformity over all pairs, written out; the spectrum by an SVD."""
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17)
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    pairs = [(-2 * (unit[i] - unit[:i]).square().sum(dim=1)).exp() for i in range(1, 300)]
    assert knn.uniformity(features) == pytest.approx(torch.cat(pairs).mean().log().item(), abs=1e-5)
    assert knn.uniformity(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-8)  # distance 2
    expected = 2 - 2 * F.cosine_similarity(features, features.roll(1, dims=0)).mean().item()
    assert knn.alignment(features, 3 * features.roll(1, dims=0)) == pytest.approx(expected, abs=1e-5)
    singular = torch.linalg.svdvals(features.double() - features.double().mean(dim=0))
    assert torch.allclose(knn.spectrum(features), singular.square() / 299)
    shares = torch.linalg.svdvals(features.double())
    entropy = -sum(share * math.log(share) for share in (shares / shares.sum()).tolist())
    assert knn.effective_rank(features) == pytest.approx(math.exp(entropy), rel=1e-6)
    for scales, rank in (([2.0] * 7 + [0.0] * 3, 7), ([3.0, 1.0], 4 / 3**0.75), ([0.0] * 3, 0), ([math.nan], 0)):
        assert knn.effective_rank(torch.tensor(scales).diag()) == pytest.approx(rank)


def test_a_collapse_is_warned_of_once_after_three_epochs():
    assert [log.collapse_std(size) for size in (100, 4, 10**4)] == [0.3, 0.6, 0.1]  # 3 / sqrt(B), within limits
    records, warned = [{"epoch": 0, "knn1": 9.0}], []
    for epoch, std in enumerate((0.31, 0.29, 0.29, 0.29, 0.2, 0.31, 0.29, 0.29, 0.29), 1):
        records.append({"epoch": epoch, "std": std})
        warned += [epoch] * bool(log.collapse_warning(records, {"bn_batch": 100, "head_bn": "default"}))
        assert not any(log.collapse_warning(records, {"bn_batch": 100, "head_bn": head_bn}) for head_bn in ("none", "hidden"))
    assert warned == [4, 9]


def test_a_table_of_logs_has_the_last_metrics_of_each(tmp_path, capsys):
    write_log(tmp_path, [{"epoch": i, "test_top1": 60.25 - i, "seconds": 45.0} for i in (1, 2)])
    plot.main([write_run(tmp_path / tmp_path.name, 1.5), f"{tmp_path}/"])  # both of the same name
    assert capsys.readouterr().out.splitlines() == [
        "| run | epoch | loss | std | knn1 | knn200 | minutes | device | test_top1 | best test_top1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| {tmp_path.name} | 2 | -0.30 | 0.90 | 45.00 | 60.00 | 0.00 | CPU, <1> thread | – | – |",
        f"| {tmp_path.name} | 2 | – | – | – | – | 1.50 | – | 58.25 | 59.25 |"]
