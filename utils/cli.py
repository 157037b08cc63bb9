"""Command lines: argument types, and errors as one line on stderr with exit code 2."""
import argparse
import contextlib
import difflib
import math
import signal
import sys

from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations whose errors are one line, which names the nearest valid option or value."""

    def __init__(self, **options):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for option in self.all_options() if option.startswith("--")]
            hint = nearest(next((word for word in unknown if word.startswith("-")), "").split("=")[0], options)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return args

    def all_options(self):
        """The options of the parser and of its subcommands."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser.all_options()

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += nearest(str(value), map(str, action.choices))
            raise

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def for_each(self, given, function):
        """Call function(each) for all that the user gave; what cannot be done becomes a line, and the exit code is 2 in the end."""
        failed = False
        for each in given:
            try:
                function(each)
            except (ValueError, OSError) as error:
                failed = True
                print(f"{self.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        if failed:
            self.exit(2)

    @contextlib.contextmanager
    def user_errors(self):
        """Errors in the block come from what the user gave, sizes beyond the memory included: their message
        becomes the line."""
        try:
            yield
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            self.error(str(error))


def nearest(word, valid):
    """'; did you mean ...?' with the valid word nearest to a mistyped one, by letters or initials (lr for learning_rate), or
    '' where none is near."""
    def form(text):
        return text.lower().strip("-").replace("-", "_")

    def initials(text):
        return "".join(part[:1] for part in text.split("_"))

    word, forms = form(word), {form(each): each for each in valid}
    short = [each for each in forms if len(word) > 1 and word == initials(each)]  # first: by letters lr is near to blur
    found = short or difflib.get_close_matches(word, forms, n=1) or [each for each in forms if word and each == initials(word)]
    return f"; did you mean {forms[found[0]]}?" if found else ""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and in the help of the options the defaults that they have."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


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


def share(text):
    """An argument type: more than 0, at most 1."""
    value = real_number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of more than 0 and at most 1")
    return value


def probability(text):
    """An argument type: 0 to 1."""
    value = real_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability, 0 to 1")
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


def complain(message):
    """Say it on stderr, above a progress bar."""
    tqdm.write(message, file=sys.stderr)


def warn(message):
    """Say on stderr what the run goes on in spite of."""
    complain(f"warning: {message}")
