"""Figures: what they show, against closed forms and other implementations."""
import json
import math
import os
import shutil
import sys
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import main as pretraining
import visualize
from conftest import REPO, SMALL
from utils import log, metrics, plot, plot_features, plot_views, report, style
from utils import runs as runs_module
from utils.augment import Draws, apply_two_views, denormalize, draw_views, normalize
from utils.progress import set_quiet
from utils.published import KNN

CURVES = ("loss-plot", "top1-acc", "std", "throughput", "learning-rate")


def write_run(folder, seed, value=1.0, **settings):
    """A folder with the log and the settings of a run of two epochs."""
    os.makedirs(folder)
    config = {
        "argv": ["main.py"], "commit": None, "device": "CPU", "versions": {},
        "settings": {"arch": "resnet18", "dim": 32, "epochs": 2, "dataset": "cifar10", "data_root": "data", "seed": seed, **settings},
    }
    log.write_json(os.path.join(folder, "config.json"), config)
    for epoch in (1, 2):
        record = {"epoch": epoch, "loss": -0.1 * value * epoch, "std": 0.9, "lr": 0.1, "views_per_s": 100.0, "seconds": 1.0}
        log.append(folder, {**record, **({"knn1": 30.0 * value, "knn200": 40.0 * value} if epoch == 2 else {})})
    return str(folder)


@pytest.fixture
def axes_of(monkeypatch):
    """What was drawn: the axes of each figure by its name, seen before it is written."""
    seen = {}
    usual = Figure.savefig

    def savefig(figure, path, **options):
        seen[os.path.splitext(os.path.basename(path))[0]] = figure.axes[0]
        usual(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def test_a_run_has_its_figures_as_pictures_and_as_vectors(tmp_path, axes_of):
    folder = write_run(tmp_path / "run", 0, batch_size=64)
    assert tuple(sorted(plot.plot_runs([folder], folder))) == tuple(sorted(CURVES))
    for name in CURVES:
        assert Image.open(tmp_path / "run" / f"{name}.png").width == 4.2 * style.DPI
        assert "<svg" in (tmp_path / "run" / f"{name}.svg").read_text()
    assert axes_of["loss-plot"].get_lines()[0].get_xydata().tolist() == [[1, -0.1], [2, -0.2]]
    assert [line.get_xydata().tolist() for line in axes_of["top1-acc"].get_lines()[:2]] == [[[2, 40.0]], [[2, 30.0]]]
    words = [text.get_text() for text in axes_of["top1-acc"].texts]
    for point in KNN:
        assert any(text.startswith(f"{point.source}: {point.top1:g}") for text in words)
    collapse = [line.get_ydata()[0] for line in axes_of["std"].get_lines() if len(set(line.get_ydata())) == 1]
    assert metrics.collapse_std(64) in collapse and 1 in collapse


def test_the_same_log_gives_the_same_files(tmp_path):
    folder = write_run(tmp_path / "run", 0)
    files = []
    for name in ("a", "b"):
        os.mkdir(tmp_path / name)
        plot.plot_runs([folder], str(tmp_path / name), ("png", "svg", "pdf"))
        files.append([(tmp_path / name / f"{figure}.{ending}").read_bytes() for figure in CURVES for ending in ("png", "svg", "pdf")])
    assert files[0] == files[1]


def test_seeds_become_a_mean_with_a_band(tmp_path, axes_of):
    """Those of one recipe only: another batch size is a line of its own."""
    folders = [write_run(tmp_path / f"run-seed{seed}", seed, value) for seed, value in enumerate((1.0, 1.2, 1.7))]
    folders.append(write_run(tmp_path / "other", 0, 0.5, batch_size=64))
    plot.plot_runs(folders, str(tmp_path))
    axes = axes_of["loss-plot"]
    mean, other = (line for line in axes.get_lines() if not line.get_label().startswith("_"))
    assert mean.get_ydata().tolist() == pytest.approx([-0.13, -0.26]) and other.get_ydata().tolist() == pytest.approx([-0.05, -0.1])
    assert (mean.get_label(), other.get_label()) == ("run: 3 seeds", "other")
    deviation = 0.2 * numpy.std([1.0, 1.2, 1.7], ddof=1)
    corners = axes.collections[0].get_paths()[0].get_extents()
    assert (corners.ymin, corners.ymax) == (pytest.approx(-0.26 - deviation), pytest.approx(-0.13 + deviation / 2))
    assert len(axes.collections) == 1


def test_a_mean_is_of_the_epochs_that_all_runs_have():
    runs = [[{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 2.0}], [{"epoch": 0, "knn1": 3.0}, {"epoch": 1, "loss": 3.0}]]
    assert runs_module.spread(runs, "loss") == ([1], [2.0], [pytest.approx(math.sqrt(2))])
    assert runs_module.spread(runs, "lr") == ([], [], [])


def test_labels_keep_apart_in_the_order_of_their_values():
    values = [90.4, 90.3, 90.0, 88.1, 20.0]
    heights = plot.apart(values, 4.0)
    order = numpy.argsort(values)
    assert (numpy.diff(numpy.array(heights)[order]) >= 4.0 - 1e-9).all()
    assert heights[-1] == 20.0  # what touches nothing stays
    assert numpy.mean(heights[:4]) == pytest.approx(numpy.mean(values[:4]))


def test_runs_of_unequal_length_are_all_seen(tmp_path, axes_of):
    """The mean ends with the shortest; a thin line shows how the longer one goes on."""
    folders = [write_run(tmp_path / f"s{seed}", seed) for seed in range(2)]
    log.append(folders[0], {"epoch": 3, "loss": -0.5})
    plot.plot_runs(folders, str(tmp_path))
    mean, *single = (line.get_xydata().tolist() for line in axes_of["loss-plot"].get_lines()[:3])
    assert [x for x, _ in mean] == [1, 2] and [3, -0.5] in single[0]


@pytest.mark.parametrize("names, label", [
    (["cifar-seed0", "cifar-seed1"], "cifar: 2 seeds"), (["1", "2"], "1, 2: 2 seeds"), (["1", "10"], "1, 10: 2 seeds"),
    (["a0", "a1", "a2", "b3"], "a0 to b3: 4 seeds"), (["one run"], "one run"),
])
def test_what_runs_are_called(names, label):
    assert runs_module.label_of([runs_module.Run(f"experiments/{name}", [], {"settings": {"seed": i}}) for i, name in enumerate(names)]) == label


def test_the_same_folder_twice_is_one_run(tmp_path, axes_of):
    folder = write_run(tmp_path / "run", 0)
    plot.plot_runs([folder, f"{folder}/"], str(tmp_path))
    assert not axes_of["loss-plot"].collections


def test_evaluations_have_bands_too_and_no_figures_with_pretraining(tmp_path, axes_of):
    linear = tmp_path / "linear"
    os.mkdir(linear)
    for epoch in (1, 2):
        log.append(str(linear), {"epoch": epoch, "train_loss": 9000.0 / epoch**9, "test_top1": 50.0, "test_top1_std": 2.0})
    plot.plot_runs([str(linear)], str(tmp_path))
    corners = axes_of["top1-acc"].collections[0].get_paths()[0].get_extents()
    assert (corners.ymin, corners.ymax) == (48, 52)
    assert axes_of["loss-plot"].get_yscale() == "log"
    pretraining_run = write_run(tmp_path / "run", 0)
    for folders in ([str(linear), pretraining_run], [pretraining_run, str(linear)]):
        with pytest.raises(ValueError, match="run is a pre-training and .*linear a linear evaluation"):
            plot.plot_runs(folders, str(tmp_path))


def test_files_of_another_kind_are_refused_in_a_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run", 0)
    for name, content, words in (
        ("config.json", "[1]", "not a run's settings"), ("config.json", '{"settings": [1]}', "not a run's settings"), ("config.json", "{", "no JSON"),
        ("results.json", "[1]", "not the results"), ("log.jsonl", '{"epoch": 1, "loss": "abc"}', "loss is 'abc' and not a number"),
    ):
        kept = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        (tmp_path / "run" / name).write_text(content)
        for main in (plot.main, report.main):
            with pytest.raises(SystemExit) as stop:
                main([folder])
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.count("\n") == 1 and words in error, error
        (tmp_path / "run" / name).unlink()
        for kept_name, bytes_ in kept.items():
            (tmp_path / "run" / kept_name).write_bytes(bytes_)


def test_several_runs_need_a_place(tmp_path, capsys):
    folders = [write_run(tmp_path / name, 0) for name in "ab"]
    with pytest.raises(SystemExit) as stop:
        plot.main(folders)
    assert stop.value.code == 2 and "--output" in capsys.readouterr().err
    plot.main([*folders, "--output", str(tmp_path / "both"), "--format", "pdf"])
    assert sorted(os.listdir(tmp_path / "both")) == sorted(f"{name}.pdf" for name in CURVES)


@pytest.mark.parametrize("name", ["a b", "$x_$", "\udcff", "a\nb", "日本", "x" * 200])
def test_any_folder_name_has_figures(tmp_path, name):
    folder = str(tmp_path / name)
    os.mkdir(folder)
    log.append(folder, {"epoch": 1, "loss": -0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.plot_run(folder)
    assert os.path.getsize(os.path.join(folder, "loss-plot.png")) > 1000


# ---------------------------------------------------------------------------------------------------
# The input


def one_view(**fields):
    draws = {"top": 0, "left": 0, "height": 32, "width": 32, "flip": False, "jitter": False, "order": [0, 1, 2, 3], "factors": [1.0, 1.0, 1.0, 0.0], "gray": False, "sigma": 0.0}
    return Draws(**{name: torch.tensor([value]) for name, value in {**draws, **fields}.items()})


def test_what_was_drawn_is_written_under_a_view():
    assert plot_views.words_of(one_view(), 0) == "crop 32×32 at (0, 0)\nno jitter"
    draws = one_view(top=3, left=5, height=20, width=17, flip=True, jitter=True, order=[3, 1, 0, 2], factors=[0.7, 1.25, 1.4, -0.05], gray=True, sigma=1.5)
    assert plot_views.words_of(draws, 0) == "crop 20×17 at (3, 5), flip\nhue −18°\ncontrast ×1.25\nbrightness ×0.70\nsaturation ×1.40\ngray\nblur σ 1.50"


def test_views_are_shown_in_their_colors(tmp_path, monkeypatch, shapes):
    """The pixels on the figure are the pictures' and the views'; the outlines are the crops'."""
    shown, outlines = [], []
    generator = torch.Generator().manual_seed(0)
    draws = draw_views(2, generator), draw_views(2, generator)
    views = apply_two_views(shapes.train_images[:2], *draws)
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axes, pixels: shown.append(torch.as_tensor(pixels)))
    monkeypatch.setattr("matplotlib.axes.Axes.add_patch", lambda axes, patch: outlines.append((*patch.get_xy(), patch.get_width(), patch.get_height())))
    plot_views.plot_views(str(tmp_path), shapes.train_images[:2], *views, *draws)
    assert torch.equal(torch.stack(shown[:2]).permute(0, 3, 1, 2), shapes.train_images[:2])
    for pixels, view in zip((torch.stack(shown[2:4]), torch.stack(shown[4:])), views):
        assert torch.allclose(normalize(pixels.permute(0, 3, 1, 2)), view, atol=1e-5)
    assert outlines[0] == (draws[0].left[0] - 0.5, draws[0].top[0] - 0.5, draws[0].width[0], draws[0].height[0])


def test_denormalize_is_the_opposite_of_normalize(shapes):
    pictures = shapes.test_images[:20]
    assert torch.allclose(denormalize(normalize(pictures)) * 255, pictures.float(), atol=1e-3)


# ---------------------------------------------------------------------------------------------------
# The geometry of features


@pytest.fixture
def features():
    return torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17)


def test_uniformity_is_the_papers_over_all_pairs(features, monkeypatch):
    """Wang & Isola's own expression, by torch.pdist; and the same in several chunks."""
    expected = torch.pdist(F.normalize(features.double(), dim=1)).square().mul(-2).exp().mean().log().item()
    assert metrics.uniformity(features) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(metrics, "PAIRS", 300 * 7)
    assert metrics.uniformity(features) == pytest.approx(expected, abs=1e-5)
    assert metrics.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)  # all one
    assert metrics.uniformity(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-8)  # distance 2
    assert metrics.uniformity(torch.zeros(5, 3)) == 0  # no direction at all
    with pytest.raises(ValueError, match="pairs"):
        metrics.uniformity(torch.ones(1, 3))


def test_alignment_is_the_mean_squared_distance(features):
    assert metrics.alignment(features, 3 * features) == pytest.approx(0, abs=1e-6)
    assert metrics.alignment(features, -features) == pytest.approx(4)
    other = features.roll(1, dims=0)
    expected = 2 - 2 * F.cosine_similarity(features, other).mean().item()
    assert metrics.alignment(features, other) == pytest.approx(expected, abs=1e-5)


def test_spectrum_and_effective_rank(features):
    eigenvalues = metrics.spectrum(features)
    singular = torch.linalg.svdvals(features.double() - features.double().mean(dim=0))
    assert torch.allclose(eigenvalues, singular.square() / 299)
    assert metrics.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert metrics.effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert metrics.effective_rank(torch.zeros(3)) == 0
    flat = torch.zeros(50, 8)
    flat[:, 0] = torch.arange(50)
    assert metrics.effective_rank(metrics.spectrum(flat)) == pytest.approx(1)


def test_principal_components_are_the_svds(features):
    points, shares = metrics.principal_components(features)
    centered = features.double() - features.double().mean(dim=0)
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    for i in range(2):
        difference = min((points[:, i] - sign * u[:, i] * s[i]).abs().max().item() for sign in (-1, 1))
        assert difference < 1e-8
    assert torch.allclose(shares, (s.square() / s.square().sum())[:2])
    again, _ = metrics.principal_components(features)
    assert torch.equal(points, again)


# ---------------------------------------------------------------------------------------------------
# The figures of the features


@pytest.fixture(scope="module")
def run_with_untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visualized")
    assert pretraining.main([*SMALL, "--epochs", "1", "--untrained", "--exp_dir", str(folder), "--trial", "run"]) == 0
    return folder / "run"


FEATURE_FIGURES = ("neighbors", "map-pca", "knn-confusion", "spectrum", "distances")


def test_a_runs_folder_gets_the_figures_of_its_features(run_with_untrained, capsys):
    assert visualize.main(["--pretrained", str(run_with_untrained)]) == 0
    names = set(os.listdir(run_with_untrained))
    assert {f"{name}.{ending}" for name in FEATURE_FIGURES for ending in ("png", "svg")} <= names
    numbers = json.loads((run_with_untrained / "features.json").read_text())
    records = log.read(run_with_untrained)
    for name, record in (("trained", records[-1]), ("untrained", records[0])):
        assert numbers[name]["knn1"] == record["knn1"] and numbers[name]["knn200"] == record["knn200"]
    assert numbers["bank"] == 256 and numbers["test_pictures"] == 100  # the run's own pictures
    assert "effective rank" in (run_with_untrained / "report.html").read_text()


def test_any_checkpoint_gets_them_in_a_folder_of_its_own(run_with_untrained, tmp_path, capsys):
    state = {"state_dict": {f"module.backbone.{name}": value for name, value in torch.load(run_with_untrained / "backbone.pt").items()}}
    torch.save(state, tmp_path / "other.pt")
    settings = ["--dataset", "shapes", "--train_size", "30", "--test_size", "20", "--pretrained", str(tmp_path / "other.pt")]
    with pytest.raises(SystemExit) as stop:
        visualize.main(settings)
    assert stop.value.code == 2 and "--output" in capsys.readouterr().err
    assert visualize.main([*settings, "--output", str(tmp_path / "figures"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert {f"{name}.png" for name in FEATURE_FIGURES} <= set(os.listdir(tmp_path / "figures"))
    assert not os.path.exists(tmp_path / "figures" / "report.html")


def test_tsne_where_scikit_learn_is(shapes, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    args = visualize.make_parser().parse_args(["--pretrained", "x", "--output", str(tmp_path)])
    unit = F.normalize(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    data = shapes._replace(test_labels=shapes.test_labels[:100])
    set_quiet(False)
    visualize.draw_tsne(args, data, unit)
    assert (tmp_path / "map-tsne.png").exists() and "left out" not in capsys.readouterr().out
    os.remove(tmp_path / "map-tsne.png")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    visualize.draw_tsne(args, data, unit)
    assert not (tmp_path / "map-tsne.png").exists() and "pip install scikit-learn" in capsys.readouterr().out


def test_the_neighbors_shown_are_the_nearest(shapes, tmp_path, monkeypatch):
    """With one-hot features every neighbor is of the query's class; the dozen has every class."""
    seen = {}
    monkeypatch.setattr(visualize, "plot_neighbors", lambda folder, *given: seen.update(given=given))
    for name in ("plot_confusion", "plot_map", "draw_tsne"):
        monkeypatch.setattr(visualize, name, lambda *args, **options: None)
    args = visualize.make_parser().parse_args(["--pretrained", "x", "--output", str(tmp_path)])
    bank, queries = (F.one_hot(labels, 10).float() for labels in (shapes.train_labels, shapes.test_labels))
    visualize.draw(args, shapes, visualize.find_neighbors(bank, queries, shapes), queries)
    queries, query_labels, neighbors, neighbor_labels, similarities, classes = seen["given"]
    assert len(query_labels) == 12 and set(query_labels) == set(range(10))
    assert neighbor_labels.shape == (12, 6) and (neighbor_labels == torch.tensor(query_labels)[:, None]).all()
    assert torch.allclose(similarities, torch.ones(12, 6))
    assert queries.shape == (12, 3, 32, 32) and neighbors.shape == (12, 6, 3, 32, 32)


def test_names_on_a_map_do_not_cover_each_other():
    centers = numpy.array([[0.0, 0.0], [0.0, 0.01], [0.02, 0.0], [5.0, 5.0]])
    places = plot_features.unstacked(centers, (1.0, 0.5))
    assert (places[3] == centers[3]).all() and (places[:, 0] == centers[:, 0]).all()
    assert min(abs(places[i, 1] - places[j, 1]) for i in range(3) for j in range(i)) >= 0.5


def test_the_palette_is_told_apart_in_gray_too():
    """Neighbors in the order of the lines differ in lightness and in dashes."""
    from matplotlib.colors import to_rgb
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(to_rgb, style.COLORS)]
    for i in range(len(lightness) - 1):
        assert abs(lightness[i] - lightness[i + 1]) > 0.06 and style.DASHES[i] != style.DASHES[i + 1]


def test_committed_logs_make_the_readmes_figures(tmp_path):
    """From the log that the README names; no run is needed."""
    shutil.copytree(REPO / "logs" / "cifar10-w16-24ep", tmp_path / "run")
    plot.plot_run(str(tmp_path / "run"))
    assert Image.open(tmp_path / "run" / "loss-plot.png").size == Image.open(REPO / "imgs" / "loss-plot.png").size
