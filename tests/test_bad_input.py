"""Wrong values, files and combinations: one line on stderr, exit code 2, nothing written."""
import os
import pathlib
import pickle
import shlex
import shutil

import pytest
import torch

import export
import main as pretraining
import main_lincls
from conftest import SMALL
from utils import checkpoint, log, plot


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(function, args, *words): the call ends with 2 and one line that has the words."""
    monkeypatch.chdir(tmp_path)

    def check(function, args, *words):
        before = tree(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function([str(arg) for arg in args])
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and line.endswith("\n"), line
        assert "weights_only" not in line
        for word in words:
            assert str(word) in line, line
        assert tree(tmp_path) == before
        assert not any(path.is_dir() and not any(path.iterdir()) for path in tmp_path.rglob("*/experiments/*"))

    return check


@pytest.mark.parametrize("args, words", [
    ("--arch resnet19", ["--arch", "resnet19", "resnet18"]),
    ("--dataset mnist", ["mnist", "cifar100", "shapes"]),
    ("--epochs 0", ["--epochs", "'0'", "at least 1"]),
    ("--epochs 2.5", ["--epochs", "whole number"]),
    ("--learning_rate -0.1", ["--learning_rate", "-0.1", "at least 0"]),
    ("--learning_rate nan", ["--learning_rate", "finite"]),
    ("--weight_decay=-1", ["--weight_decay", "at least 0"]),
    ("--momentum inf", ["--momentum", "finite"]),
    ("--batch_size 1", ["--batch_size", "at least 2"]),
    ("--batch_size 257", ["--batch_size 257", "256 training pictures"]),
    ("--width 0", ["--width", "at least 1"]),
    ("--num_proj_layers 4", ["--num_proj_layers", "4"]),
    ("--precision fp8", ["fp8", "bf16"]),
    ("--precision fp16", ["fp16", "fp32 or bf16"]),
    ("--gpu 0", ["--gpu 0", "leave --gpu out"]),
    ("--gpu -1", ["--gpu -1"]),
    ("--trial a/b", ["a/b", "plain folder name"]),
    ("--trial ..", ["plain folder name"]),
    ("--epoch 3", ["--epoch 3", "did you mean --epochs?"]),
    ("--weight-decay 0", ["did you mean --weight_decay?"]),
    ("--lr 0.1", ["did you mean --learning_rate?"]),
    ("--arch ResNet18", ["did you mean resnet18?"]),
    ("--dataset cifar-10", ["did you mean cifar10?"]),
    ("--resume ''", ["''", "no such file"]),
    ("--resume .", ["is a folder"]),
    ("--seed 99999999999999999999", ["--seed", "less than 2^32"]),
    ("--dim 4000000000", ["memory"]),
    ("--resume nowhere.pt", ["nowhere.pt", "no such file"]),
    ("--resume a/checkpoint.pt --trial b", ["leave --trial out"]),
    ("--exp_dir /dev/null/runs", ["/dev/null/runs", "--exp_dir"]),
    ("--exp_dir /dev/null", ["/dev/null", "not a folder"]),
])
def test_main_refuses(refused, no_gpu, args, words):
    refused(pretraining.main, [*SMALL, *shlex.split(args)], *words)


@pytest.mark.parametrize("parser, args, word", [
    (main_lincls.make_parser(), "--learning_rate 1", "did you mean --lr?"),
    (export.make_parser(), "backbone --pretrained a --output b --formt export", "did you mean --format?"),
    (export.make_parser(), "feature --pretrained a --output b", "did you mean features?"),
])
def test_other_scripts_know_the_nearest_option_too(parser, args, word, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(args.split())
    assert word in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args([*args.split(), "--zzz"][-1:])
    assert "did you mean" not in capsys.readouterr().err  # nothing is near


def test_main_refuses_missing_and_damaged_data(refused, no_gpu, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    refused(pretraining.main, ["--data_root", tmp_path / "none"], tmp_path / "none", "--data_root", "--dataset shapes")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not a batch")
    refused(pretraining.main, ["--data_root", tmp_path], "damaged", "data_batch_1")


def test_main_refuses_an_existing_trial(refused, no_gpu, run_main):
    assert run_main("--epochs", 1, "--trial", "mine") == 0
    refused(pretraining.main, [*SMALL, "--trial", "mine"], "--trial mine", "exists", "--resume")


def test_main_refuses_to_resume_what_does_not_fit(refused, no_gpu, finished_run, tmp_path):
    path = tmp_path / "checkpoint.pt"
    shutil.copy(os.path.join(finished_run, "checkpoint.pt"), path)
    for args, words in (
        ("--arch resnet34", ["--arch resnet34", "resnet18"]),
        ("--width 8", ["--width 8", "has 4"]),
        ("--epochs 3", ["--epochs 3", "has 2"]),
        ("--seed 1", ["--seed 1", "has 0"]),
    ):
        refused(pretraining.main, ["--resume", path, *args.split()], *words)
    shutil.copy(os.path.join(finished_run, "backbone.pt"), tmp_path / "backbone.pt")
    refused(pretraining.main, ["--resume", tmp_path / "backbone.pt"], "backbone.pt", "not a checkpoint.pt")


@pytest.mark.parametrize("size", [0, 1000, -100])
def test_both_refuse_a_truncated_checkpoint(refused, no_gpu, finished_run, tmp_path, size):
    whole = pathlib.Path(finished_run, "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:size])
    reason = "truncated or damaged" if size else "the file is empty"
    refused(pretraining.main, ["--resume", tmp_path / "checkpoint.pt"], "checkpoint.pt", reason)
    refused(main_lincls.main, ["--pretrained", tmp_path / "checkpoint.pt", "--dataset", "shapes"], "checkpoint.pt", reason)


class Mark:
    """Unpickling this creates a file: what a hostile checkpoint would do."""

    def __reduce__(self):
        return os.mkdir, ("mark",)


def test_code_in_a_checkpoint_does_not_run(refused, no_gpu, tmp_path):
    torch.save({"model": Mark()}, tmp_path / "hostile.pt")
    refused(pretraining.main, ["--resume", tmp_path / "hostile.pt"], "hostile.pt")
    refused(main_lincls.main, ["--pretrained", tmp_path / "hostile.pt", "--dataset", "shapes"], "hostile.pt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("args, words", [
    ("", ["--pretrained"]),
    ("--pretrained nowhere.pt", ["nowhere.pt", "no such file"]),
    ("--pretrained {run}", ["is a folder"]),
    ("--pretrained {run}/config.json", ["config.json", "damaged"]),
    ("--pretrained {run}/backbone.pt --arch resnet34", ["backbone.pt", "missing: layer1.2.conv1.weight"]),
    ("--pretrained {run}/backbone.pt --arch resnet50", ["another shape"]),
    ("--pretrained {run}/backbone.pt --width 8", ["another shape: conv1.weight is (4, 3, 3, 3), not (8, 3, 3, 3)"]),
    ("--pretrained {run}/backbone.pt --num_cls 7", ["--num_cls 7", "10 classes"]),
    ("--pretrained {run}/backbone.pt --lr -1", ["--lr", "at least 0"]),
    ("--pretrained {run}/backbone.pt --epochs 0", ["--epochs"]),
    ("--pretrained {run}/backbone.pt --features fast", ["fast", "cached"]),
    ("--pretrained {run}/backbone.pt --gpu 0", ["--gpu 0"]),
    ("--pretrained {run}/backbone.pt --train_size 0", ["--train_size"]),
    ("--pretrained {run}/backbone.pt --fraction 0", ["--fraction", "more than 0 and at most 1"]),
    ("--pretrained {run}/backbone.pt --fraction 1.1", ["--fraction", "at most 1"]),
    ("--pretrained {run}/backbone.pt --crop_scale 1 0.5", ["--crop_scale 1 0.5", "smaller"]),
    ("--pretrained {run}/backbone.pt --crop_scale 0.5", ["--crop_scale", "2 arguments"]),
    ("--pretrained {run}/backbone.pt --std 0 1 1", ["--std", "more than 0"]),
    ("--pretrained {run}/backbone.pt --seeds 0", ["--seeds", "at least 1"]),
    ("--pretrained {run}/backbone.pt --optimizer lbfgs", ["lbfgs", "--features cached"]),
    ("--pretrained {run}/backbone.pt --optimizer lbfgs --features cached --lr 1", ["--lr 1", "leave --lr out"]),
    ("--pretrained {run}/backbone.pt --evaluate {run}/backbone.pt", ["backbone.pt", "not a classifier of 32 features and 10 classes"]),
    ("--pretrained {run}/backbone.pt --evaluate {run}/checkpoint.pt", ["checkpoint.pt", "not a classifier"]),
    ("--pretrained {run}/backbone.pt --evaluate none.pt", ["none.pt", "no such file"]),
    ("--pretrained {run}/backbone.pt --evaluate c.pt --resume auto", ["--evaluate", "--resume"]),
    ("--resume {run}/checkpoint.pt", ["checkpoint.pt", "not a whole evaluation.pt of main_lincls.py"]),
])
def test_main_lincls_refuses(refused, no_gpu, finished_run, args, words):
    refused(main_lincls.main, ["--dataset", "shapes", *args.format(run=finished_run).split()], *words)


def test_main_lincls_refuses_to_resume_what_does_not_fit(refused, no_gpu, finished_run, run_lincls, tmp_path):
    path = os.path.join(finished_run, "backbone.pt")
    assert run_lincls("--pretrained", path, "--features", "cached", "--epochs", 2, "--trial", "eval") == 0
    os.remove("experiments/eval/results.json")  # else it is done
    checkpoint.save(str(tmp_path / "other.pt"), {name: 2 * value for name, value in checkpoint.load(path).items()})
    for args, words in (
        ("--epochs 3", ["--epochs 3", "has 2"]), ("--lr 3", ["--lr 3", "has 30"]), ("--seeds 2", ["--seeds 2", "has 1"]),
        ("--features augmented", ["--features augmented", "has cached"]),
        ("--pretrained other.pt", ["other.pt", "not the backbone"]),
    ):
        refused(main_lincls.main, ["--resume", "experiments/eval/evaluation.pt", *args.split()], *words)
    refused(pretraining.main, ["--resume", "experiments/eval/evaluation.pt"], "not a whole checkpoint.pt of main.py")
    state = checkpoint.load("experiments/eval/evaluation.pt")
    state["heads"][0].pop("bias")
    checkpoint.save("experiments/eval/evaluation.pt", state)
    refused(main_lincls.main, ["--resume", "auto"], "evaluation.pt", "its heads does not fit")


def test_main_lincls_refuses_a_classifier(refused, no_gpu, tmp_path):
    checkpoint.save(str(tmp_path / "classifier.pt"), torch.nn.Linear(4, 10).state_dict())
    refused(main_lincls.main, ["--pretrained", tmp_path / "classifier.pt", "--dataset", "shapes"], "no backbone")


def same(first, second):
    """Whether two nests of dicts, lists, tensors and plain values are equal."""
    if isinstance(first, list):
        return isinstance(second, list) and len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return isinstance(second, dict) and list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    return torch.equal(first, second) if torch.is_tensor(first) else first == second


def test_other_files_are_refused_as_a_checkpoint(tmp_path):
    path = tmp_path / "bytes.pt"
    for content in (b"epoch,loss\n1,2\n", pickle.dumps({"a": Mark()}), pickle.dumps([1], 4), b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="bytes.pt"):
            checkpoint.load(str(path))


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path):
    """All bytes of a small checkpoint: headers, values, tensors, tail. Only the seven that mark the digest may be
    other ones, and then the content is what it was."""
    path = tmp_path / "small.pt"
    state = {"weight": torch.arange(300.0), "config": {"width": 4, "name": "text"}, "list": [torch.ones(3, 3), 1.5]}
    checkpoint.save(str(path), state)
    whole = path.read_bytes()
    refused = 0
    for i in range(len(whole)):
        for content in (whole[:i], whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:]):
            path.write_bytes(content)
            try:
                assert same(checkpoint.load(str(path)), state)
            except ValueError as error:
                assert "small.pt" in str(error)
                refused += 1
    assert refused >= 2 * len(whole) - 2 * len(checkpoint.DIGEST_MARK)


def test_flipped_bytes_of_a_whole_checkpoint_are_refused(refused, no_gpu, finished_run, tmp_path):
    for name, function, option in (("checkpoint.pt", pretraining.main, "--resume"), ("backbone.pt", main_lincls.main, "--pretrained")):
        whole = pathlib.Path(finished_run, name).read_bytes()
        for i in (0, 40, len(whole) // 3, len(whole) // 2, len(whole) - 5000, len(whole) - 80, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1:])
            refused(function, [option, tmp_path / name, "--dataset", "shapes"], name, "truncated or damaged")


def test_a_flipped_tensor_in_a_file_of_torch_save_is_noticed(tmp_path):
    """Such a file has no digest, but checksums of its parts."""
    path = tmp_path / "theirs.pt"
    torch.save({"weight": torch.arange(300.0)}, path)
    assert checkpoint.load(str(path))["weight"][7] == 7
    whole = path.read_bytes()
    place = whole.index(torch.arange(300.0).numpy().tobytes()) + 30
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(str(path))


@pytest.mark.parametrize("change, words", [
    (lambda state: state.update(format=99), ["another version", "format is 99", "config.json"]),
    (lambda state: state.pop("format"), ["another version"]),
    (lambda state: state.pop("optimizer"), ["not a whole checkpoint.pt"]),
    (lambda state: state["config"].pop("width"), ["not a whole checkpoint.pt"]),
    (lambda state: state["config"].update(width=8), ["does not fit", "another shape: backbone.conv1.weight is (4, 3, 3, 3), not (8, 3, 3, 3)"]),
    (lambda state: state["config"].update(arch="resnet34"), ["does not fit", "missing: backbone.layer1.2"]),
    (lambda state: state["config"].update(dim=64), ["does not fit", "projector"]),
    (lambda state: state["config"].update(num_proj_layers=3), ["does not fit", "projector"]),
    (lambda state: state["optimizer"]["param_groups"].clear(), ["optimizer", "does not fit"]),
    (lambda state: state.update(epoch=0, step=10**6), ["step"]),
])
def test_a_checkpoint_that_does_not_fit_is_refused(refused, no_gpu, finished_run, tmp_path, change, words):
    state = checkpoint.load(os.path.join(finished_run, "checkpoint-previous.pt"))
    change(state)
    checkpoint.save(str(tmp_path / "other.pt"), state)
    refused(pretraining.main, ["--resume", tmp_path / "other.pt"], "other.pt", *words)


def test_both_checkpoints_damaged_names_both(refused, no_gpu, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "experiments" / "run")
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (tmp_path / "experiments" / "run" / name).write_bytes(b"")
    refused(pretraining.main, ["--resume", "auto"], "checkpoint.pt", "checkpoint-previous.pt", "empty")


def test_data_with_a_flipped_byte_is_refused(refused, no_gpu, cifar_root, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    shutil.copytree(os.path.join(cifar_root, "cifar-10-batches-py"), folder)
    for name, content in (("data_batch_3", None), ("test_batch", b""), ("batches.meta", None)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:] if content is None else content)
        refused(pretraining.main, ["--data_root", tmp_path], f"damaged: {name}")
        (folder / name).write_bytes(whole)
    (folder / "data_batch_1").unlink()
    (folder / "data_batch_1").mkdir()
    refused(pretraining.main, ["--data_root", tmp_path], "damaged: data_batch_1")


def test_a_run_folder_without_a_checkpoint_is_named(refused, no_gpu, tmp_path):
    """A folder that holds more than a start of main.py: somebody's figures, say."""
    (tmp_path / "experiments" / "other").mkdir(parents=True)
    (tmp_path / "experiments" / "other" / "log.jsonl").write_text('{"epoch": 1}\n')
    refused(pretraining.main, [*SMALL, "--resume", "auto", "--trial", "other"], "no such file", "remove")


@pytest.mark.parametrize("content", ["", "5\n", '{"loss": 1}\n'])
def test_tables_and_figures_refuse_an_empty_log(refused, tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    for module in (log, plot):
        refused(module.main, [tmp_path], "log.jsonl", "no epoch")
        refused(module.main, [tmp_path / "none"], "none", "a run's folder is needed")
        refused(module.main, [], "FOLDER")
