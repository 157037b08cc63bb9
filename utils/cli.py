"""Command lines: argument types, and errors as one line on stderr with exit code 2."""
import argparse
import contextlib
import math
import signal
import sys

from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations whose errors are one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def user_errors(self):
        """Errors in the block come from what the user gave, sizes beyond the memory included: their message
        becomes the line."""
        try:
            yield
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            self.error(str(error))


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and in the help of the options the defaults that they have."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def whole_number(least):
    """An argument type: a whole number of at least `least` and less than 2 ** 32."""
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = -1
        if not least <= value < 2**32:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least} and less than 2^32")
        return value
    return convert


def real_number(text):
    """An argument type: a finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def positive_number(text):
    """An argument type: a finite number, more than 0."""
    value = real_number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of more than 0")
    return value


def add_normalization(parser, mean, std):
    """The options --mean and --std of each channel, with these defaults."""
    for name, values, number in (("mean", mean, real_number), ("std", std, positive_number)):
        parser.add_argument(
            f"--{name}", type=number, nargs=3, default=list(values), metavar=("R", "G", "B"),
            help="by which the backbone's pictures were normalized",
        )


class Tolerant:
    """A text stream that may lose its reader (a closed terminal, `| head`) or its disk's last free byte: what
    cannot be written is dropped, and the work goes on."""

    def __init__(self, stream):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the stream cannot encode
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run(main):
    """Run a script's main and exit with its code; Ctrl-C ends it without a traceback."""
    sys.stdout, sys.stderr = Tolerant(sys.stdout), Tolerant(sys.stderr)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def warn(message):
    """Say it on stderr, above a progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
