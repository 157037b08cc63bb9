"""The terminal: arguments, messages, progress, and signals that ask a run to stop."""
import argparse
import contextlib
import functools
import math
import os
import re
import signal
import sys
import threading
import time

from tqdm import tqdm

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")  # Windows lacks some
STOP_SIGNALS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
LAUNCHERS = {  # launchers' variables: the number of processes, and which one this is
    "WORLD_SIZE": "RANK", "SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
rank = int(os.environ["RANK"]) if TORCHRUN else 0
processes = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
USER_ERRORS = (ValueError, OSError, MemoryError, RuntimeError)  # what bad input raises in set-up
quiet = False  # --quiet: `info` and the bars show nothing


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as written; the default of each option that has one; N or X for numbers."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", super()._get_default_metavar_for_optional(action))


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations; an error is one line on stderr, exit code 2."""

    def __init__(self, **options):
        open_streams()
        if sys.version_info >= (3, 14):
            options["suggest_on_error"] = True
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        global quiet
        if any(word.startswith(("--local-rank", "--local_rank")) for word in args or sys.argv[1:]):
            self.error("--local-rank: start it with torchrun, not with torch.distributed.launch")
        args = super().parse_args(args, namespace)
        quiet = getattr(args, "quiet", False) or rank > 0
        return args

    def error(self, message):
        if rank:
            wait_to_exit()
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def user_errors(self):
        """Report errors inside the context, whose cause is the user's input, as the one line."""
        try:
            yield
        except USER_ERRORS as error:
            if another_died(error):
                raise
            named = isinstance(error, OSError) and error.filename is not None
            words = out_of_memory(error) or str(error)
            self.error(f"{error.filename!r}: {error.strerror}" if named else words)


def another_died(error):
    """Whether an error of torch.distributed says that the connection to another process broke."""
    known = type(error).__name__.startswith("Dist") or "gloo" in str(error)
    return processes > 1 and known and isinstance(error, RuntimeError)


def out_of_memory(error):
    """In words that memory is used up, of a GPU or of the CPU; None for another error."""
    words = "out of memory|not enough memory|bad_alloc|ALLOC_FAILED|cannot allocate memory|could not create a memory"
    found = re.search(r"(tried|unable) to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    found = found or re.search(words, str(error), re.IGNORECASE)
    if found or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({found[0] if found else str(error)[:100]})"
    return None


@contextlib.contextmanager
def memory_errors(script, advice):
    """In the context memory that is used up ends the script with a line and exit code 1."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = out_of_memory(error)
        if words is None:
            raise
        sys.exit(fail(script, f"{words}; {advice}"))


def number(kind, least=0, most=math.inf, above=False):
    """Argument type: a finite int or float (kind) from `least`, or above it, to `most`."""
    limits = f"{'above' if above else 'of at least'} {least}"
    if most < math.inf:
        limits += f" and at most {most}"

    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and least <= value <= most and not (above and value == least):
                return value
        wanted = "whole" if kind is int else "finite"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted} number {limits}")
    convert.metavar = "N" if kind is int else "X"
    return convert


def gpu_index(text):
    """Argument type: the index of a GPU, or 'none'."""
    return text if text == "none" else whole_number(0)(text)


def file_path(text):
    """Argument type: a path, with ~ and environment variables expanded."""
    path = os.path.expanduser(text)
    return path if os.path.lexists(path) else os.path.expandvars(path)  # $ may be part of a name


real_number = number(float)  # 0 or more
fraction = number(float, most=1, above=True)
whole_number = functools.partial(number, int, most=2**32 - 1)  # whole_number(least)


def add_data_options(parser, datasets, positional=True):
    """DIR or --data_root, --dataset and what load_dataset takes; returns the group."""
    group = parser.add_argument_group("data")
    add, root = group.add_argument, {"type": file_path, "default": "data", "metavar": "DIR"}
    if positional:
        add("data_root", nargs="?", help="data folder; downloaded into if missing", **root)
    else:
        add("--data_root", help="data folder; downloaded into if missing", **root)
    add("--dataset", choices=datasets, default="cifar10", help="folder: your images; shapes: built in")
    add("--train_size", type=whole_number(2), help="use N training images: the first; of a folder, some of each class")
    add("--test_size", type=whole_number(1), help="use N test images, in the same way")
    add("--validation", type=whole_number(1),
        help="hold out N training images and use them in place of the test set")
    add("--image_size", type=whole_number(8), help="resize images to N pixels (default: as in the "
        "backbone's pre-training, else 96 for stl10, 32 for others)")
    add("--test_share", type=fraction, help="share of each class held out for testing, in a folder "
        "without test images (default: as in the backbone's pre-training, else 0.1)")
    add("--skip_broken", action="store_true", help="skip images that cannot be read")
    add("--cache_dir", type=file_path, default="cache", metavar="DIR", help="cache of decoded images")
    return group


def add_normalization(group, mean, std):
    """--mean and --std, with these defaults."""
    for name, values in (("mean", mean), ("std", std)):
        group.add_argument(f"--{name}", nargs=3, type=number(float, above=name == "std"), default=list(values),
                           metavar=("R", "G", "B"), help=f"per-channel {name} for normalization")


def add_device_options(parser):
    """--gpu and --precision; returns the group."""
    group = parser.add_argument_group("device")
    group.add_argument("--gpu", type=gpu_index, metavar="N|none",
                       help="CUDA GPU, or the CPU (default: the first GPU that computes, else the CPU)")
    group.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
                       help="auto: bf16 or, on GPUs, fp16 where that is fast, else fp32 (on GPUs in training: TF32)")
    return group


def add_run_options(parser):
    """--exp_dir, --trial, --resume, --max_minutes, --tensorboard, --quiet; returns the group."""
    group = parser.add_argument_group("run")
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--exp_dir", type=file_path, default="experiments", metavar="DIR", help="folder of the runs")
    add("--trial", metavar="NAME", help="name of the run's folder (default: the next free number)")
    add("--resume", type=file_path, metavar="auto|PATH",
        help="checkpoint to resume; auto: that of --trial, else the latest")
    add("--max_minutes", type=real_number, help="stop after X minutes, to be resumed")
    add("--tensorboard", action=switch, default=False, help="also log to TensorBoard")
    add("--quiet", action="store_true", help="print results, warnings and errors only")
    return group


def wait_to_exit():
    """Exit after another process has said why: the first one to exit ends the others."""
    time.sleep(5)
    sys.exit(2)


def run_script(main, torchrun=False):
    """Call a script's main and exit with its code; without a traceback on Ctrl-C. Several processes
    of a launcher are refused, unless it is torchrun and the script is made for it; one says so. The first
    in an interactive shell is the only one, whatever was allocated."""
    shell = "SLURM_PTY_PORT" in os.environ or os.environ.get("SLURM_JOB_NAME") in ("interactive", "bash")
    task = os.environ.get("SLURM_TASK_PID") == str(os.getpid())  # started by srun itself
    for size, index in LAUNCHERS.items():
        if os.environ.get(size, "1") not in ("", "0", "1") and not (torchrun and TORCHRUN):
            if os.environ.get(index, "0") != "0":
                wait_to_exit()
            if size.startswith("SLURM") and (shell or os.isatty(0)) and not task:
                continue
            how = "with torchrun" if torchrun else "without the launcher"
            Parser(prog=os.path.basename(sys.argv[0])).error(
                f"started {os.environ[size]} times ({size}), but runs on one device: start it {how}")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads the rest; Python would flush again and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_streams():
    """Make standard streams usable: a closed one becomes the null device, before a file of the run
    gets its number, and what its encoding lacks is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text, file=None):
    """Print a line above the progress bar. A closed or full stream does not end a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text.encode(errors="backslashreplace").decode(), file=file or sys.stdout)


def info(text):
    if not quiet:
        say(text.replace("\n", " "))  # of a file's name


def warn(text):
    if rank == 0:
        say(f"warning: {text}".replace("\n", " "), sys.stderr)


def fail(script, text):
    """Print an error; returns the exit code of a run without a result."""
    if rank:
        time.sleep(2)  # the exit of another process that has printed it ends this one
        text = f"process {rank}: {text}"
    say(f"{script}: error: {text}", sys.stderr)
    return 1


def bar(*args, **options):
    """A tqdm bar: shown on a terminal only, and not with --quiet."""
    return tqdm(*args, **options, dynamic_ncols=True, disable=True if quiet else None)


def progress_bar(epochs, done):
    """A bar over the epochs of a run, of which `done` are, with a fraction."""
    form = "{bar}| {n:.1f}/{total} epochs [{elapsed}<{remaining}{postfix}]"
    return bar(total=epochs, initial=done, smoothing=0, mininterval=0.2, bar_format=form)


def show_epoch(progress, epoch, summary, keep):
    """Show the summary of an epoch beside the bar; if kept, or without a terminal, as a line."""
    progress.set_postfix_str(summary)
    if keep or progress.disable:
        info(f"epoch {epoch}/{progress.total}  {summary}")


class Stopped(Exception):
    """Raised by StopRequest.check."""


class StopRequest:
    """In the context the first of STOP_SIGNALS, or the time limit in minutes since `start`, only makes
    `requested` true, so that the step can finish and a checkpoint be written. A second signal has
    its usual effect, but none with torchrun, which may pass on what a process has received; ignored
    ones stay ignored. exit_code: 128 + the signal's number, 0 for the limit."""

    def __init__(self, minutes=None, start=0.0):
        self.signaled, self.exit_code, self.usual = False, 0, {}
        self.deadline = math.inf if minutes is None else start + 60 * minutes

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # which alone can handle signals
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.usual[number] = signal.signal(number, self.note) or signal.SIG_DFL
        return self

    def note(self, number, frame):
        self.signaled, self.exit_code = True, 128 + number
        if processes == 1:
            self.__exit__()

    def __exit__(self, *exception):
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    @property
    def requested(self):
        return self.signaled or time.monotonic() > self.deadline

    def check(self):
        """Raise Stopped if a stop is requested: for long work that can be repeated."""
        if self.requested:
            raise Stopped
