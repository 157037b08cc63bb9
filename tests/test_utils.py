"""Checkpoint files, the log, the figures, and the layout of the code."""
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import export
import main as pretraining
import main_lincls
from conftest import REPO
from utils import checkpoint, log, plot


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = str(tmp_path / "file.pt")
    state = {"tensor": torch.randn(3), "number": 1.5, "nested": {"list": [1, None, "text"]}}
    checkpoint.save(path, state)
    again = checkpoint.load(path)
    assert torch.equal(again["tensor"], state["tensor"]) and again["nested"] == state["nested"]
    checkpoint.save(path, {"number": 2}, keep_previous=True)
    assert checkpoint.load(path) == {"number": 2}
    assert checkpoint.load(checkpoint.previous_path(path))["number"] == 1.5
    assert sorted(os.listdir(tmp_path)) == ["file-previous.pt", "file.pt"]


def test_a_failed_write_leaves_the_good_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / "file.pt")
    checkpoint.save(path, {"number": 1})

    def half_a_write(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_a_write)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"number": 2}, keep_previous=True)
    assert checkpoint.load(path) == {"number": 1}


def test_the_log_reads_back_and_a_repeated_epoch_counts_once(tmp_path):
    folder = str(tmp_path)
    log.append(folder, {"epoch": 1, "loss": -0.5})
    log.append(folder, {"epoch": 2, "loss": -0.6})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')  # killed inside the line
    log.append(folder, {"epoch": 2, "loss": -0.7})
    log.append(folder, {"epoch": 3, "loss": -0.8})
    assert [(record["epoch"], record["loss"]) for record in log.read(folder)] == [(1, -0.5), (2, -0.7), (3, -0.8)]


def test_tables_and_figures_come_from_the_log(tmp_path):
    for name, records in {
        "pretraining": [{"epoch": 0, "knn1": 20.0, "knn200": 25.0}, {"epoch": 1, "loss": -0.5, "std": 0.9, "knn1": 30.0, "knn200": 35.5}],
        "linear": [{"epoch": 1, "train_loss": 2.0, "train_top1": 50.0, "test_top1": 61.0}, {"epoch": 2, "train_loss": 1.0, "train_top1": 55.0, "test_top1": 60.25}],
    }.items():
        (tmp_path / name).mkdir()
        for record in records:
            log.append(str(tmp_path / name), record)
    for module in ("utils.log", "utils.plot"):
        result = subprocess.run(
            [sys.executable, "-m", module, tmp_path / "pretraining", tmp_path / "linear"],
            cwd=REPO, capture_output=True, text=True,
        )
        assert result.returncode == 0, result.stderr
        if module == "utils.log":
            assert "k=200 35.50 (untrained 25.00)" in result.stdout and "60.25 % (epoch 2)" in result.stdout
    for name in ("pretraining", "linear"):
        assert {"loss-plot.png", "top1-acc.png"} <= set(os.listdir(tmp_path / name))
    missing = subprocess.run([sys.executable, "-m", "utils.log", tmp_path], cwd=REPO, capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["a b", "$x_$", "\udcff"])
def test_any_folder_name_has_figures(tmp_path, name):
    folder = str(tmp_path / name)
    os.mkdir(folder)
    log.append(folder, {"epoch": 1, "loss": -0.5})
    plot.plot_run(folder)
    assert os.path.getsize(os.path.join(folder, "loss-plot.png")) > 1000


def test_views_are_shown_in_their_colors(tmp_path):
    images = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    plot.plot_views(str(tmp_path), images, torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    assert (tmp_path / "views.png").stat().st_size > 1000


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_go_one_way():
    """simsiam needs torch only; simsiam and utils do not know each other; nothing imports a main."""
    for path in (REPO / "simsiam").glob("*.py"):
        assert set(imported(path)) <= {"torch", "simsiam"} | sys.stdlib_module_names, path
    assert set(imported(REPO / "hubconf.py")) <= {"simsiam"} | sys.stdlib_module_names
    third_party = {"torch", "torchvision", "numpy", "tqdm", "matplotlib"}
    for path in (REPO / "utils").glob("*.py"):
        assert set(imported(path)) <= third_party | {"utils"} | sys.stdlib_module_names, path
    assert (REPO / "utils" / "__init__.py").read_text() == ""


def test_the_readmes_python_runs(tmp_path, finished_run, monkeypatch):
    """The blocks, in a folder with what the commands around it leave there."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for name in ("hubconf.py", "simsiam", "utils", "weights"):
        (tmp_path / name).symlink_to(REPO / name)
    backbone = tmp_path / "experiments" / "1" / "backbone.pt"
    backbone.parent.mkdir(parents=True)
    shutil.copy(os.path.join(finished_run, "backbone.pt"), backbone)
    monkeypatch.chdir(tmp_path)
    export.main(["features", "--pretrained", str(backbone), "--dataset", "shapes", "--train_size", "20", "--test_size", "10", "--output", "features.npz"])
    export.main(["backbone", "--pretrained", str(backbone), "--format", "export", "--output", "backbone.pt2"])
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], check=True)


def test_the_documented_commands_parse():
    """Every command of the scripts in the README and in their own docstrings is accepted by their parsers."""
    texts = [(REPO / "README.md").read_text(), pretraining.__doc__, main_lincls.__doc__, export.__doc__]
    commands = [
        shlex.split(line, comments=True) for text in texts for line in text.splitlines()
        if line.strip().startswith(("python main.py", "python main_lincls.py", "python export.py"))
    ]
    assert len(commands) > 8
    for _, script, *args in commands:
        module = {"main.py": pretraining, "main_lincls.py": main_lincls, "export.py": export}[script]
        module.make_parser().parse_args(args)
