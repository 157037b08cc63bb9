"""Runs of main.py, without figures, in processes of their own that start in a moment: forked from a server which has imported
torch and never computed."""
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH", "")])
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["main", "main_lincls"])


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(count, owner, name, after=False):
    """Have SIGKILL end this process at the count-th call of owner.name, before it or after it."""
    usual, calls = getattr(owner, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            kill_self()
        result = usual(*args, **kwargs)
        if calls == count:
            kill_self()
        return result

    setattr(owner, name, wrapper)


def kill_at(place, count):
    """Die at the count-th time that the run comes to a place."""
    import torch

    import main
    from utils import checkpoint, log

    if place == "forward":
        at_call(count, main, "feature_std")
    elif place == "backward":
        at_call(count, torch.optim.SGD, "step")
    elif place == "kNN":
        at_call(count, sys.modules["utils.knn"], "vote")
    elif place == "log line":
        usual, calls = log.append, 0

        def half_a_line(folder, record):
            nonlocal calls
            calls += 1
            if calls == count:
                with open(os.path.join(folder, log.LOG), "a") as file:
                    file.write(json.dumps(record)[:20])
                kill_self()
            usual(folder, record)

        log.append = half_a_line
    elif place == "checkpoint write":  # half of the bytes are in the temporary file
        usual, calls = open, 0

        class HalfWriter:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                self.file.close()

            def write(self, content):
                nonlocal calls
                calls += 1
                if calls == count:
                    self.file.write(content[:len(content) // 2])
                    self.file.flush()
                    kill_self()
                return self.file.write(content)

            def __getattr__(self, name):
                return getattr(self.file, name)

        checkpoint.open = lambda path, mode: HalfWriter(usual(path, mode)) if mode == "wb" else usual(path, mode)
    elif place == "before rename":  # written, the old one linked, not renamed
        at_call(count, os, "replace")
    elif place == "after rename":
        at_call(count, os, "replace", after=True)
    else:
        raise ValueError(place)


def child(argv, output, before):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and then so would a run ignore it
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = ["main.py", *argv]
    for function, args in before:
        function(*args)
    import main
    from utils.cli import run

    main.plot_views = main.write_report = main.draw_run = lambda *args: None  # drawing takes seconds, and has tests of its own
    run(lambda: main.main(argv))


def start(argv, output, *before):
    """Start main.py with argv in a process whose output goes to a file. before: pairs of a function, which is to be
    importable, and its arguments, called in the process first. Returns the process: pid, join(), exitcode."""
    process = context.Process(target=child, args=([str(arg) for arg in argv], str(output), before))
    process.start()
    return process


def finish(process, seconds=120):
    """The exit code; a process that takes longer is killed, which is an error."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a run did not end within {seconds} s")
    return process.exitcode
