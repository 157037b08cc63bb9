"""Argument lists of all kinds: the scripts end with 0 or 2, say one line, and leave no folder or a whole one.

FUZZ=20 in the environment tries 20 times as many.
"""
import contextlib
import io
import os
import pathlib
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main as pretraining
import main_lincls
from utils import checkpoint
from utils.cli import run

VALUES = st.one_of(
    st.sampled_from([
        "", " ", "-1", "-0", "0", "1", "2", "3", "+3", "2.5", "1e400", "nan", "inf", "-inf", "1e-320", "1e300", "0x10", "1_0", "½", "٣",
        "4294967295", "4294967296", "9" * 30, "-" + "9" * 30, "None", "True", "a b", "ü/ñ", "..", ".", "/dev/null", "/proc", "no/such/folder",
        "\0", "\n", "a\nb", "\udcff", "日本", "x" * 300, "--", "-", "--epochs", "auto", "*", "%s", "{}", "~",
        "shapes", "cifar10", "cifar100", "resnet18", "resnet34", "resnet50", "bf16", "fp16", "fp32",
    ]),
    st.integers(-3, 40).map(str), st.integers().map(str), st.floats().map(str), st.text(max_size=8).filter(lambda text: not text.startswith("/")),  # no runs in the root folder
)
ACCEPTED = [  # by both scripts, so that not all lists are refused at their first option
    ("--width", "1"), ("--seed", "4294967295"), ("--trial", "a b"), ("--trial", "日本"), ("--trial", "\udcff"), ("--trial", "a\nb"), ("--exp_dir", "ü/ñ"),
    ("--exp_dir", " "), ("--momentum", "0"), ("--weight_decay", "1e300"), ("--epochs", "4294967295"), ("--precision", "bf16"), ("--test_size", "3"),
    ("--batch_size", "3"), ("--train_size", "7"),
]
TIMES = int(os.environ.get("FUZZ", 1))
FUZZ = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def options_of(module):
    names = [name for action in module.make_parser()._actions for name in action.option_strings if name not in ("-h", "--help")]
    option = st.sampled_from([*names, "--unknown"])
    accepted = st.sampled_from(ACCEPTED)
    item = st.one_of(
        st.tuples(option, VALUES), st.tuples(option, VALUES), option.map(lambda name: (name,)), VALUES.map(lambda value: (value,)), accepted,
    )
    return st.one_of(st.lists(accepted, min_size=1, max_size=5), st.lists(item, min_size=1, max_size=5)).map(lambda items: [word for words in items for word in words])


def check(module, base, argv, folder):
    """Run module.main in an empty folder, check how it ends and what is left; returns the exit code."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    usual = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            run(lambda: module.main([*base, *argv]))
    finally:
        os.chdir(usual)
    err.flush()
    said = err.buffer.getvalue().decode()
    diverged = stop.value.code == 1 and said.count("error: epoch 1, step ") == 1  # --weight_decay 1e300 is a number
    assert stop.value.code in (0, 2) or diverged, (argv, said)
    made = [path.parent for path in pathlib.Path(folder).rglob("config.json")]
    left = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    if stop.value.code == 2:
        assert said.count("\n") == 1 and said.startswith(module.__name__ + ".py: error: "), (argv, said)
        assert not left, (argv, left)
    elif module is pretraining:
        for path in made:
            assert checkpoint.load(str(path / "checkpoint.pt"))["epoch"] <= checkpoint.load(str(path / "checkpoint.pt"))["config"]["epochs"]
            assert (path / "backbone.pt").exists() and (path / "log.jsonl").exists()
    return stop.value.code


@pytest.fixture
def offline(monkeypatch, no_gpu):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)


TINY = "--dataset shapes --train_size 8 --test_size 4 --width 1 --dim 2 --pred_dim 1 --epochs 1 --batch_size 4 --no-compile".split()


def test_any_arguments_of_main(offline, monkeypatch, tmp_path):
    monkeypatch.setattr("main.pretrain", lambda *args: 0)  # all but the training itself
    codes = []

    @settings(FUZZ, max_examples=60 * TIMES)
    @given(options_of(pretraining))
    def fuzz(argv):
        codes.append(check(pretraining, TINY, argv, tmp_path / "here"))

    fuzz()
    assert min(codes.count(0), codes.count(2)) > 10


def test_any_arguments_of_a_whole_run(offline, monkeypatch, tmp_path):
    """With the training, stopped after a second."""
    monkeypatch.setattr("main.StopRequest", lambda minutes, begin, usual=pretraining.StopRequest: usual(0.02, begin))
    codes = []

    @settings(FUZZ, max_examples=8 * TIMES)
    @given(options_of(pretraining).filter(lambda argv: "--compile" not in argv))
    def fuzz(argv):
        codes.append(check(pretraining, TINY, argv, tmp_path / "here"))

    fuzz()
    assert 0 in codes and 2 in codes


def test_any_arguments_of_main_lincls(offline, monkeypatch, tmp_path, finished_run):
    monkeypatch.setattr("main_lincls.evaluate", lambda *args: 0)
    base = ["--pretrained", os.path.join(finished_run, "backbone.pt"), *"--dataset shapes --train_size 8 --test_size 4".split()]
    codes = []

    @settings(FUZZ, max_examples=80 * TIMES)
    @given(options_of(main_lincls))
    def fuzz(argv):
        codes.append(check(main_lincls, base, argv, tmp_path / "here"))

    fuzz()
    assert min(codes.count(0), codes.count(2)) > 10
