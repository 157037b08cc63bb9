"""Wrong values, files and combinations: one line on stderr, exit code 2, nothing written."""
import os
import pickle
import random
import shlex

import pytest
import torch

import ablate
import export
import main as pretraining
import main_lincls
from conftest import SMALL, before_calls, no_room
from utils import checkpoint


PRETRAIN = [
    ("--dataset mnist", ["mnist", "cifar100", "shapes"]),
    ("--dataset cifar10 --data_root none", ["none", "--data_root", "--dataset shapes"]),
    ("--epochs 0", ["--epochs", "'0'", "at least 1"]), ("--epochs 2.5", ["--epochs", "whole number"]),
    ("--epoch 3", ["--epoch 3"]), ("--learning_rate nan", ["--learning_rate", "finite"]),
    ("--batch_size 1", ["--batch_size", "at least 2"]), ("--batch_size 129", ["--batch_size 129", "128 training"]),
    ("--warmup_epochs 800", ["--warmup_epochs 800", "800 epochs"]),
    ("--views 1", ["--views", "2, 3, 4, 5, 6, 7, 8"]),
    ("--views 3 --symmetry asymmetric", ["--views 3", "pairs"]),
    ("--fix_pred_lr --predictor none", ["--fix_pred_lr", "--predictor none"]),
    ("--precision fp16", ["fp16", "fp32 or bf16"]), ("--dim 4000000000", ["memory"]),
    ("--gpu 0", ["--gpu 0", "omit --gpu"]), ("--gpu -1", ["--gpu", "'-1'"]),
    ("--trial a/b", ["a/b", "plain folder name"]), ("--trial ..", ["plain folder name"]),
    ("--resume ''", ["'': No such file"]), ("--resume nowhere.pt", ["'nowhere.pt': No such file"]),
    ("--resume .", ["is a folder"]), ("--resume a/checkpoint.pt --trial b", ["omit --trial"]),
    ("--seed 99999999999999999999", ["--seed", "4294967295"]),
    ("--exp_dir /dev/null/runs", ["/dev/null/runs", "--exp_dir"]), ("--exp_dir /dev/null", ["/dev/null"]),
]
SCHEDULES = ["x", "", "7", "16:0.5,24", "16:nan,32:1", "32:-1,32:2", "4:0.5,32:0.5", "16:0.5,32:0.4", "16:1:1,32:0.5"]
PRETRAIN += [(f"--view_size '{schedule}'", ["--view_size", "shares that sum to 1"]) for schedule in SCHEDULES]
EVALUATE = [
    ("--num_cls 7", ["--num_cls 7", "10 classes"]), ("--arch resnet34", ["resnet18 of width 4"]),
    ("--fraction 0", ["--fraction", "above 0"]), ("--std 0 1 1", ["--std", "above 0"]),
    ("--features cached --weight_decay 0", ["--weight_decay 0", "converge"]),
    ("--pretrained none.pt", ["'none.pt': No such file"]),
    ("--evaluate none.pt", ["none.pt"]),
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
def test_scripts_refuse(refused, no_gpu, no_network, finished_run, main, args, words):
    refused(main, shlex.split(args.replace("BACKBONE", os.path.join(finished_run, "backbone.pt"))), *words)


def test_main_refuses_an_existing_trial_and_another_recipe(refused, no_gpu, run_main):
    assert run_main("--epochs", 1, "--trial", "mine") == 0
    refused(pretraining.main, [*SMALL, "--trial", "mine"], "--trial mine", "exists", "--resume")
    refused(pretraining.main, [*SMALL, "--trial", "..", "--resume", "auto"], "plain folder name")
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
    (b"", "the file is empty"), (b"no checkpoint", "begins with"), (pickle.dumps([1, 2]), "begins with"),
    (Code(), "code (test_bad_input.Code)"),
    *((content, "no backbone") for content in (torch.zeros(3), {"weight": 1}, {1: torch.zeros(2)})),
])
def test_files_of_something_else_are_refused(refused, no_gpu, tmp_path, finished_run, content, words):
    torch.save(content, tmp_path / "file.pt")
    if isinstance(content, bytes):
        (tmp_path / "file.pt").write_bytes(content)
    data = "--dataset shapes --test_size 20 --train_size 20 --pretrained".split()
    backbone = os.path.join(finished_run, "backbone.pt")
    refused(main_lincls.main, [*data, "file.pt"], "file.pt", words)
    refused(main_lincls.main, [*data, backbone, "--evaluate", "file.pt"], "file.pt is no classifier")
    refused(pretraining.main, ["--resume", "file.pt"], "file.pt", words.replace("no backbone", "not a checkpoint"))


def test_a_checkpoint_with_any_damage_is_refused_or_whole(tmp_path):
    """Truncated at 20 lengths, and with a bit flipped at 300 places: an error, or the very same content."""
    generator, path, refusals = random.Random(0), tmp_path / "file.pt", 0
    torch.save({"tensor": torch.arange(500), "number": 3}, path)
    whole = path.read_bytes()
    damaged = [whole[:generator.randrange(len(whole))] for _ in range(20)]
    for _ in range(300):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        damaged.append(content)
    for content in damaged:
        path.write_bytes(content)
        try:
            loaded = checkpoint.load(str(path))
            assert torch.equal(loaded["tensor"], torch.arange(500)) and loaded["number"] == 3
        except ValueError as error:
            refusals += 1
            assert "not a checkpoint that can be loaded" in str(error)
    assert refusals > 200


def test_no_room_at_the_start_leaves_no_folder(refused, no_gpu):
    with before_calls(range(1, 100), os, "fsync", no_room):
        refused(pretraining.main, SMALL, "could not be written")
