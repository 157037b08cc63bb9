"""Which run to go on with, and whether its checkpoint and what is typed fit together."""
import argparse
import os

from utils import checkpoint, log
from utils.cli import warn
from utils.run import BACKBONE, CHECKPOINT, CONFIG, run_folder

FORMAT = 1  # of checkpoint.pt; another number is another version of this code

# What a resumed run has to share with its checkpoint to go on as the same run.
RECIPE = (
    "dataset", "train_size", "test_size", "arch", "width", "dim", "pred_dim", "num_proj_layers",
    "epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "seed", "precision",
)


KEYS = {"epoch", "step", "metrics", "seconds", "model", "optimizer", "scaler", "config", "machine"}  # of a checkpoint.pt
NOT_KEPT = ("gpu", "resume", "max_minutes")  # settings of a process, not of the run


def newest_run(exp_dir):
    """The run folder in exp_dir whose checkpoint was written last, or None."""
    paths = [
        os.path.join(exp_dir, run, name)
        for run in (os.listdir(exp_dir) if os.path.isdir(exp_dir) else [])
        for name in (CHECKPOINT, checkpoint.previous_path(CHECKPOINT))
    ]
    newest = max((path for path in paths if os.path.exists(path)), key=os.path.getmtime, default=None)
    return newest and os.path.dirname(newest)


def is_unfinished_start(folder):
    """Whether the folder holds no more than a run killed before its first checkpoint leaves."""
    names = {name for name in os.listdir(folder) if not name.endswith(".partial")}
    return names <= {CONFIG, log.LOG, BACKBONE} and not (log.LOG in names and os.path.getsize(os.path.join(folder, log.LOG)))


def find_resumed(resume, exp_dir, trial):
    """The run folder and the checkpoint's state that --resume means: a path, or 'auto' for the trial named,
    else the newest run. Where 'auto' finds no run both are None, and where it finds one that ended before its
    first checkpoint the state is None. A checkpoint that 'auto' cannot read is replaced by the one before it,
    with a warning. Raises ValueError and OSError for what cannot be resumed."""
    if resume != "auto":
        if trial is not None:
            raise ValueError("--resume PATH goes on in that checkpoint's folder; leave --trial out")
        return os.path.dirname(resume) or ".", load_state(resume)
    folder = newest_run(exp_dir) if trial is None else run_folder(exp_dir, trial)
    if folder is None or not os.path.lexists(folder):
        return None, None
    path = os.path.join(folder, CHECKPOINT)
    previous = checkpoint.previous_path(path)
    if os.path.isdir(folder) and not os.path.exists(path) and not os.path.exists(previous) and is_unfinished_start(folder):
        return folder, None
    try:
        return folder, load_state(path)
    except (ValueError, OSError) as error:
        if not os.path.exists(previous):
            raise ValueError(f"{error}; remove {folder} to begin it again, or take another --trial") from error
        try:
            state = load_state(previous)
        except (ValueError, OSError) as second:
            raise ValueError(f"{error}; and {second}") from second
        warn(f"{error}; going on from {previous}, epoch {state['epoch']}")
        return folder, state


def load_state(path):
    """The state in a checkpoint.pt. Raises ValueError and OSError if it is none, or one of another version."""
    stamp = file_stamp(path)
    state = checkpoint.load(path)
    if not (isinstance(state, dict) and {"epoch", "model", "config"} <= state.keys()):
        raise ValueError(f"{path}: not a checkpoint.pt that main.py wrote")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path}: from another version of main.py (its format is {state.get('format')}, this version's {FORMAT}); "
            f"{CONFIG} beside it names the commit that made it"
        )
    if not (KEYS <= state.keys() and isinstance(state["config"], dict) and {*RECIPE} <= state["config"].keys()):
        raise ValueError(f"{path}: not a whole checkpoint.pt of main.py; there have to be {', '.join(sorted(KEYS))}")
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


def resumed_settings(parser, argv, config):
    """The settings of a resumed run: the checkpoint's, and what is typed again where it may differ.
    Raises ValueError for a typed setting that would make it another run."""
    saved = {name: value for name, value in config.items() if name not in NOT_KEPT}
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for name in RECIPE:
        if getattr(args, name) != saved[name] and not (name == "precision" and args.precision == "auto"):
            raise ValueError(f"--{name} {getattr(args, name)}: the run to resume has {saved[name]}")
    args.precision = saved["precision"]
    return args


def restore(state, model, optimizer, scaler):
    """Copy a checkpoint's state into them. Raises ValueError, which names the file, for what does not fit."""
    path, _ = state["origin"]
    if len(state["metrics"]) != state["step"]:
        raise ValueError(f"{path}: it has the metrics of {len(state['metrics'])} steps of the epoch, not of step {state['step']}")
    checkpoint.load_module(model, state["model"], path)
    try:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: its optimizer or loss scaler does not fit the network ({error})") from error
