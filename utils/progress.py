"""How far a run is: a bar where stderr is a terminal, else a line every so often; and silence for --quiet."""
import time

from tqdm import tqdm

EVERY = 30  # seconds from one line to the next where there is no bar


class Bar(tqdm):
    """A tqdm bar that --quiet switches off, and that otherwise shows on a terminal only."""

    quiet = False  # of the process, as a logger's level is: set_quiet

    def __init__(self, *args, **options):
        super().__init__(*args, **options, dynamic_ncols=True, disable=True if Bar.quiet else None)


def set_quiet(quiet):
    """Whether `say` and the bars of this process show nothing."""
    Bar.quiet = quiet


def say(text):
    """Print a line to stdout, above a bar; not with --quiet."""
    if not Bar.quiet:
        tell(text)


def tell(text):
    """The same with --quiet too: for results, and for what one has to know."""
    tqdm.write(text)


class Progress:
    """The epochs of a run, `done` of `epochs` when it begins, as a context.

    On a terminal one bar for the whole run, with the newest figures beside it; elsewhere, as in a log file, lines. In each EVERY
    seconds there is at most one for an epoch's figures, or, in a longer epoch, for how far it is; and those to be kept.
    """

    def __init__(self, epochs, done):
        self.epochs, self.first, self.done = epochs, done, done
        self.begin = self.spoken = self.reported = self.epoch_begin = time.monotonic()
        self.bar = Bar(
            total=epochs, initial=done, smoothing=0, mininterval=0.2,
            bar_format="{bar}| {n:.1f}/{total} epochs [{elapsed}<{remaining}{postfix}]",
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def left(self):
        """The time left for the whole run in words, from the mean speed since this process began."""
        if self.done <= self.first:
            return "? left"
        seconds = (time.monotonic() - self.begin) / (self.done - self.first) * (self.epochs - self.done)
        return f"{tqdm.format_interval(round(seconds))} left"

    def update(self, done):
        """After a step: how many epochs are done, with a fraction."""
        self.done = done
        self.bar.update(done - self.bar.n)
        if self.bar.disable and done % 1 and time.monotonic() - max(self.spoken, self.epoch_begin) > EVERY:
            self.line(f"{100 * (done % 1):.0f} % of the epoch")

    def epoch(self, done, line, keep, beside):
        """After an epoch: its figures in words, as a line, which stays in any case if it is to be kept, and beside the bar, in
        at most 50 characters: a terminal has 80."""
        self.done = done
        self.bar.update(done - self.bar.n)
        self.bar.set_postfix_str(beside)
        if keep or (self.bar.disable and time.monotonic() - self.reported > EVERY):
            self.line(line)
            self.reported = self.spoken
        self.epoch_begin = time.monotonic()

    def line(self, text):
        self.spoken = time.monotonic()
        epoch = min(int(self.done) + (self.done % 1 > 0), self.epochs)
        say(f"epoch {epoch:{len(str(self.epochs))}}/{self.epochs}  {text}, {self.left()}")
