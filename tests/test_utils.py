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

import ablate
import export
import kills
import main as pretraining
import main_lincls
import visualize
from benchmarks import speed
from conftest import REPO
from utils import checkpoint, log, plot, report, results, studies


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


def test_tables_come_from_the_log(tmp_path):
    for name, records in {
        "pretraining": [{"epoch": 0, "knn1": 20.0, "knn200": 25.0}, {"epoch": 1, "loss": -0.5, "std": 0.9, "knn1": 30.0, "knn200": 35.5}],
        "linear": [{"epoch": 1, "train_loss": 2.0, "train_top1": 50.0, "test_top1": 61.0}, {"epoch": 2, "train_loss": 1.0, "train_top1": 55.0, "test_top1": 60.25}],
    }.items():
        (tmp_path / name).mkdir()
        for record in records:
            log.append(str(tmp_path / name), record)
    result = subprocess.run(
        [sys.executable, "-m", "utils.log", tmp_path / "pretraining", tmp_path / "linear"], cwd=REPO, capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "k=200 35.50 (untrained 25.00)" in result.stdout and "60.25 % (epoch 2)" in result.stdout
    missing = subprocess.run([sys.executable, "-m", "utils.log", tmp_path], cwd=REPO, capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1


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


COMMAND = r"(?:python|make|bash|pip|tensorboard) "
PARSERS = {
    "main.py": pretraining.make_parser, "main_lincls.py": main_lincls.make_parser, "export.py": export.make_parser,
    "visualize.py": visualize.make_parser, "benchmarks/speed.py": speed.make_parser, "tests/kills.py": kills.make_parser,
    "utils.plot": plot.make_parser, "utils.log": log.make_parser, "utils.report": report.make_parser, "utils.studies": studies.make_parser,
    "utils.results": results.make_parser,
}


def commands_in(text):
    """The commands in indented or fenced lines, and between backticks."""
    fenced = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines() if re.match(COMMAND, line)]
    lines += re.findall(rf"^    ({COMMAND}.*)$", text, re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(rf"(?<!`)`({COMMAND}[^`]+)`", text)]
    return [shlex.split(command, comments=True) for command in (*lines, *inline)]


def test_the_documented_commands_parse():
    """Every command in the documents and in the scripts' docstrings is one that the real parsers take, or names files and
    targets that are there."""
    texts = [path.read_text() for path in (REPO / "README.md", REPO / "logs" / "README.md", REPO / "benchmarks" / "results" / "README.md")]
    texts += [module.__doc__ for module in (pretraining, main_lincls, export, visualize, ablate, plot, log, report, results, studies)]
    targets = re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for program, *args in (command for text in texts for command in commands_in(text)):
        seen.add(program)
        if program == "make":
            assert args[0] in targets, args
        elif program == "bash":
            assert (REPO / args[0]).exists(), args
        elif program == "pip":
            assert args[0] == "install" and all((REPO / name).exists() for name in args[1:] if name.endswith(".txt")), args
        elif program == "python":
            name, *args = args[1:] if args[0] == "-m" else args
            seen.add(name)
            if "--help" in args:
                continue
            if name == "ablate.py":  # what it does not know goes to main.py
                _, args = ablate.make_parser().parse_known_args(args)
                PARSERS["main.py"]().parse_args(args)
            else:
                PARSERS[name]().parse_args(args)
    assert seen > {"make", "bash", "pip", "ablate.py", *PARSERS}
