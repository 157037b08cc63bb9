"""Which run to go on with, and whether its checkpoint and what is typed fit together."""
import os
from typing import NamedTuple

import torch

from utils import checkpoint, log
from utils.cli import warn
from utils.device import describe
from utils.run import BACKBONE, CHECKPOINT, CONFIG, EVALUATION_CHECKPOINT, run_folder

FORMAT = 1  # of the checkpoints; another number is another version of this code


class Script(NamedTuple):
    """What makes one script's runs other than the other's."""

    name: str
    checkpoint: str   # the file to resume from
    keys: set         # what is in it, at least
    recipe: tuple     # the settings that a resumed run has to share with it to go on as the same run
    beginning: set    # the files that a run leaves which is killed before its first checkpoint


# The settings of the paper's study, with what runs had before there were these options.
STUDY = {
    "stop_gradient": True, "predictor": "learned", "fix_pred_lr": False, "head_bn": "default", "similarity": "cosine", "symmetry": "symmetric",
    "warmup_epochs": 0, "crop_scale": 0.2, "blur": 0.0, "zero_init_residual": False,
}
KEYS = {"epoch", "step", "metrics", "seconds", "config", "machine"}  # of all checkpoints
PRETRAINING = Script(
    "main.py", CHECKPOINT, {*KEYS, "model", "optimizer", "scaler"},
    (
        "dataset", "train_size", "test_size", "arch", "width", "dim", "pred_dim", "num_proj_layers",
        "epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "seed", "precision", *STUDY,
    ),
    {CONFIG, log.LOG, BACKBONE},
)
EVALUATION = Script(
    "main_lincls.py", EVALUATION_CHECKPOINT, {*KEYS, "records", "heads", "optimizers", "backbone"},
    (
        "dataset", "train_size", "test_size", "fraction", "arch", "mean", "std", "num_cls", "features", "crop_scale", "epochs",
        "optimizer", "schedule", "batch_size", "lr", "momentum", "weight_decay", "seed", "seeds", "precision",
    ),
    {CONFIG, log.LOG},
)
NOT_KEPT = ("gpu", "resume", "max_minutes", "quiet")  # settings of a process, not of the run


def newest_run(script, exp_dir):
    """The folder in exp_dir of the script's run whose checkpoint was written last, or None."""
    paths = [
        os.path.join(exp_dir, run, name)
        for run in (os.listdir(exp_dir) if os.path.isdir(exp_dir) else [])
        for name in (script.checkpoint, checkpoint.previous_path(script.checkpoint))
    ]
    newest = max((path for path in paths if os.path.exists(path)), key=os.path.getmtime, default=None)
    return newest and os.path.dirname(newest)


def is_unfinished_start(script, folder):
    """Whether the folder holds no more than a run killed before its first checkpoint leaves."""
    names = {name for name in os.listdir(folder) if not name.endswith(".partial")}
    return names <= script.beginning and not (log.LOG in names and os.path.getsize(os.path.join(folder, log.LOG)))


def find_resumed(script, resume, exp_dir, trial):
    """The run folder and the checkpoint's state that --resume means: a path, or 'auto' for the trial named,
    else the newest run. Where 'auto' finds no run both are None, and where it finds one that ended before its
    first checkpoint the state is None. A checkpoint that 'auto' cannot read is replaced by the one before it,
    with a warning. Raises ValueError and OSError for what cannot be resumed."""
    if resume != "auto":
        if trial is not None:
            raise ValueError("--resume PATH goes on in that checkpoint's folder; leave --trial out")
        return os.path.dirname(resume) or ".", load_state(script, resume)
    folder = newest_run(script, exp_dir) if trial is None else run_folder(exp_dir, trial)
    if folder is None or not os.path.lexists(folder):
        return None, None
    path = os.path.join(folder, script.checkpoint)
    previous = checkpoint.previous_path(path)
    if os.path.isdir(folder) and not os.path.exists(path) and not os.path.exists(previous) and is_unfinished_start(script, folder):
        return folder, None
    try:
        return folder, load_state(script, path)
    except (ValueError, OSError) as error:
        if not os.path.exists(previous):
            raise ValueError(f"{error}; remove {folder} to begin it again, or take another --trial") from error
        try:
            state = load_state(script, previous)
        except (ValueError, OSError) as second:
            raise ValueError(f"{error}; and {second}") from second
        warn(f"{error}; going on from {previous}, epoch {state['epoch']}")
        return folder, state


def load_state(script, path):
    """The state in a checkpoint of the script. Raises ValueError and OSError if it is none, or one of another version."""
    stamp = file_stamp(path)
    state = checkpoint.load(path)
    if not (isinstance(state, dict) and {"epoch", "config"} <= state.keys()):
        raise ValueError(f"{path}: not a {script.checkpoint} that {script.name} wrote")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path}: from another version of {script.name} (its format is {state.get('format')}, this version's {FORMAT}); "
            f"{CONFIG} beside it names the commit that made it"
        )
    if isinstance(state["config"], dict) and script is PRETRAINING:
        state = {"wall_seconds": 0.0, **state, "config": {**STUDY, **state["config"]}}
    if not (script.keys <= state.keys() and isinstance(state["config"], dict) and {*script.recipe} <= state["config"].keys()):
        raise ValueError(f"{path}: not a whole {script.checkpoint} of {script.name}; there have to be {', '.join(sorted(script.keys))}")
    return {**state, "origin": (path, stamp)}


def file_stamp(path):
    """What changes when a file is written anew, or None where there is none."""
    if not os.path.exists(path):
        return None
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns


def check_unchanged(state):
    """To be called with the run's folder locked: raises ValueError if another process wrote the checkpoint since."""
    path, stamp = state["origin"]
    if file_stamp(path) != stamp:
        raise ValueError(f"{path}: another process has just gone on with this run; resume it again")


def resumed_settings(script, parser, argv, config):
    """The settings of a resumed run: the checkpoint's, and what is typed again where it may differ.
    Raises ValueError for a typed setting that would make it another run."""
    saved = {name: value for name, value in config.items() if name not in NOT_KEPT}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in script.recipe:
        if getattr(args, name) != saved[name] and not (name == "precision" and args.precision == "auto"):
            raise ValueError(f"--{name} {getattr(args, name)}: the run to resume has {saved[name]}")
    args.precision = saved["precision"]
    return args


def restore(state, **loaders):
    """Hand each part of a checkpoint's state to its loader, a function that raises an exception for what does not fit.
    Raises ValueError, which names file and part, then."""
    path, _ = state["origin"]
    if len(state["metrics"]) != state["step"]:
        raise ValueError(f"{path}: it has the metrics of {len(state['metrics'])} steps of the epoch, not of step {state['step']}")
    for part, load in loaders.items():
        try:
            load(state[part])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: its {part} does not fit: {error}") from error


def machine(device):
    """What has to be the same for a resumed run to be the uninterrupted one bit for bit."""
    return {"device": describe(device), "torch": str(torch.__version__)}


def warn_if_elsewhere(state, device):
    """Say so if the checkpoint was written on another machine."""
    here = machine(device)
    if state.get("machine", here) != here:
        warn(f"the checkpoint was written with {state['machine']}, this is {here}: the run goes on, but not bit for bit as it would have there")
