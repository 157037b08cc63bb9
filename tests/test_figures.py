"""Plots, report.html, metrics of features, and tables of logs, against closed forms and other implementations."""
import base64
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


def write_run(folder, value=1.0, argv=("main.py",), **settings):
    """The folder of a run of two epochs, with kNN after the second."""
    folder.mkdir()
    settings = {"arch": "resnet18", "epochs": 2, "dataset": "cifar10", "data_root": "data", "batch_size": 64} | settings
    config = {"argv": argv, "device": "CPU, <1> thread", "versions": {}, "settings": settings}
    checkpoint.write_json(folder / "config.json", config)
    first, second = ({"epoch": epoch, "loss": -0.1 * value * epoch, "std": 0.9, "seconds": 90 * epoch * value}
                     for epoch in (1, 2))
    log.write(folder, [first, second | {"knn1": 30.0 * value, "knn200": 40.0 * value}])
    return str(folder)


@pytest.fixture
def drawn(monkeypatch):
    """The saved plots by name, as Figures."""
    plots, savefig = {}, Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: [
        plots.update({Path(path).stem: figure}), savefig(figure, path)])
    return plots


def curves(figure):
    """The points of the curves by label, and the heights of the level lines, whose label begins with _."""
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    return lines, [lines.pop(label)[0][1] for label in [*lines] if label[0] == "_"]


def read_page(path):
    """The words and images of a page that needs nothing beside it and is XML, but for void elements."""
    page = ElementTree.fromstring(re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", Path(path).read_text(encoding="utf-8")))
    assert {element.tag for element in page.iter()} <= set(
        "html head meta title style body h1 h2 p pre table tr td figure img figcaption".split())
    words, links = " ".join(page.itertext()), [element.get("src") for element in page.iter("img")]
    assert all(link.startswith("data:") for link in links) and "@import" not in words and "url(" not in words
    return words, [base64.b64decode(link.split(",")[1]) for link in links]


def test_plots_have_curves_levels_and_the_mean_of_seeds_with_a_band_of_one_std(tmp_path, drawn):
    report.draw_run(write_run(tmp_path / "run"))
    assert curves(drawn["loss-plot"]) == ({"run: loss": [[1, -0.1], [2, -0.2]]}, [])
    assert curves(drawn["top1-acc"]) == ({"run: kNN, k = 200": [[2, 40]], "run: kNN, k = 1": [[2, 30]]}, [90])
    assert curves(drawn["std"]) == ({"run: std": [[1, 0.9], [2, 0.9]]}, [3 / 8])  # a collapse in batches of 64
    report.draw_run(write_run(tmp_path / "shapes", dataset="shapes"))
    assert curves(drawn["top1-acc"])[1] == []
    folders = [write_run(tmp_path / f"run-seed{seed}", value) for seed, value in enumerate((1.0, 1.2, 1.7))]
    plot.main([*folders, write_run(tmp_path / "other", 0.5), "--output", str(tmp_path)])
    mean, std = [[1, pytest.approx(-0.13)], [2, pytest.approx(-0.26)]], numpy.std([0.1, 0.12, 0.17], ddof=1)
    assert curves(drawn["loss-plot"])[0] == {"run: loss": mean, "other: loss": [[1, -0.05], [2, -0.1]]}
    plot.main([*folders, "--output", str(tmp_path), "--minutes"])  # 1.3 times 1.5 minutes, then 3 more
    assert curves(drawn["loss-plot"])[0]["run: loss"] == [[pytest.approx(1.95), -0.13], [pytest.approx(5.85), -0.26]]
    plot.main([*folders, "--output", str(tmp_path)])
    corners = {(x, round(y, 9)) for x, y in drawn["loss-plot"].axes[0].collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(epoch, round(epoch * (-0.13 + sign * std), 9)) for epoch in (1, 2) for sign in (-1, 1)}


@pytest.mark.parametrize("name, label", [
    ("a $b$", r"a \$b\$"), ("\udcff", r"\udcff"), ("a\nb", "a\nb"), ("日本", "日本"), ("x" * 250, "x" * 40), ("_x", "x")])
@pytest.mark.filterwarnings("error")
def test_a_folder_of_any_name_has_figures_and_a_page(tmp_path, drawn, name, label):
    report.draw_run(write_run(tmp_path / name))
    plot.plot_runs([str(tmp_path / name), write_run(tmp_path / "other")], str(tmp_path))
    labels = [text.get_text() for text in drawn["std"].legends[0].get_texts()]
    assert labels == [f"{label}: std", "other: std"] and len(read_page(tmp_path / name / "report.html")[1]) == 3


def test_views_show_the_images_with_their_crops_and_the_normalized_views(tmp_path, drawn, shapes):
    images, draws = shapes.train_images[:2], [draw_views(2, torch.Generator().manual_seed(i)) for i in range(3)]
    plot.plot_views(str(tmp_path), images, make_views(images, draws), draws)
    pixels = [torch.tensor(axes.images[0].get_array()).permute(2, 0, 1) for axes in drawn["views"].axes]
    assert torch.equal(torch.stack(pixels[:2]), images)
    torch.testing.assert_close(normalize(torch.stack(pixels[2:])), torch.cat(make_views(images, draws)))
    for i, axes in enumerate(drawn["views"].axes[:2]):
        outlines = [(*patch.get_xy(), patch.get_height(), patch.get_width()) for patch in axes.patches]
        assert outlines == [(each.left[i] - 0.5, each.top[i] - 0.5, each.height[i], each.width[i]) for each in draws]


def test_pages_have_results_plots_and_commands_and_escape_what_was_typed(finished_run, tmp_path, drawn):
    (words, images), last = read_page(f"{finished_run}/report.html"), log.read(finished_run)[-1]
    assert all(f" {key} {last[key]:.6g} " in words for key in "epoch loss std knn1 knn200 effective_rank".split())
    command = next(line for line in words.splitlines() if "main_lincls.py" in line)
    args = main_lincls.make_parser().parse_args(shlex.split(command)[2:])
    assert (args.pretrained, args.dataset) == (f"{finished_run}/backbone.pt", "shapes")
    assert images == [Path(finished_run, f"{name}.png").read_bytes() for name in [*report.CAPTIONS][:5]]
    folder = write_run(tmp_path / "<i> & 'c'", 1.0, ["main_lincls.py", "<i> &amp;"], pretrained="<script>x</script>")
    results = {"test_top1": 51.5, "class_top1": {"cat": 75.0, "dog": None}, "confusion": [[3, 1], [0, 0]]}
    checkpoint.write_json(f"{folder}/results.json", results)
    report.draw_run(folder)
    assert drawn["confusion"].axes[0].images[0].get_array().tolist() == [[75, 25], [0, 0]]  # percent of the true class
    words = read_page(f"{folder}/report.html")[0]
    for text in ("<i> & 'c'", "<script>x</script>", "CPU, <1> thread", "51.5", "python main_lincls.py '<i> &amp;'"):
        assert text in words


def test_visualize_shows_the_nearest_images_and_measures_as_the_log(finished_run, tmp_path, drawn, shapes, no_gpu):
    folder, queries = shutil.copytree(finished_run, tmp_path / "run"), []
    visualize.main(["--pretrained", str(folder), "--precision", "fp32"])
    numbers, records = checkpoint.read_json(folder / "features.json"), log.read(folder)
    for name, epoch, key in (("untrained", 0, "knn1"), ("trained", 2, "knn1"), ("trained", 2, "knn200")):
        assert numbers[name][key] == pytest.approx(records[epoch][key], abs=1.001)  # an image of 100
    assert len(read_page(folder / "report.html")[1]) == 9
    backbone, bank, test = simsiam.load_backbone(folder / "backbone.pt"), shapes.train_images[:128], shapes.test_images
    similarities = F.cosine_similarity(backbone(normalize(test))[:, None], backbone(normalize(bank)), dim=2)
    for row in numpy.reshape(drawn["neighbors"].axes, (12, 7)):
        pixels = [torch.tensor(axes.images[0].get_array()).permute(2, 0, 1) for axes in row]
        query, *found = ((images == image).flatten(1).all(dim=1).nonzero().item()
                         for images, image in zip([test] + 6 * [bank], pixels))
        torch.testing.assert_close(similarities[query, found], similarities[query].topk(6).values, rtol=0, atol=2e-6)
        blue = [axes.spines["top"].get_edgecolor()[0] == 0 for axes in row[1:]]  # orange has red in it
        assert blue == (shapes.train_labels[found] == shapes.test_labels[query]).tolist()
        queries.append(query)
    assert max(queries) < 100 and len(set(queries)) == 12 and len(shapes.test_labels[queries].unique()) == 10


def test_visualize_takes_any_checkpoint(finished_run, tmp_path, drawn, monkeypatch, refused, no_gpu, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    tensors = checkpoint.load(f"{finished_run}/backbone.pt")
    torch.save({"state_dict": {f"module.backbone.{name}": tensors[name] for name in tensors}}, tmp_path / "other.pt")
    command = "--pretrained other.pt --dataset shapes --train_size 30 --test_size 20".split()
    refused(visualize.main, command, "--output DIR is required")
    visualize.main([*command, "--output", "plots", "--precision", "fp32"])
    assert {*drawn} == {"neighbors", "knn-confusion", "spectrum"}
    assert "no map.png, which scikit-learn makes" in capsys.readouterr().err


def test_metrics_of_features_are_those_of_their_papers():
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17)
    centered = features.double() - features.double().mean(dim=0)
    assert torch.allclose(knn.spectrum(features), torch.linalg.svdvals(centered).square() / 299)
    shares = F.normalize(torch.linalg.svdvals(features.double()), p=1, dim=0)
    assert knn.effective_rank(features) == pytest.approx(shares.pow(-shares).prod().item(), rel=1e-6)
    for scales, rank in (([2.0] * 7 + [0.0] * 3, 7), ([3.0, 1.0], 4 / 3**0.75), ([0.0] * 3, 0), ([float("nan")], 0)):
        assert knn.effective_rank(torch.tensor(scales).diag()) == pytest.approx(rank)


def test_logs_warn_once_of_a_collapse_and_make_a_table_of_the_last_metrics(tmp_path, capsys):
    limits = [log.collapse_std({"batch_size": size}) for size in (100, 4, 10**4)]
    assert limits == [0.3, 0.6, 0.1]  # 3 / sqrt(B), within limits
    records, warned = [{"epoch": 0, "knn1": 9.0}], []
    for epoch, std in enumerate((0.31, 0.29, 0.29, 0.29, 0.2, 0.31, 0.29, 0.29, 0.29), 1):
        records.append({"epoch": epoch, "std": std})
        warned += [(epoch, head_bn) for head_bn in ("default", "none", "hidden")
                   if log.collapse_warning(records, {"bn_batch": 100, "head_bn": head_bn})]
    assert warned == [(4, "default"), (9, "default")]
    log.write(tmp_path, [{"epoch": i, "test_top1": 60.25 - i, "seconds": 45.0} for i in (1, 2)])
    plot.main([write_run(tmp_path / tmp_path.name, 1.5), f"{tmp_path}/"])  # both of the same name
    assert capsys.readouterr().out.splitlines() == [
        "| run | epoch | loss | std | knn1 | knn200 | minutes | device | test_top1 | best test_top1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| {tmp_path.name} | 2 | -0.30 | 0.90 | 45.00 | 60.00 | 6.75 | CPU, <1> thread | – | – |",
        f"| {tmp_path.name} | 2 | – | – | – | – | 1.50 | – | 58.25 | 59.25 |"]
