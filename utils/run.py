"""A run's folder: created or found by --resume, locked, and written."""
import contextlib
import dataclasses
import datetime
import glob
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import time

import numpy
import torch
import torchvision

from utils import checkpoint, log
from utils.cli import USER_ERRORS, Stopped, fail, info, processes, say, warn
from utils.device import describe, machine, processor
from utils.distributed import on_first

CONFIG, BACKBONE, CHECKPOINT, UNTRAINED = "config.json", "backbone.pt", "checkpoint.pt", "untrained.pt"
EVALUATION, RESULTS = "evaluation.pt", "results.json"  # main_lincls.py resumes from one, ends with one
FORMAT = 4  # of the checkpoints
PROCESS = ("gpu", "resume", "max_minutes", "quiet")  # settings of a process, not of the run
MAY_CHANGE = ("data_root", "cache_dir", "pretrained", "exp_dir", "trial", "eval_freq", "tensorboard",
              "compile", "deterministic", "untrained", "precision")  # when a run is resumed


@dataclasses.dataclass
class Position:
    """Steps done in an epoch, both from 0; metrics: loss and std of these, float32 [step, 2], on the CPU."""
    epoch: int = 0
    step: int = 0
    metrics: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 2))
    seconds: float = 0.0  # of these steps


def new_folder(exp_dir, trial=None):
    """Create exp_dir/trial, or for None the next free number. Raises ValueError if it exists, or OSError."""
    try:
        os.makedirs(exp_dir, exist_ok=True)
        names = [trial]
        if trial is None:
            numbers = [int(name) for name in os.listdir(exp_dir) if name.isdecimal()]
            names = map(str, itertools.count(max(numbers, default=0) + 1))
        for name in names:
            path = os.path.join(exp_dir, name)
            with contextlib.suppress(FileExistsError):  # of a number: another run has just taken it
                os.mkdir(path)
                return path
    except OSError as error:
        raise OSError(f"--exp_dir {exp_dir!r}: a run's folder cannot be created ({error.strerror})") from error
    raise ValueError(f"--trial {trial}: {path} exists; choose another name, or --resume it")


@on_first()
def find(exp_dir, trial, resume, name):
    """What --resume means: a run's folder and the state in its checkpoint, a file called `name`, or None; the
    previous one if 'auto' finds a damaged one. Raises ValueError and OSError for what cannot be resumed."""
    if trial in ("", ".", "..") or trial and os.path.basename(trial) != trial:
        raise ValueError(f"--trial {trial!r} is not a plain folder name")
    if resume is None:
        return None, None
    if resume != "auto":
        if trial is not None:
            raise ValueError("--resume PATH continues in the folder of PATH; omit --trial")
        return os.path.dirname(resume) or ".", load_state(resume, name)
    if trial is None:
        paths = glob.glob(os.path.join(glob.escape(exp_dir), "*", name.replace(".", "*.")))
        folder = os.path.dirname(max(paths, key=os.path.getmtime, default=""))
    else:
        folder = os.path.join(exp_dir, trial)
    if not os.path.lexists(folder):
        info(f"nothing to resume in {exp_dir}: starting a new run")
        return None, None
    path = os.path.join(folder, name)
    previous = checkpoint.previous_path(path)
    if not os.path.exists(path) and not os.path.exists(previous):
        names = os.listdir(folder) if os.path.isdir(folder) else [CHECKPOINT]
        if {CHECKPOINT, EVALUATION, RESULTS} & {*names} or log.LOG in names and log.read(folder, empty=True):
            raise ValueError(f"{folder} exists and has no checkpoint to resume; choose another --trial")
        return folder, None  # killed before its first checkpoint
    try:
        return folder, load_state(path, name)
    except (ValueError, OSError) as error:
        if not os.path.exists(previous):
            raise
        state = load_state(previous, name)
        warn(f"{error}; resuming from {previous}, epoch {state['epoch']}")
        return folder, state


def load_state(path, name):
    """Load the checkpoint of a script. Raises ValueError for another file or another version."""
    state = checkpoint.load(path)
    if not (isinstance(state, dict) and isinstance(state.get("config"), dict)):
        raise ValueError(f"{path}: not a checkpoint to resume")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: written by another version of this code (format {state.get('format')}, "
                         f"not {FORMAT}); config.json beside it names the commit")
    if ("model" in state) != (name == CHECKPOINT):
        raise ValueError(f"{path}: a checkpoint of another script")
    return state | {"path": path}


def resumed_args(parser, argv, saved):
    """Settings of a resumed run: those saved in the checkpoint, the defaults of options that are
    newer, and what is typed. Raises ValueError for one that may not change."""
    saved = {name: value for name, value in saved.items() if name not in PROCESS}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name, value in saved.items():
        typed = getattr(args, name, value)
        if typed != value and name not in MAY_CHANGE:
            instead = "; a new run can start from its backbone.pt: --init" if name == "epochs" else ""
            raise ValueError(f"--{name} {typed}: the run to resume has {value}{instead}")
    if args.precision == "auto":
        args.precision = saved["precision"]
    elif args.precision != saved["precision"]:
        warn(f"--precision {args.precision}, not {saved['precision']} as before: not bit-identical")
    return args


def restore(state, settings, device, parts):
    """Load the parts, a dict by name, from a checkpoint; returns the Position in it. Warns if it was
    written elsewhere. Raises ValueError for what does not fit."""
    for name, what in (("data_digest", "training images"), ("backbone", "backbone")):
        if state["config"].get(name) not in (None, settings.get(name)):
            raise ValueError(f"not the {what} of the run to resume, {state['path']}")
    try:
        for name, part in parts.items():
            if name != "scaler" or state[name]:  # empty unless the precision is fp16
                part.load_state_dict(state[name])
            if isinstance(part, torch.optim.SGD):  # fused, it takes a momentum to lie in memory as its parameter
                for parameter, found in part.state.items():
                    momentum = found["momentum_buffer"]
                    found["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{state['path']}: its {name} does not fit: {reason}") from error
    if state["machine"] != machine(device):
        written, here = (", ".join(each.values()) for each in (state["machine"], machine(device)))
        warn(f"written on {written}, resuming on {here}: not bit-identical")
    return Position(*(state[field.name] for field in dataclasses.fields(Position)))


def slice_now(device, epoch):
    """What a start of a run is recorded by: when, from which epoch, with what code, on what. The commit
    has '-dirty' if tracked files differ, and is None outside git."""
    command, here = "git describe --always --dirty --abbrev=40 --exclude=*".split(), os.path.dirname(__file__)
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, numpy)}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda if device.type == "cuda" else None}
    return {"date": datetime.date.today().isoformat(), "epoch": epoch, "commit": commit,
            "device": describe(device), "processor": processor(), "versions": versions}


def read_config(folder):
    """The content of config.json. Raises OSError, and ValueError if it is not a run's."""
    config = checkpoint.read_json(os.path.join(folder, CONFIG), "settings")
    if not {"arch", "dataset", "data_root", "epochs"} <= set(config["settings"]):
        raise ValueError(f"{folder}/{CONFIG}: not the settings of a run")
    return config


def settings_beside(path):
    """The settings of the run in whose folder a file lies; {} if it lies in none."""
    with contextlib.suppress(OSError, ValueError):
        return read_config(os.path.dirname(path))["settings"]
    return {}


def inherited_options(path):
    """image_size and test_share of the run in whose folder a checkpoint lies, if there is one."""
    settings = settings_beside(path)
    return {name: settings.get(name) for name in ("image_size", "test_share")}


def open_run(found, command, settings, device, parts, began):
    """The Run, None but in the first process, and the Position to go on from, of what `find` has found.
    command: script and words typed. parts: what a checkpoint restores. began: when this process did.
    Leaves no new folder when it raises ValueError or OSError."""
    position = Position() if found[1] is None else restore(found[1], settings, device, parts)
    return open_folder(found, command, settings, device, parts, began), position


@on_first(share=False)
def open_folder(found, command, settings, device, parts, began):
    """The Run in the folder found, with another slice in config.json, or in a new one, with a checkpoint."""
    folder, state = found
    new = folder or new_folder(settings["exp_dir"], settings["trial"])
    try:
        run, now = Run(new, settings, device, parts, began, state), slice_now(device, state["epoch"] if state else 0)
        config = {"argv": command, "settings": settings, **now, "slices": []}
        if state is not None:
            with contextlib.suppress(OSError, ValueError):  # a checkpoint may be moved without it
                config = {"slices": [], **read_config(new)}
        config["slices"].append(now)
        checkpoint.write_json(run.path(CONFIG), config)
        if state is None:
            run.write(Position())
            if settings.get("untrained"):
                shutil.copyfile(run.path(BACKBONE), run.path(UNTRAINED))
        return run
    except USER_ERRORS:
        if folder is None:
            shutil.rmtree(new, ignore_errors=True)
        raise


class Run:
    """A run's folder, locked for this process, and what its checkpoints hold: parts, by name. records: lines of
    the log. What cannot be written is a warning, and the next checkpoint tries again; unsaved: why, or None.
    saved_epoch, saved_time: of the newest checkpoint. begin: as if the run had had no pauses."""

    def __init__(self, folder, settings, device, parts, began, state):
        state = state or {"records": [], "epoch": -1, "time": 0.0}
        self.folder, self.settings, self.device, self.parts = folder, settings, device, parts
        self.records, self.begin = list(state["records"]), began - state["time"]
        self.evaluated = False  # whether this process has evaluated the backbone
        self.name = CHECKPOINT if "model" in parts else EVALUATION
        try:
            self.lock = checkpoint.lock(self.path(".lock"))
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is working on this run") from None
        log.write(folder, self.records)  # without epochs after the checkpoint
        self.unsaved, self.saved_epoch, self.saved_time = None, state["epoch"], time.monotonic()
        self.board = None
        if settings["tensorboard"]:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.path("tensorboard"), purge_step=state["epoch"] + 1)
            except Exception as error:  # of any type: installed with another version of what it needs
                raise ValueError("--tensorboard requires a tensorboard that works (pip install "
                                 f"tensorboard): {error}") from error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.lock.close()
        if self.board:
            self.board.close()

    def path(self, name):
        return os.path.join(self.folder, name)

    def record(self, position, optimizer, images_per_step):
        """The log's record of a whole epoch, but for what is evaluated."""
        loss, std = position.metrics.double().mean(dim=0).tolist()
        speed = position.step * images_per_step / position.seconds
        return {"epoch": position.epoch + 1, "loss": loss, "std": std, "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(position.seconds, 3), "views_per_s": round(speed, 1),
                "time": round(time.monotonic() - self.begin, 3)}

    def log(self, record):
        """Add a line to log.jsonl; warn of a collapse."""
        self.records.append(record)
        with self.attempt():
            log.write(self.folder, self.records)
        warning = log.collapse_warning(self.records, self.settings)
        if warning:
            warn(warning)
        if self.board:
            with self.optional("TensorBoard"):
                for name in record.keys() - {"epoch"}:
                    self.board.add_scalar(name, record[name], record["epoch"])

    def write(self, position):
        """Write the log, backbone.pt of a pre-training, and the checkpoint. Raises OSError."""
        log.write(self.folder, self.records)
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        if "model" in parts:
            backbone = self.parts["model"].backbone.state_dict()
            backbone = {key: value.cpu().contiguous() for key, value in backbone.items()}
            checkpoint.save(self.path(BACKBONE), backbone)
        state = {"format": FORMAT, "config": self.settings, "machine": machine(self.device), **vars(position),
                 "records": self.records, "time": time.monotonic() - self.begin, **parts}
        checkpoint.save(self.path(self.name), state, keep_previous=True)
        self.saved_epoch, self.saved_time = position.epoch, time.monotonic()

    def save(self, position):
        """The same; a failure is a warning."""
        with self.attempt():
            self.write(position)

    @contextlib.contextmanager
    def attempt(self):
        """In the context something is written; a failure is a warning."""
        try:
            yield
            self.unsaved = None
        except OSError as error:
            self.unsaved = str(error)
            warn(f"{error}; the run continues, the last checkpoint is of epoch {self.saved_epoch}")

    @contextlib.contextmanager
    def optional(self, what):
        """In the context something is made without which the run goes on, with a warning."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:  # of any type: no memory, files that somebody has changed
            reason = (str(error) or repr(error)).splitlines()[0]
            warn(f"{self.folder}: no {what} ({reason}); the run continues")

    def not_finite(self, position):
        """What is not finite at a position, and what to do, in words; None if all is."""
        steps, what = (~position.metrics[:, 0].isfinite()).nonzero().flatten().tolist(), "the loss"
        if not steps:
            if all(value.isfinite().all() for value in self.parts["model"].state_dict().values()):
                return None
            steps, what = [position.step - 1], "a weight"
        return (f"epoch {position.epoch + 1}, step {steps[0] + 1} of {self.settings['steps']}: {what} "
                f"is not finite; the checkpoint of epoch {self.saved_epoch} is kept; start a new run "
                f"with a lower --learning_rate ({self.settings['learning_rate']:g})")

    def exit_code(self, script, stop, finished):
        """The exit code of a run that ends here, which says so; None if it goes on."""
        if not finished and not stop.requested:
            return None
        if self.unsaved:
            return fail(script, f"{self.unsaved}; everything after epoch {self.saved_epoch} is lost")
        if finished:
            return 0
        command = f"python {script}" if processes == 1 else f"torchrun ... {script}"
        say(f"Interrupted. Resume with: {command} --resume {shlex.quote(self.path(self.name))}")
        return stop.exit_code
