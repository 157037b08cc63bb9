"""The folder of a run and what is written there about the run itself."""
import argparse
import json
import os
import platform
import subprocess
import sys

import numpy
import torch
import torchvision

from utils import checkpoint
from utils.cli import warn
from utils.device import describe

CHECKPOINT = "checkpoint.pt"

# What a resumed run has to share with its checkpoint to go on as the same run.
RECIPE = (
    "dataset", "train_size", "test_size", "arch", "width", "dim", "pred_dim", "num_proj_layers",
    "epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "seed", "precision",
)


def new_run_folder(exp_dir, trial=None):
    """Make exp_dir/trial, or for None the next free number from 1 on; returns the path.

    Raises ValueError if the trial exists or is not a plain folder name, OSError where it cannot be made.
    """
    path = None if trial is None else run_folder(exp_dir, trial)
    try:
        os.makedirs(exp_dir, exist_ok=True)
        if path is not None:
            os.mkdir(path)
            return path
        number = 1 + max((int(name) for name in os.listdir(exp_dir) if name.isdecimal()), default=0)
        while True:
            path = os.path.join(exp_dir, str(number))
            try:
                os.mkdir(path)
                return path
            except FileExistsError:  # another run took the number in between
                number += 1
    except FileExistsError:
        if not os.path.isdir(exp_dir):
            raise OSError(f"--exp_dir {exp_dir!r} is not a folder") from None
        raise ValueError(f"--trial {trial}: {path} exists; take another name (main.py goes on with a run by --resume)") from None
    except OSError as error:
        raise OSError(f"no run folder can be made in --exp_dir {exp_dir!r} ({error.strerror}); take another --exp_dir") from error


def run_folder(exp_dir, trial):
    """The path of a trial. Raises ValueError unless it is a plain folder name."""
    if trial in ("", ".", "..") or os.path.basename(trial) != trial:
        raise ValueError(f"--trial {trial!r}: a plain folder name is needed, without slashes")
    return os.path.join(exp_dir, trial)


def newest_run(exp_dir):
    """The run folder in exp_dir whose checkpoint was written last, or None."""
    paths = [
        os.path.join(exp_dir, run, name)
        for run in (os.listdir(exp_dir) if os.path.isdir(exp_dir) else [])
        for name in (CHECKPOINT, checkpoint.previous_path(CHECKPOINT))
    ]
    newest = max((path for path in paths if os.path.exists(path)), key=os.path.getmtime, default=None)
    return newest and os.path.dirname(newest)


def find_resumed(resume, exp_dir, trial):
    """The run folder and the checkpoint's state that --resume means: a path, or 'auto' for the trial named,
    else the newest run. None and None where 'auto' finds no run. A checkpoint that 'auto' cannot read is
    replaced by the one before it, with a warning. Raises ValueError and OSError for what cannot be resumed."""
    if resume == "auto":
        folder = newest_run(exp_dir) if trial is None else run_folder(exp_dir, trial)
        if folder is None or not os.path.lexists(folder):
            return None, None
        path = os.path.join(folder, CHECKPOINT)
        try:
            state = checkpoint.load(path)
        except (ValueError, OSError) as error:
            path = checkpoint.previous_path(path)
            if not os.path.exists(path):
                raise ValueError(f"{error}; remove {folder} to begin it again, or take another --trial") from error
            state = checkpoint.load(path)
            warn(f"{error}; going on from {path}")
    else:
        if trial is not None:
            raise ValueError("--resume PATH goes on in that checkpoint's folder; leave --trial out")
        path, folder = resume, os.path.dirname(resume) or "."
        state = checkpoint.load(path)
    if not (isinstance(state, dict) and {"epoch", "step", "model", "optimizer", "config"} <= state.keys()):
        raise ValueError(f"{path}: not a checkpoint.pt that main.py wrote")
    return folder, state


def resumed_settings(parser, argv, config):
    """The settings of a resumed run: the checkpoint's, and what is typed again where it may differ.
    Raises ValueError for a typed setting that would make it another run."""
    saved = {name: value for name, value in config.items() if name not in ("gpu", "resume")}
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for name in RECIPE:
        if getattr(args, name) != saved.get(name) and not (name == "precision" and args.precision == "auto"):
            raise ValueError(f"--{name} {getattr(args, name)}: the run to resume has {saved.get(name)}")
    args.precision = saved["precision"]
    return args


def git_commit():
    """The commit of the code that runs, '-dirty' after it where tracked files differ, or None outside git."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_config(folder, settings, device):
    """Write config.json: argv, every setting, git commit, versions and device."""
    config = {
        "argv": sys.argv,
        "settings": settings,
        "commit": git_commit(),
        "device": describe(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
    }
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
        file.write("\n")
