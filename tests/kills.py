"""Exact resume under SIGKILL: runs that are killed again and again and resumed with --resume auto have to end with the
weights, momenta, log figures and kNN figures of one that was not.

    python tests/kills.py --kills 50
    python tests/kills.py --kills 50 --extra "--gpu 0 --deterministic"      # on CUDA

A third of the kills come at a random moment after the start, the others at a random visit of each place in turn.
"""
import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter

import children

PLACES = ("forward", "backward", "kNN", "log line", "checkpoint write", "before rename", "after rename")
VISITS = {"forward": 8, "backward": 8, "kNN": 2, "log line": 1, "checkpoint write": 2, "before rename": 3, "after rename": 3}  # in an epoch
SETTINGS = (
    "--dataset shapes --train_size 256 --test_size 100 --width 4 --dim 32 --pred_dim 16 --batch_size 32 --no-compile "
    "--epochs 5 --save_freq 1 --eval_freq 1 --untrained"
).split()


def compare(first, second):
    """Raise AssertionError unless two finished runs are the same, times apart."""
    import torch

    from utils import checkpoint, log

    def figures(folder):
        return [{k: v for k, v in record.items() if k not in ("seconds", "wall_seconds", "views_per_s")} for record in log.read(folder)]

    assert figures(first) == figures(second), (figures(first), figures(second))
    for name in ("checkpoint.pt", "backbone.pt"):
        a, b = (checkpoint.load(os.path.join(folder, name)) for folder in (first, second))
        flat_a, flat_b = (torch.utils._pytree.tree_flatten_with_path({k: v for k, v in state.items() if k not in ("config", "wall_seconds")})[0] for state in (a, b))
        assert [path for path, _ in flat_a] == [path for path, _ in flat_b]
        for (path, x), (_, y) in zip(flat_a, flat_b):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, (name, path)


def kill_runs(folder, kills, seed=0, extra=()):
    """Kill so many times; returns how many kills hit each place. Raises AssertionError for a run that ends
    differently or with an error."""
    random_numbers = random.Random(seed)
    settings = [*SETTINGS, *extra, "--exp_dir", folder]
    begin = time.monotonic()
    assert children.finish(children.start([*settings, "--trial", "whole"], os.path.join(folder, "whole.txt"))) == 0
    duration = time.monotonic() - begin

    hits, finished = Counter(), 0
    places = (*PLACES, *["any moment"] * (len(PLACES) // 2))
    while sum(hits.values()) < kills or not finished:
        trial = f"killed-{finished + 1}"
        argv, output = [*settings, "--trial", trial, "--resume", "auto"], os.path.join(folder, f"{trial}.txt")
        place = places[sum(hits.values()) % len(places)] if sum(hits.values()) < kills else None
        if place is None:
            process = children.start(argv, output)
        elif place == "any moment":
            process = children.start(argv, output)
            process.join(random_numbers.uniform(0, duration))
            process.kill()
        else:
            process = children.start(argv, output, (children.kill_at, (place, random_numbers.randint(1, 2 * VISITS[place]))))
        code = children.finish(process)
        if code == -signal.SIGKILL:
            hits[place] += 1
        else:
            with open(output) as file:
                assert code == 0, file.read()
            compare(os.path.join(folder, "whole"), os.path.join(folder, trial))
            finished += 1
            print(f"{sum(hits.values())} kills, {finished} runs finished as the uninterrupted one", flush=True)
    return hits


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extra", type=shlex.split, default=[], help="more options of main.py")
    return parser


def main():
    args = make_parser().parse_args()
    folder = tempfile.mkdtemp()
    try:
        hits = kill_runs(folder, args.kills, args.seed, args.extra)
    finally:
        shutil.rmtree(folder)
    print(", ".join(f"{place} {count}" for place, count in hits.items()))


if __name__ == "__main__":
    sys.path.insert(0, str(children.REPO))
    main()
