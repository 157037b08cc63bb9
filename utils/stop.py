"""Ctrl-C, SIGTERM, a closed terminal and a time limit as a question that the training loop asks after each step."""
import contextlib
import signal
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST = 1e8  # seconds, three years: more than a timer takes everywhere is no limit


class Stopped(Exception):
    """A stop was asked for inside StopRequest.at_once."""


class StopRequest:
    """While the context lasts, the first of SIGNALS or the time limit only sets `signal` (its number, SIGALRM for the
    limit, else None), so that the step can finish and a checkpoint be written; a second one acts at once, as usual.

    A signal that the process ignores, such as SIGHUP under nohup, stays ignored. minutes: the limit, counted from
    `start`, a value of time.monotonic(); None for no limit. To be used in the main thread.
    """

    def __init__(self, minutes=None, start=None):
        self.limit = None if minutes is None else 60 * minutes - (time.monotonic() - start)

    def __enter__(self):
        self.signal, self.interrupts = None, False
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.usual = {number: signal.signal(number, self.note) for number in (*heard, signal.SIGALRM)}
        if self.limit is not None:
            signal.setitimer(signal.ITIMER_REAL, min(max(self.limit, 1e-6), LONGEST))
        return self

    def note(self, number, frame):
        self.signal = number
        self.restore()
        if self.interrupts:
            raise Stopped

    def restore(self):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()

    @contextlib.contextmanager
    def at_once(self):
        """A block that a stop ends where it is: for what takes long and leaves nothing behind."""
        self.interrupts = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self.interrupts = False

    @property
    def exit_code(self):
        """The shell's for the signal; 0 for the time limit, whose stop was wanted."""
        return 0 if self.signal == signal.SIGALRM else 128 + self.signal
