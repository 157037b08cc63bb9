"""The folder of a run: made, locked, and written to as far as the disk allows."""
import datetime
import fcntl
import math
import os
import platform
import subprocess
import sys
import time

import numpy
import torch
import torchvision

from utils import checkpoint, log
from utils.board import Board
from utils.cli import warn
from utils.device import describe

CHECKPOINT, BACKBONE, CONFIG, UNTRAINED = "checkpoint.pt", "backbone.pt", "config.json", "untrained.pt"
DRAWING_SHARE, PAGE_SECONDS = 0.01, 20  # of figures while a run goes on; from one page to the next
RUNNING = "Running"
EVALUATION_CHECKPOINT, RESULTS = "evaluation.pt", "results.json"  # what main_lincls.py resumes from, and its results


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
        raise ValueError(f"--trial {trial}: {path} exists; take another name, or go on with it by --resume") from None
    except OSError as error:
        raise OSError(f"no run folder can be made in --exp_dir {exp_dir!r} ({error.strerror}); take another --exp_dir") from error


def run_folder(exp_dir, trial):
    """The path of a trial. Raises ValueError unless it is a plain folder name."""
    if trial in ("", ".", "..") or os.path.basename(trial) != trial:
        raise ValueError(f"--trial {trial!r}: a plain folder name is needed, without slashes")
    return os.path.join(exp_dir, trial)


def git_commit():
    """The commit of the code that runs, '-dirty' after it where tracked files differ, or None outside git."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_config(folder, settings, device):
    """Write config.json: argv, every setting, git commit, date, versions and device."""
    config = {
        "argv": sys.argv,
        "settings": settings,
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "device": describe(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
    }
    log.write_json(os.path.join(folder, CONFIG), config)


def read_config(folder):
    """What write_config wrote. Raises OSError, and ValueError for a file that is not that."""
    path = os.path.join(folder, CONFIG)
    config = log.read_json(path)
    parts = {"argv": list, "settings": dict, "device": str, "versions": dict}
    if not isinstance(config, dict) or "commit" not in config or not all(isinstance(config.get(part), of) for part, of in parts.items()):
        raise ValueError(f"{path}: not a run's settings; there have to be {', '.join(parts)} and commit")
    if not {"arch", "dataset", "data_root", "epochs"} <= config["settings"].keys():
        raise ValueError(f"{path}: not the settings of a run of main.py or main_lincls.py")
    return config


def lock(folder):
    """Take the folder for this process: an exclusive lock on its log, which the kernel drops when the process ends,
    however it ends. Returns the open file, to be kept. Raises ValueError if another process has it."""
    file = open(os.path.join(folder, log.LOG), "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder}: another process is at work on this run; wait for its end or stop it") from None
    except OSError as error:  # some network file systems have no locks
        warn(f"{folder} cannot be locked ({error.strerror}); take care that no second process resumes this run")
    return file


class RunWriter:
    """Writes what a run leaves in its folder, and keeps other processes from doing so.

    What cannot be written is warned of and the run goes on; the next occasion tries again. `unsaved` says why
    the newest log line or weights are not on the disk, None if they are; `saved_epoch` is the epoch of the last
    checkpoint that is. board: whether to write for TensorBoard too.
    """

    def __init__(self, folder, saved_epoch=None, board=False):
        self.folder, self.lock = folder, lock(folder)
        self.lines, self.unsaved, self.saved_epoch = [], None, saved_epoch
        self.begin, self.page_written, self.drawing_seconds = time.monotonic(), -math.inf, 0.0
        self.board = Board(folder, saved_epoch) if board else None

    def path(self, name):
        return os.path.join(self.folder, name)

    def attempt(self, write, *args):
        """Call write(*args), which raises OSError if it cannot."""
        try:
            if not os.path.isdir(self.folder):
                os.makedirs(self.folder)
                self.lock = lock(self.folder)
                warn(f"{self.folder} was gone and is made again; what was in it is lost")
            write(*args)
            self.unsaved = None
        except (OSError, ValueError) as error:  # ValueError: the folder made again has another owner
            self.unsaved = str(error)
            kept = "" if self.saved_epoch is None else f"; the last good checkpoint is of epoch {self.saved_epoch}"
            warn(f"{error}{kept}; the run goes on")

    def write_log(self):
        while self.lines:
            log.append(self.folder, self.lines[0])
            del self.lines[0]

    def log(self, record):
        """Append a line to log.jsonl, and those before that could not be written."""
        self.lines.append(record)
        self.attempt(self.write_log)
        self.show(Board.scalars, record)

    def show(self, add, *args):
        """Call add(board, *args) if there is one; a run does not fail for want of it."""
        if self.board is not None:
            try:
                add(self.board, *args)
            except Exception as error:  # of any kind, as above
                warn(f"{self.folder}: nothing more for TensorBoard ({error})")
                self.board = None

    def read_log(self):
        """The log's records so far; none if it cannot be read."""
        try:
            return log.read(self.folder, empty=True)
        except (OSError, ValueError):
            return []

    def write(self, files, epoch):
        """Write `files`, states by their names in the folder, in this order, or raise OSError. The last one is what a
        run resumes from: it then repeats neither its log lines nor the files before. epoch: where the run stands."""
        self.write_log()
        for name, state in files.items():
            checkpoint.save(self.path(name), state, keep_previous=name == CHECKPOINT)
        self.saved_epoch = epoch

    def save(self, files, epoch):
        """`write`, as far as it can be done."""
        self.attempt(self.write, files, epoch)

    def draw(self, plot, *args):
        """Call plot(folder, *args), which makes figures or a page; a run does not fail for want of them."""
        try:
            plot(self.folder, *args)
        except Exception as error:  # of any kind: somebody may have changed what is in the folder
            warn(f"{self.folder}: no figures ({error})")
        self.show(Board.figures)
        self.page_written = time.monotonic()

    def show_progress(self, draw_run, write_report):
        """While the run goes on: draw_run(folder, RUNNING) as long as that takes DRAWING_SHARE of the time, else
        write_report(folder, RUNNING), which takes next to none, every PAGE_SECONDS."""
        now = time.monotonic()
        if self.drawing_seconds <= DRAWING_SHARE * (now - self.begin):
            self.draw(draw_run, RUNNING)
            self.drawing_seconds += time.monotonic() - now
        elif now - self.page_written > PAGE_SECONDS:
            self.draw(write_report, RUNNING)
