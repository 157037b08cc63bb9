"""The terminal: arguments, messages, progress, and signals that ask a run to stop."""
import argparse
import contextlib
import difflib
import functools
import math
import os
import re
import signal
import sys
import threading
import time

from tqdm import tqdm

LINE_SECONDS = 30  # between lines of progress where there is no terminal
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")
                if hasattr(signal, name)]  # Windows lacks some; SIGBREAK is its own
RANKS = {"WORLD_SIZE": "RANK", "SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
         "PMI_SIZE": "PMI_RANK"}  # launchers' variables: number of processes, and which one this is
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
rank, processes = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")] if TORCHRUN else (0, 1)
USER_ERRORS = (ValueError, OSError, MemoryError, RuntimeError)  # what bad input raises while a script sets up
DATA_OPTIONS = ("train_size", "test_size", "image_size", "validation", "test_share", "skip_broken", "cache_dir")
quiet = False      # --quiet: `info` and the bars show nothing


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as written, and the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations; an error is one line that names the nearest valid option, exit code 2."""

    def __init__(self, **options):
        open_streams()
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        global quiet
        args, unknown = self.parse_known_args(args, namespace)
        quiet = getattr(args, "quiet", False) or rank > 0
        if unknown:
            typed = next((word for word in unknown if word.startswith("-")), "").split("=")[0]
            hint = nearest(typed, [option for option in self._option_string_actions if option.startswith("--")])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return args

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += nearest(str(value), list(map(str, action.choices)))
            raise

    def error(self, message):
        if rank:
            wait_to_exit()
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def user_errors(self):
        """Report errors inside the block, whose cause is the user's input, as the one line."""
        try:
            yield
        except USER_ERRORS as error:
            if another_died(error):
                raise
            named = isinstance(error, OSError) and error.filename is not None
            self.error(f"{error.filename!r}: {error.strerror}" if named else str(error))


def another_died(error):
    """Whether an error of torch.distributed says that a connection broke, as when another process has died."""
    return processes > 1 and isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or "gloo" in str(error))


def nearest(word, valid):
    """'; did you mean ...?' with the valid word nearest to a typed one by initials (lr, learning_rate) or letters."""
    def initials(text):
        return "".join(part[:1] for part in text.split("_"))

    word, *forms = (each.lower().strip("-").replace("-", "_") for each in (word, *valid))
    found = [form for form in forms if len(word) > 1 and word == initials(form) or form == initials(word)]
    found = found or difflib.get_close_matches(word, forms, n=1)
    return f"; did you mean {valid[forms.index(found[0])]}?" if found else ""


def number(kind, least=0, most=math.inf, above=False):
    """Argument type: a finite number of a kind, int or float, from `least` (or above it) to `most`."""
    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and (least < value if above else least <= value) and value <= most:
                return value
        limits = f"{'above' if above else 'of at least'} {least}" + (f" and at most {most}" if most < math.inf else "")
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole' if kind is int else 'finite'} number {limits}")
    return convert


def file_path(text):
    """Argument type: a path, with ~ and environment variables expanded."""
    text = os.path.expanduser(text)
    expanded = text if os.path.lexists(text) else os.path.expandvars(text)  # $ may be part of a name
    if re.search(r"^~|\$(\w|{)", expanded) and not os.path.lexists(expanded):
        raise argparse.ArgumentTypeError(f"{expanded!r}: there is no such user or environment variable")
    return expanded


real_number = number(float)  # 0 or more
fraction = number(float, most=1, above=True)
whole_number = functools.partial(number, int, most=2**32 - 1)  # whole_number(least)


def add_data_options(parser, datasets, positional=True):
    """DIR or --data_root, --dataset, and DATA_OPTIONS; returns their group."""
    group = parser.add_argument_group("data")
    group.add_argument("data_root" if positional else "--data_root", type=file_path, default="data", metavar="DIR",
                       help="folder that has or gets the data set", **({"nargs": "?"} if positional else {}))
    group.add_argument("--dataset", choices=datasets, default="cifar10", help="folder: your images; shapes: built in")
    group.add_argument("--train_size", type=whole_number(2), metavar="N", help="use the first N training images")
    group.add_argument("--test_size", type=whole_number(1), metavar="N", help="use the first N test images")
    group.add_argument("--validation", type=whole_number(1), metavar="N", help="hold out N training images and "
                       "test on them, to choose settings by")
    group.add_argument("--image_size", type=whole_number(8), metavar="N", help="resize images to N pixels (default: "
                       "the backbone's run, else 96 for stl10, 32 for others)")
    group.add_argument("--test_share", type=fraction, metavar="F", help="share of each class held out as test images, "
                       "for a folder without any (default: the backbone's run, else 0.1)")
    group.add_argument("--skip_broken", action="store_true", help="skip images of a folder that cannot be read")
    group.add_argument("--cache_dir", type=file_path, default="cache", metavar="DIR", help="for a folder's images")
    return group


def data_options(settings):
    """The keyword arguments of load_dataset in the settings of a script, or in those of an older run."""
    return {name: settings[name] for name in DATA_OPTIONS if name in settings}


def add_normalization(group, mean, std):
    """--mean and --std per channel, with these defaults."""
    for name, values in (("mean", mean), ("std", std)):
        group.add_argument(f"--{name}", type=number(float, above=name == "std"), nargs=3, default=list(values),
                           metavar=("R", "G", "B"), help=f"{name} that the backbone's images are normalized by")


def add_device_options(parser, compiled=False):
    """--gpu, --precision, and with compiled=True --compile; returns their group."""
    group = parser.add_argument_group("device")
    group.add_argument("--gpu", type=int, metavar="N", help="index of the CUDA GPU (default: the first, else the CPU)")
    group.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: by device")
    if compiled:
        group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on with CUDA only")
    return group


def add_run_options(parser):
    """--exp_dir, --trial, --resume, --max_minutes, --tensorboard, --quiet; returns their group."""
    group = parser.add_argument_group("run")
    group.add_argument("--exp_dir", type=file_path, default="experiments", metavar="DIR", help="folder of the runs")
    group.add_argument("--trial", metavar="NAME", help="name of the run's folder (default: the next free number)")
    group.add_argument("--resume", type=file_path, metavar="auto|PATH", help="checkpoint; auto: the latest")
    group.add_argument("--max_minutes", type=real_number, metavar="M", help="stop after M minutes, to be resumed")
    group.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="log there too")
    group.add_argument("--quiet", action="store_true", help="print results, warnings and errors only")
    return group


def wait_to_exit():
    """Exit after another process has said why: the first one to exit ends the others."""
    time.sleep(5)
    sys.exit(2)


def run_script(main, torchrun=False):
    """Call a script's main and exit with its code; without a traceback on Ctrl-C. Of several processes that a launcher
    started, unless it is torchrun and the script is made for it, none runs, and one says so."""
    for size, index in RANKS.items() if not (torchrun and TORCHRUN) else ():
        if os.environ.get(size, "1") not in ("", "0", "1"):
            if os.environ.get(index, "0") != "0":
                wait_to_exit()
            Parser(prog=os.path.basename(sys.argv[0])).error(
                f"started {os.environ[size]} times ({size}), but runs on one device: start it " +
                ("with torchrun" if torchrun else "without the launcher"))
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
    """Make standard streams usable: a closed one becomes the null device, before a file of the run gets its number, and
    what its encoding lacks is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif mode == "w" and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def say(text, file=None):
    """Print a line above the progress bar, to stdout by default. A closed or full stream does not end a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text.encode(errors="backslashreplace").decode(), file=file or sys.stdout)


def info(text):
    if not quiet:
        say(text)


def warn(text):
    if rank == 0:
        say(f"warning: {text}", sys.stderr)


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


class Progress(tqdm):
    """Progress of a run over its epochs: a bar on a terminal, else a line every LINE_SECONDS."""

    def __init__(self, epochs, done):
        self.epochs, self.first, self.begin, self.spoken = epochs, done, time.monotonic(), time.monotonic()
        super().__init__(total=epochs, initial=done, smoothing=0, mininterval=0.2, dynamic_ncols=True,
                         disable=True if quiet else None,
                         bar_format="{bar}| {n:.1f}/{total} epochs [{elapsed}<{remaining}{postfix}]")

    def advance(self, done, figures="", keep=False):
        """done: epochs, with a fraction inside an epoch. figures: text after an epoch. keep: print it in any case."""
        self.update(done - self.n)
        if figures:
            self.set_postfix_str(figures)
        if keep or self.disable and time.monotonic() - self.spoken > LINE_SECONDS:
            self.spoken = time.monotonic()
            seconds = (self.spoken - self.begin) * (self.epochs - done) / max(done - self.first, 1e-9)
            left = f", {tqdm.format_interval(round(seconds))} left" if self.first < done < self.epochs else ""
            info(f"epoch {done:.{0 if figures else 2}f}/{self.epochs}  {figures}{left}")


def handle_signals(handler):
    """Set the handler of STOP_SIGNALS that are not ignored; returns the handlers before by number: none in a thread,
    where Python sets no handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in heard}


class Stopped(Exception):
    """Raised by StopRequest.check."""


class StopRequest:
    """Inside the context, the first of STOP_SIGNALS, and the time limit, only make `requested` true, so that the step
    can finish and a checkpoint be written. A second signal has its usual effect, but none with torchrun, which may pass
    on what a process has already received; ignored ones stay ignored. In another thread than the main one, which alone
    can handle signals, there is only the time limit.

    minutes: limit since `start`, a value of time.monotonic(). exit_code: 128 + the signal's number, 0 for the limit.
    """

    def __init__(self, minutes=None, start=0.0):
        self.signaled, self.exit_code = False, 0
        self.deadline = math.inf if minutes is None else start + 60 * minutes

    def __enter__(self):
        self.usual = handle_signals(self.note)
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
