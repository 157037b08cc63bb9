"""The paper's study, "why does this not collapse?" (Sec. 4), on CIFAR-10: a run of main.py for each variant and seed, then a table beside
the paper's numbers and the curves of its Figure 2. At full size on a GPU, and at a CPU's size (an hour on two slow cores; without stop-gradient kNN ends at 20 %, with it at 30 %):

    python ablate.py all --data_root data --epochs 200 --gpu 0
    python ablate.py stop_gradient --data_root data --epochs 30 --seeds 2 --jobs 2 --width 16 --train_size 5000 --batch_size 64 --learning_rate 0.03

The studies come first; options that are not listed here go to main.py as they are. The same command goes on with what is unfinished and
leaves out what is done.
"""
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time

from utils import log
from utils.cli import Parser, complain, real_number, run, whole_number
from utils.progress import Bar, say, set_quiet, tell
from utils.run import CONFIG, read_config
from utils.stop import StopRequest
from utils.studies import DEFAULT, FAILED, STUDIES, TABLE, make_studies, run_name, write_studies

MAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")
OWN = ("--seed", "--trial", "--resume", "--untrained")  # options of main.py that are set here
POLL_SECONDS = 0.5


def make_parser():
    parser = Parser(prog="ablate.py", description=__doc__, usage="ablate.py STUDY... [options] [options of main.py]")
    parser.add_argument("studies", nargs="+", choices=(*STUDIES, "all"), metavar="STUDY", help=f"all, or some of {', '.join(STUDIES)}")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of the studies only these, by the names of their folders without the seed (default: all)")
    parser.add_argument("--seeds", type=whole_number(1), default=1, metavar="N", help="runs of each variant, with seeds from 0 on")
    parser.add_argument("--jobs", type=whole_number(1), default=1, metavar="N", help="runs at a time; on a CPU its cores are shared out among them")
    parser.add_argument("--epochs", type=whole_number(1), default=200, metavar="N", help="of each run; the paper has 100 on ImageNet")
    parser.add_argument("--batch_size", type=whole_number(2), default=512, metavar="N", help="of all but the study of it")
    parser.add_argument("--learning_rate", type=real_number, metavar="LR", help="for that batch; for others in proportion (default: that of main.py, which is so too)")
    parser.add_argument("--exp_dir", default=os.path.join("experiments", "ablations"), metavar="DIR", help="where the runs' folders, the table and the figures are made")
    parser.add_argument("--quiet", action="store_true", help="print the table, warnings and errors only")
    return parser


def plan(args, rest):
    """The runs in their order, seed by seed: pairs of a name and main.py's options. Raises ValueError."""
    taken = [word for word in rest if word.split("=")[0] in OWN]
    if taken:
        raise ValueError(f"{taken[0]} is set by ablate.py for each run; leave it out")
    names = STUDIES if "all" in args.studies else args.studies
    studies = make_studies(args.epochs, args.batch_size, args.learning_rate)
    variants = {variant.name: variant for name in names for variant in studies[name].variants}
    if args.only is not None:
        unknown = [name for name in args.only if name not in variants]
        if unknown:
            raise ValueError(f"--only {unknown[0]}: {', '.join(names)} have {', '.join(variants)}")
        variants = {name: variants[name] for name in args.only}
    rate = [] if args.learning_rate is None else ["--learning_rate", f"{args.learning_rate:g}"]
    common = ["--epochs", str(args.epochs), "--batch_size", str(args.batch_size), *rate, *rest, "--exp_dir", args.exp_dir]
    return [
        (name, [*common, *variant.options, "--seed", str(seed), *["--untrained"] * (variant.name == DEFAULT), "--trial", name])
        for seed in range(args.seeds) for variant in variants.values() for name in [run_name(variant, seed)]
    ]


def epochs_done(folder):
    """How many epochs the run in the folder has done; 0 where there is none."""
    try:
        records = log.read(folder, empty=True)
    except (OSError, ValueError):
        return 0
    return records[-1]["epoch"] if records else 0


def is_same(folder, options):
    """Whether the run in the folder was begun with these options, as far as they make a difference to it."""
    try:
        return read_config(folder)["argv"][1:] == process_options(options)
    except (OSError, ValueError):
        return False


def process_options(options):
    """What main.py is given: it goes on where there is something to go on with."""
    return [*options, "--resume", "auto", "--quiet"]


class Running:
    """A process of main.py on one of the runs."""

    def __init__(self, name, options, folder, threads):
        self.name, self.folder, self.errors = name, folder, tempfile.TemporaryFile("w+")
        environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
        # A group of its own: Ctrl-C reaches it once, from here.
        self.process = subprocess.Popen(
            [sys.executable, MAIN, *process_options(options)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors,
            env=environment, start_new_session=True,
        )

    def words(self):
        """What it has said on stderr."""
        self.errors.seek(0)
        return self.errors.read().strip()


def run_all(runs, args, stop):
    """Run what is not done, args.jobs at a time, until `stop` has a signal. Returns the exit code of a run that was refused,
    which ends the others, else 0."""
    waiting, running, code = list(runs), [], 0
    threads = None if args.jobs == 1 or "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // args.jobs)
    done = {name: epochs_done(os.path.join(args.exp_dir, name)) for name, _ in runs}
    with Bar(total=args.epochs * len(runs), smoothing=0, bar_format="{bar}| {n:.0f}/{total} epochs [{elapsed}<{remaining}{postfix}]") as bar:
        try:
            while running or (waiting and not code and stop.signal is None):
                # The first run alone until it has begun: it may have to download the data, and refuses what is wrong with all.
                begun = any(os.path.exists(os.path.join(args.exp_dir, name, CONFIG)) for name, _ in runs)
                while waiting and not code and stop.signal is None and len(running) < (args.jobs if begun or not running else 1):
                    name, options = waiting.pop(0)
                    start_run(name, options, args, threads, running)
                for each in list(running):
                    ended = each.process.poll() is not None
                    done[each.name] = epochs_done(each.folder)
                    if ended:
                        running.remove(each)
                        code = max(code, end_run(each, args, stop))
                if (code or stop.signal is not None) and running:
                    for each in running:
                        each.process.send_signal(stop.signal if stop.signal in (signal.SIGINT, signal.SIGHUP) else signal.SIGTERM)
                    for each in running:
                        each.process.wait()
                bar.update(sum(done.values()) - bar.n)
                bar.set_postfix_str(" ".join(each.name for each in running)[:40])
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for each in running:
                each.process.kill()
    return code


def start_run(name, options, args, threads, running):
    """Begin a run, or go on with it, unless it is done. What has failed is tried again from its last checkpoint."""
    folder = os.path.join(args.exp_dir, name)
    if epochs_done(folder) == args.epochs and is_same(folder, options):
        say(f"{name}: done before")
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, FAILED))
    running.append(Running(name, options, folder, threads))


def end_run(ended, args, stop):
    """Say how a run ended, and note a failure of its own in its folder. Returns its exit code if it was refused or killed, which
    no other run would be spared, else 0."""
    code = ended.process.returncode
    words = ended.words() or f"exit code {code}" * (code != 0 and stop.signal is None)
    if code == 0 and epochs_done(ended.folder) == args.epochs:
        say(f"{ended.name}: {log.summarize(ended.folder)}")
    for line in words.splitlines():
        complain(f"{ended.name}: {line}")
    if code == 1 and os.path.isdir(ended.folder):
        with open(os.path.join(ended.folder, FAILED), "w") as file:
            file.write((words or "exit code 1").splitlines()[-1])
        return 0
    return 0 if code == 0 or stop.signal is not None else code if code > 0 else 128 - code


def main(argv=None):
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    set_quiet(args.quiet)
    with parser.user_errors():
        runs = plan(args, rest)
    with StopRequest() as stop:
        code = run_all(runs, args, stop)
    if any(os.path.exists(os.path.join(args.exp_dir, name, CONFIG)) for name, _ in runs):
        with parser.user_errors():
            files = write_studies(args.exp_dir, args.exp_dir)
        with open(os.path.join(args.exp_dir, TABLE)) as file:
            tell(file.read())
        say(f"{args.exp_dir}: {', '.join(files)}")
    if stop.signal is not None:
        tell(f"stopped; to go on: {shlex.join(['python', 'ablate.py', *(sys.argv[1:] if argv is None else argv)])}")
        return stop.exit_code
    return code


if __name__ == "__main__":
    run(main)
