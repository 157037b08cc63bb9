"""The documents against the code: commands, code blocks and numbers; and the layout of the code."""
import ast
import re
import shlex
import subprocess
import sys

import pytest
import torch

import ablate
import export
import main as pretraining
import layouts
import main_lincls
import simsiam
import visualize
from benchmarks import speed
from conftest import REPO
from utils import checkpoint, log, plot

DOCUMENTS = [REPO / "README.md", REPO / "logs" / "README.md", *sorted((REPO / "docs").glob("*.md"))]
COMMAND = r"(?:python|make|bash|pip|tensorboard) "
PARSERS = {"main.py": pretraining, "main_lincls.py": main_lincls, "export.py": export, "visualize.py": visualize}


def commands_in(text):
    """The commands in fenced or indented lines, and between backticks."""
    text = text.replace("\\\n", " ")
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`", text)]
    return [shlex.split(line, comments=True) for line in lines if re.match(COMMAND, line)]


def check_python(name, args, monkeypatch):
    """Parse the arguments of a script as it parses them itself."""
    if name in PARSERS:
        PARSERS[name].make_parser().parse_args(args)
    elif name == "ablate.py":
        _, rest = ablate.make_parser().parse_known_args(args)
        pretraining.make_parser().parse_args(rest)
    else:  # their parsers are in main, which goes on to the function that is replaced
        module, owner, function = {"utils.plot": (plot, log, "table"), "benchmarks/speed.py": (
            speed, speed.devices, "select_device")}[name]
        monkeypatch.setattr(owner, function, lambda *args: sys.exit(77))
        with pytest.raises(SystemExit) as stop:
            module.main(args)
        assert stop.value.code == 77, (name, args)


def test_documented_commands_are_accepted_by_the_real_parsers(monkeypatch):
    texts = [path.read_text() for path in DOCUMENTS] + [
        module.__doc__ for module in (pretraining, main_lincls, export, visualize, ablate, plot, speed)]
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for program, *args in (command for text in texts for command in commands_in(text)):
        seen.add(program)
        if program == "make":
            assert args[0] in targets, args
        elif program == "bash":
            assert (REPO / args[0]).exists(), args
            options = re.findall(r"^# (--\w+) ", (REPO / "reproduce.sh").read_text(), re.MULTILINE)
            assert {arg for arg in args if arg.startswith("--")} <= {*options, "--help"}, args
        elif program == "python":
            name, *args = args[1:] if args[0] == "-m" else args
            seen.add(name)
            if "--help" not in args:
                check_python(name, args, monkeypatch)
    assert seen >= {"make", "bash", "pip", "ablate.py", "utils.plot", "benchmarks/speed.py", *PARSERS}


def test_the_pythons_blocks_run(tmp_path, finished_run):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "1").symlink_to(finished_run)
    (tmp_path / "experiments" / "2").mkdir()
    backbone, classifier = checkpoint.load(f"{finished_run}/backbone.pt"), torch.nn.Linear(32, 10).state_dict()
    torch.save({"arch": "resnet18", "backbone": backbone, "classifier": classifier, "about": {"classes": [*range(10)]}},
               tmp_path / "experiments" / "2" / "model.pt")
    for name in ("hubconf.py", "simsiam", "utils", "weights"):
        (tmp_path / name).symlink_to(REPO / name)
    blocks = [block for path in DOCUMENTS for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)]
    blocks = [block for block in blocks if "models.resnet18" not in block and "timm" not in block]  # see below
    code = "import numpy\nnumpy.load = lambda path: {}\n" + "\n".join(blocks)  # what a documented command would write
    assert len(blocks) >= 2
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_the_backbone_loads_in_other_resnets(tmp_path, monkeypatch, package):
    """The README's lines, on a backbone of width 64 with batch norms that are not the initial ones."""
    scope = {package: pytest.importorskip(package), "torch": torch}
    block = next(block for block in re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"),
                                               re.DOTALL) if block.startswith("model = "))
    assert re.match(r"model = torchvision\..*  # or timm\.", block)
    block = re.sub(r".*# or", "model =", block, count=1) if package == "timm" else block
    backbone = simsiam.load_backbone(layouts.reference().state_dict(), verbose=False)
    (tmp_path / "experiments" / "1").mkdir(parents=True)
    half = {name: value.half() for name, value in backbone.state_dict().items()}
    torch.save(half, tmp_path / "experiments" / "1" / "backbone.pt")
    monkeypatch.chdir(tmp_path)
    exec(block, scope)
    assert block.count("\n") == 3
    model, images = scope["model"].eval(), torch.randn(2, 3, 32, 32)
    assert model.fc.out_features == 10
    model.fc = torch.nn.Identity()
    backbone = simsiam.load_backbone("experiments/1/backbone.pt", verbose=False)
    torch.testing.assert_close(model(images), backbone(images), rtol=1e-4, atol=1e-4)


def test_links_lead_to_files():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            assert link.startswith("https://") or (path.parent / link).exists(), (path.name, link)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_go_one_way():
    """simsiam imports torch only, utils not the scripts, and of the scripts only ablate.py another one, main.py."""
    for path in (REPO / "simsiam").glob("*.py"):
        assert set(imported(path)) <= {"torch", "simsiam", "safetensors"} | sys.stdlib_module_names, path
    assert set(imported(REPO / "hubconf.py")) <= {"simsiam"} | sys.stdlib_module_names
    third_party = {"torch", "torchvision", "numpy", "tqdm", "matplotlib", "PIL"}
    for path in (REPO / "utils").glob("*.py"):
        assert set(imported(path)) <= third_party | {"simsiam", "utils"} | sys.stdlib_module_names, path
    for path in (*REPO.glob("*.py"), *(REPO / "benchmarks").glob("*.py")):
        scripts = {"main", "main_lincls", "ablate", "export", "visualize"} & set(imported(path))
        assert scripts <= ({"main"} if path.name == "ablate.py" else set()), path


def test_the_code_stays_small_and_readable():
    """All Python and shell outside tests/: lines and functions; main.py alone; the documents."""
    paths = [*REPO.glob("*.py"), *REPO.glob("*.sh")]
    paths += [path for folder in ("simsiam", "utils", "benchmarks") for path in (REPO / folder).rglob("*.[ps][yh]")]
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    assert 3000 < len(lines) <= 4375 and max(map(len, lines)) <= 120
    assert sum(len(line) > 100 for line in lines) <= 0.08 * len(lines)
    functions = [(path.name, node) for path in paths if path.suffix == ".py"
                 for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]
    for name, node in functions:
        parameters = {each.arg for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]} - {"self"}
        assert len(parameters) <= 7 and node.end_lineno - node.lineno < 60, (name, node.name)
    script = (REPO / "main.py").read_text(encoding="utf-8")
    names = [alias.name for node in ast.parse(script).body if isinstance(node, (ast.Import, ast.ImportFrom))
             for alias in node.names]
    assert len(script.splitlines()) <= 300 and len(script.encode()) <= 14_860 and len(names) <= 25
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
    words = [len(path.read_text(encoding="utf-8").split()) for path in (REPO / "docs").glob("*.md")]
    assert sum(words) <= 5800
