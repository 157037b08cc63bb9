"""A run's folder: created or found by --resume, locked, and written."""
import contextlib
import datetime
import glob
import itertools
import os
import platform
import shutil
import subprocess
import time

import numpy
import torch
import torchvision

from utils import checkpoint, log
from utils.cli import info, warn
from utils.device import describe

CONFIG, BACKBONE, CHECKPOINT, UNTRAINED = "config.json", "backbone.pt", "checkpoint.pt", "untrained.pt"
EVALUATION, RESULTS = "evaluation.pt", "results.json"  # what main_lincls.py resumes from, and what it found
FORMAT = 3  # of the checkpoints
PROCESS = ("gpu", "resume", "max_minutes", "quiet")  # settings of a process, not of the run


def run_folder(exp_dir, trial):
    """The path of a trial. Raises ValueError unless it is a plain folder name."""
    if trial in ("", ".", "..") or os.path.basename(trial) != trial:
        raise ValueError(f"--trial {trial!r} is not a plain folder name")
    return os.path.join(exp_dir, trial)


def new_folder(exp_dir, trial=None):
    """Create exp_dir/trial, or for None the next free number; returns the path. Raises ValueError if the trial exists,
    OSError if it cannot be created."""
    try:
        os.makedirs(exp_dir, exist_ok=True)
        number = max((int(name) for name in os.listdir(exp_dir) if name.isdecimal()), default=0)
        for name in [trial] if trial is not None else map(str, itertools.count(number + 1)):
            path = run_folder(exp_dir, name)
            with contextlib.suppress(FileExistsError):  # of a number: another run has just taken it
                os.mkdir(path)
                return path
    except OSError as error:
        raise OSError(f"--exp_dir {exp_dir!r}: a run's folder cannot be created ({error.strerror})") from error
    raise ValueError(f"--trial {trial}: {path} exists; choose another name, or --resume it")


def git_commit():
    """The commit of the running code, with '-dirty' if tracked files differ; None outside git."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        here = os.path.dirname(__file__)
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_config(folder, argv, settings, device):
    """Write config.json: argv (a script and its words), all settings, commit, date, device, versions."""
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, numpy)}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda if device.type == "cuda" else None}
    checkpoint.write_json(os.path.join(folder, CONFIG), {
        "argv": argv, "settings": settings, "commit": git_commit(), "date": datetime.date.today().isoformat(),
        "device": describe(device), "versions": versions,
    })


def read_config(folder):
    """The content of config.json. Raises OSError, and ValueError if it is not a run's."""
    config = checkpoint.read_json(os.path.join(folder, CONFIG), "settings")
    if not {"arch", "dataset", "data_root", "epochs"} <= set(config["settings"]):
        raise ValueError(f"{os.path.join(folder, CONFIG)}: not the settings of a run")
    return config


def inherit_data_options(args, path):
    """Fill in --image_size and --test_share, unless typed, from the run in whose folder a checkpoint lies, if any."""
    with contextlib.suppress(OSError, ValueError):
        settings = read_config(os.path.dirname(path))["settings"]
        for name in ("image_size", "test_share"):
            if getattr(args, name) is None:
                setattr(args, name, settings.get(name))


def find_run(parser, args, argv, name, may_change):
    """What --resume means: the settings, the folder, and the state in its checkpoint; None for a new run.

    args: the settings typed, argv their words. name: of the checkpoint file. may_change: settings that a resumed run
    may change. A damaged checkpoint that 'auto' finds is replaced by the previous one, with a warning.
    Raises ValueError and OSError for what cannot be resumed.
    """
    auto = args.resume == "auto"
    if args.resume is None or auto and not (folder := find_folder(name, args)):
        return args, None, None
    if not auto and args.trial is not None:
        raise ValueError("--resume PATH continues in the folder of PATH; omit --trial")
    path = os.path.join(folder, name) if auto else args.resume
    previous = checkpoint.previous_path(path)
    if auto and not (os.path.exists(path) or os.path.exists(previous)):
        if not os.path.isdir(folder) or log.size(folder) or {RESULTS, CHECKPOINT, EVALUATION} & {*os.listdir(folder)}:
            raise ValueError(f"{folder} exists and has no checkpoint to resume; choose another --trial")
        return args, folder, None  # killed before its first checkpoint
    try:
        state = load_state(path, args)
    except (ValueError, OSError) as error:
        if not (auto and os.path.exists(previous)):
            raise
        state = load_state(previous, args)
        warn(f"{error}; resuming from {previous}, epoch {state['epoch']}")
    return resumed_args(parser, argv, state, may_change), os.path.dirname(path) or ".", state


def find_folder(name, args):
    """The folder of the trial, else of the run in exp_dir whose checkpoint was written last; None if there is none."""
    paths = glob.glob(os.path.join(glob.escape(args.exp_dir), "*", name.replace(".", "*.")))
    folder = os.path.dirname(max(paths, key=os.path.getmtime, default=""))
    folder = folder if args.trial is None else run_folder(args.exp_dir, args.trial)
    if os.path.lexists(folder):
        return folder
    info(f"nothing to resume in {args.exp_dir}: starting a new run")
    return None


def load_state(path, args):
    """Load a checkpoint of a script with these settings. Raises ValueError for another file or another version."""
    state = checkpoint.load(path)
    if not (isinstance(state, dict) and isinstance(state.get("config"), dict)):
        raise ValueError(f"{path}: not a checkpoint to resume")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: written by another version of this code (format {state.get('format')}, not "
                         f"{FORMAT}); config.json beside it names the commit")
    if ("pretrained" in state["config"]) != hasattr(args, "pretrained"):  # an option of main_lincls.py
        raise ValueError(f"{path}: a checkpoint of another script")
    return state | {"path": path}


def resumed_args(parser, argv, state, may_change):
    """Settings of a resumed run: the checkpoint's, the defaults of options that are newer, and what is typed. Raises
    ValueError for one that may not change."""
    saved = {name: value for name, value in state["config"].items() if name not in PROCESS}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name, value in saved.items():
        typed = getattr(args, name, value)
        if typed != value and name not in (*may_change, "precision"):
            raise ValueError(f"--{name} {typed}: the run to resume has {value}")
    if args.precision == "auto":
        args.precision = saved["precision"]
    elif args.precision != saved["precision"]:
        warn(f"--precision {args.precision}, not {saved['precision']} as before: the run is not bit for bit the same")
    return args


def restore(state, device, **loaders):
    """Pass each part of a checkpoint to its loader; warn if it is from elsewhere. Raises ValueError for a bad part."""
    for part, load in loaders.items():
        try:
            load(state[part])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{state['path']}: its {part} does not fit: {error}") from error
    if state["machine"] != machine(device):
        warn(f"the checkpoint is of {state['machine']}, not {machine(device)}: the run continues, not bit for bit")


def new_epoch(epoch):
    """The state of a run before the first step of an epoch, counted from 0."""
    return {"epoch": epoch, "step": 0, "metrics": torch.zeros(0, 2), "seconds": 0.0}


def run_files(settings, device, state, model, optimizer, scaler):
    """backbone.pt, which evaluation needs, and checkpoint.pt, which a resumed run of main.py needs."""
    backbone = {name: value.cpu().contiguous() for name, value in model.backbone.state_dict().items()}
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    about = {"format": FORMAT, "config": settings, "machine": machine(device)}
    return {BACKBONE: backbone, CHECKPOINT: {**state, **about, **parts}}


def machine(device):
    """What must be the same for a resumed run to be exact."""
    return {"device": describe(device), "torch": str(torch.__version__)}


class Run:
    """A run's folder, locked for this process and written by a script. records: the lines of its log.

    What cannot be written is a warning, and the next checkpoint tries again. unsaved: why the last attempt failed, or
    None; saved_epoch, saved_time (of time.monotonic): of the newest checkpoint on the disk.
    """

    def __init__(self, folder, epoch, tensorboard=False):
        self.folder, self.lock = folder, lock(folder)
        log.truncate(folder, epoch)
        self.records, self.pending = log.read(folder, empty=True), []
        self.unsaved, self.saved_epoch, self.saved_time = None, epoch, time.monotonic()
        self.board = summary_writer(folder, epoch) if tensorboard else None

    def close(self):
        self.lock.close()
        if self.board:
            self.board.close()

    def path(self, name):
        return os.path.join(self.folder, name)

    def log(self, record):
        """Append a line to log.jsonl."""
        self.records.append(record)
        self.pending.append(record)
        self.attempt(self.write)
        for name in record.keys() - {"epoch"} if self.board else ():
            self.board.add_scalar(name, record[name], record["epoch"])

    def write(self, files=(), epoch=None):
        """Write log lines that are not on the disk yet, then states by their file names, in order; the last one is the
        checkpoint of an epoch. Raises OSError."""
        log.append(self.folder, self.pending)
        self.pending = []
        for name in files:
            checkpoint.save(self.path(name), files[name], keep_previous=name == list(files)[-1])
        if epoch is not None:
            self.saved_epoch, self.saved_time = epoch, time.monotonic()

    def attempt(self, write, *args):
        """Call write(*args), which raises OSError if it fails."""
        try:
            write(*args)
            self.unsaved = None
        except OSError as error:
            self.unsaved = str(error)
            warn(f"{error}; the run continues, the last checkpoint is of epoch {self.saved_epoch}")

    def draw(self, draw, *args):
        """Call draw(folder, *args), which draws figures or a page. Missing figures do not end a run."""
        try:
            draw(self.folder, *args)
        except Exception as error:  # of any type: anybody may have changed the files in the folder
            warn(f"{self.folder}: no figures ({error})")


def start_run(argv, folder, args, device, files):
    """A Run in a new folder (or in `folder`, of a start that was killed), with config.json and the first files in it.
    argv: script and words typed; args: its settings. Raises ValueError and OSError, and then leaves no new folder."""
    path = folder or new_folder(args.exp_dir, args.trial)
    try:
        run = Run(path, -1, args.tensorboard)
        write_config(path, argv, vars(args), device)
        run.write(files, 0)
        return run
    except (OSError, ValueError):
        if folder is None:
            shutil.rmtree(path, ignore_errors=True)
        raise


def lock(folder):
    """Lock a run's log until this process ends; returns the open file. Raises ValueError if another process has it."""
    try:
        return checkpoint.lock(os.path.join(folder, log.LOG))
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is working on this run") from None


def summary_writer(folder, epoch):
    """TensorBoard's writer, after an epoch. Raises ValueError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard requires the package tensorboard (pip install tensorboard)") from error
    return SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=epoch + 1)
