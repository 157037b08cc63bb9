"""Wrong values, files and combinations: one line on stderr, exit code 2, nothing written."""
import io
import os
import pickle
import random
import shlex
import shutil

import pytest
import torch

import ablate
import export
import main as pretraining
import main_lincls
import simsiam
from conftest import SMALL
from utils import checkpoint


PRETRAIN = [
    ("--arch resnet19", ["--arch", "resnet19", "resnet18"]),
    ("--dataset mnist", ["mnist", "cifar100", "shapes"]),
    ("--epochs 0", ["--epochs", "'0'", "at least 1"]),
    ("--epochs 2.5", ["--epochs", "whole number"]),
    ("--learning_rate -0.1", ["--learning_rate", "-0.1", "at least 0"]),
    ("--learning_rate nan", ["--learning_rate", "finite"]),
    ("--batch_size 1", ["--batch_size", "at least 2"]),
    ("--batch_size 129", ["--batch_size 129", "128 training images"]),
    ("--warmup_epochs 800", ["--warmup_epochs 800", "800 epochs"]),
    ("--fix_pred_lr --predictor none", ["--fix_pred_lr", "--predictor none"]),
    ("--precision fp16", ["fp16", "fp32 or bf16"]),
    ("--gpu 0", ["--gpu 0", "omit --gpu"]),
    ("--gpu -1", ["--gpu -1"]),
    ("--trial a/b", ["a/b", "plain folder name"]),
    ("--trial ..", ["plain folder name"]),
    ("--epoch 3", ["--epoch 3"]),
    ("--resume ''", ["'': No such file"]),
    ("--resume .", ["is a folder"]),
    ("--resume nowhere.pt", ["'nowhere.pt': No such file"]),
    ("--resume a/checkpoint.pt --trial b", ["omit --trial"]),
    ("--seed 99999999999999999999", ["--seed", "4294967295"]),
    ("--dim 4000000000", ["memory"]),
    ("--exp_dir /dev/null/runs", ["/dev/null/runs", "--exp_dir"]),
    ("--exp_dir /dev/null", ["/dev/null"]),
]
SCHEDULES = ["x", "", "7", "16:0.5,24", "16:nan,32:1", "32:-1,32:2", "4:0.5,32:0.5", "16:0.5,32:0.4", "16:1:1,32:0.5"]
PRETRAIN += [(f"--view_size '{schedule}'", ["--view_size", "shares that sum to 1"]) for schedule in SCHEDULES]
EVALUATE = [
    ("--num_cls 7", ["--num_cls 7", "10 classes"]),
    ("--fraction 0", ["--fraction", "above 0"]),
    ("--std 0 1 1", ["--std", "above 0"]),
    ("--features cached --weight_decay 0", ["--weight_decay 0", "converge"]),
    ("--arch resnet34", ["resnet18 of width 4"]),
    ("--pretrained none.pt", ["'none.pt': No such file"]),
    ("--evaluate none.pt", ["none.pt"]),
    ("--evaluate a --resume auto", ["--evaluate"]),
]


@pytest.mark.parametrize("main, args, words", [
    *((pretraining.main, " ".join([*SMALL, args]), words) for args, words in PRETRAIN),
    *((main_lincls.main, f"--dataset shapes --train_size 128 --test_size 100 --pretrained BACKBONE {args}", words)
      for args, words in EVALUATE),
    (main_lincls.main, "--dataset shapes", ["--pretrained", "required"]),
    (export.main, "feature --pretrained a --output b", ["feature", "release"]),
    (export.main, "check simsiam_resnet18", ["simsiam_resnet18_cifar10"]),
    (ablate.main, "predicter", ["predicter", "predictor"]),
])
def test_scripts_refuse(refused, no_gpu, finished_run, main, args, words):
    refused(main, shlex.split(args.replace("BACKBONE", os.path.join(finished_run, "backbone.pt"))), *words)


def test_main_refuses_missing_and_damaged_data(refused, no_gpu, no_network, tmp_path):
    refused(pretraining.main, ["--data_root", tmp_path / "none"], tmp_path / "none", "--data_root", "--dataset shapes")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not a batch")
    refused(pretraining.main, ["--data_root", tmp_path], "cifar-10-batches-py is missing or damaged")


def test_main_refuses_an_existing_trial_and_another_recipe(refused, no_gpu, run_main):
    assert run_main("--epochs", 1, "--trial", "mine") == 0
    refused(pretraining.main, [*SMALL, "--trial", "mine"], "--trial mine", "exists", "--resume")
    again = [*SMALL, "--trial", "mine", "--resume", "auto"]
    for typed, words in (("--epochs 2", "has 1"), ("--seed 3", "has 0"), ("--no-stop_gradient", "stop_gradient False")):
        refused(pretraining.main, [*again, *typed.split()], typed.split()[0].replace("no-", ""), words)
    os.remove("experiments/mine/checkpoint.pt")
    os.remove("experiments/mine/checkpoint-previous.pt")
    refused(pretraining.main, again, "experiments/mine", "no checkpoint")


def test_main_refuses_checkpoints_that_it_cannot_resume(refused, no_gpu, finished_run, tmp_path):
    state = checkpoint.load(os.path.join(finished_run, "checkpoint.pt"))
    model = state["model"] | {"predictor.0.weight": torch.zeros(3, 3)}
    for content, words in (
        (state["model"], "not a checkpoint to resume"),
        ({**state, "format": 1}, "another version of this code (format 1"),
        ({name: value for name, value in state.items() if name != "optimizer"}, "its optimizer does not fit"),
        ({**state, "epoch": 0, "optimizer": {}}, "its optimizer does not fit"),
        ({**state, "epoch": 0, "model": model}, "its model does not fit"),
    ):
        checkpoint.save("checkpoint.pt", content)
        refused(pretraining.main, ["--resume", "checkpoint.pt"], "checkpoint.pt", words)


def test_the_folder_and_the_checkpoint_of_an_evaluation_are_not_pre_trainings(refused, no_gpu, run_lincls):
    assert run_lincls("--features", "cached", "--trial", "ev") == 0
    os.remove("experiments/ev/log.jsonl")
    refused(pretraining.main, [*SMALL, "--resume", "auto", "--trial", "ev"], "experiments/ev exists")
    refused(pretraining.main, ["--resume", "experiments/ev/evaluation.pt"], "a checkpoint of another script")
    refused(main_lincls.main, ["--resume", "experiments/ev/classifier.pt"], "not a checkpoint to resume")


class Code:
    """Something that only code can load."""


@pytest.mark.parametrize("content, words", [
    (b"", "the file is empty"), (b"no checkpoint", "no checkpoint"), (pickle.dumps([1, 2]), "begins with"),
    (Code(), "code (test_bad_input.Code)"),
])
def test_files_that_are_no_checkpoints_are_refused(refused, no_gpu, tmp_path, content, words):
    if isinstance(content, bytes):
        (tmp_path / "file.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "file.pt")
    for option in ("--pretrained", "--evaluate"):
        backbone = os.path.join("..", "backbone.pt")
        checkpoint.save(backbone, simsiam.resnet18(4).state_dict())
        args = [*"--dataset shapes --test_size 20 --train_size 20 --pretrained".split(), backbone, option, "file.pt"]
        refused(main_lincls.main, args, "file.pt", words if option == "--pretrained" else "")
    refused(pretraining.main, ["--resume", "file.pt"], "file.pt", "not a checkpoint" if content else "is empty")
    for odd in (torch.zeros(3), {"weight": 1}, {1: torch.zeros(2)}):
        checkpoint.save(os.path.join("..", "odd.pt"), odd)
        refused(main_lincls.main, [*args[:-1], os.path.join("..", "odd.pt")], "odd.pt is no classifier")


def test_a_checkpoint_with_any_damage_is_refused_or_whole(tmp_path):
    """Truncated at 20 lengths, and with a bit flipped at 300 places: an error, or the very same content."""
    generator, buffer = random.Random(0), io.BytesIO()
    state = {"tensor": torch.arange(500), "number": 3}
    torch.save(state, buffer)
    whole, path = buffer.getvalue(), str(tmp_path / "file.pt")
    damaged = [whole[:generator.randrange(len(whole))] for _ in range(20)]
    for _ in range(300):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        damaged.append(bytes(content))
    refused_count = 0
    for content in damaged:
        with open(path, "wb") as file:
            file.write(content)
        try:
            loaded = checkpoint.load(path)
            assert torch.equal(loaded["tensor"], state["tensor"]) and loaded["number"] == 3
        except ValueError as error:
            refused_count += 1
            assert "not a checkpoint that can be loaded" in str(error)
    assert refused_count > 200


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / "file.pt")
    checkpoint.save(path, {"number": 1})
    checkpoint.save(path, {"number": 2}, keep_previous=True)
    assert checkpoint.load(path)["number"] == 2 and checkpoint.load(checkpoint.previous_path(path))["number"] == 1

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="file.pt could not be written .No space left on device"):
        checkpoint.save(path, {"number": 3}, keep_previous=True)
    assert sorted(os.listdir(tmp_path)) == ["file-previous.pt", "file.pt"] and checkpoint.load(path)["number"] == 2


def test_no_room_at_the_start_leaves_no_folder(refused, no_gpu, monkeypatch):
    def full(path, *args):
        raise OSError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(checkpoint, "write", full)
    refused(pretraining.main, SMALL, "could not be written")
    shutil.rmtree("experiments")
