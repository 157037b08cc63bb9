"""Command lines: argument types, and errors as one line on stderr with exit code 2."""
import argparse
import contextlib
import math
import sys


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations whose errors are one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def user_errors(self):
        """ValueError and OSError in the block are the user's: their message becomes the line."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(str(error))


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and in the help of the options the defaults that they have."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def whole_number(least):
    """An argument type: a whole number of at least `least`."""
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
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


def warn(message):
    print(f"warning: {message}", file=sys.stderr)
