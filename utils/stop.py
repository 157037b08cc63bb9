"""Ctrl-C and SIGTERM as a question that the training loop asks after each step."""
import signal


class StopRequest:
    """While the context lasts, the first SIGINT or SIGTERM only sets `signal` (its number, else None), so that
    the step can finish and a checkpoint be written; a second one acts at once, as usual."""

    def __enter__(self):
        self.signal = None
        self.usual = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.signal = number
        self.restore()

    def restore(self):
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()
