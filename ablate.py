"""The paper's study (Sec. 4) on CIFAR-10, "what keeps it from collapsing?": a run of main.py for each variant and seed, then a table beside
the paper's numbers and the curves of its Figure 2. At full size on a GPU, and at a CPU's size (an hour on two slow cores; without stop-gradient
kNN ends at 20 %, with it at 30 %):

    python ablate.py all --data_root data --epochs 200 --gpu 0
    python ablate.py stop_gradient --data_root data --epochs 30 --seeds 2 --jobs 2 --width 16 --train_size 5000 --batch_size 64 --learning_rate 0.03 --eval_freq 5

The studies come first; options that are not listed here go to main.py as they are. The same command goes on with what is unfinished, leaves
out what is done, and tries again what has failed.
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
from utils.resume import PRETRAINING
from utils.run import CONFIG
from utils.stop import StopRequest
from utils.studies import DEFAULT, FAILED, STUDIES, STUDY_FILE, TABLE, make_studies, read_study, run_name, write_studies

MAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")
OWN = ("seed", "trial", "resume", "untrained")  # options of main.py that are set here
POLL_SECONDS, LOOK_SECONDS = 0.1, 1.0           # from one look at the processes, and at their logs, to the next


def make_parser():
    parser = Parser(
        prog="ablate.py", description=__doc__, usage="ablate.py STUDY... [options] [options of main.py]",
        epilog="variants, for --only:\n" + "\n".join(
            f"  {name:14} {' '.join(variant.name for variant in study.variants)}" for name, study in make_studies(100, 512, None).items()
        ),
    )
    parser.add_argument("studies", nargs="+", choices=(*STUDIES, "all"), metavar="STUDY", help=f"all, or some of {', '.join(STUDIES)}; before the options")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of the studies only these (default: all)")
    parser.add_argument("--seeds", type=whole_number(1), default=1, metavar="N", help="runs of each variant, with seeds from 0 on")
    parser.add_argument("--jobs", type=whole_number(1), default=1, metavar="N", help="runs at a time; on a CPU its cores are shared out among them")
    parser.add_argument("--epochs", type=whole_number(1), default=200, metavar="N", help="of each run; the paper has 100 on ImageNet")
    parser.add_argument("--batch_size", type=whole_number(2), default=512, metavar="N", help="of all but the study of it")
    parser.add_argument("--learning_rate", type=real_number, metavar="LR", help="for that batch; for others in proportion (default: that of main.py, which is so too)")
    parser.add_argument("--exp_dir", default=os.path.join("experiments", "ablations"), metavar="DIR", help="where the runs' folders, the table and the figures are made")
    parser.add_argument("--max_minutes", type=real_number, metavar="M", help="stop all after M minutes as Ctrl-C does, with exit code 0 (default: no limit)")
    parser.add_argument("--quiet", action="store_true", help="print the table, warnings and errors only")
    return parser


# ---------------------------------------------------------------------------------------------------
# What is to be run


def options_in(words):
    """The options among words of a command line, and what is given to each, in a dict of lists."""
    found, values = {}, []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values = found.setdefault(name, [])
            word = value if equals else None
        if word is not None:
            values.append(word)
    return found


def common_recipe(args, rest):
    """What all runs have in common, as far as it makes another study: to be the same each time that a folder is used."""
    recipe = {*PRETRAINING.recipe, *(f"no-{name}" for name in PRETRAINING.recipe)}
    options = {name: " ".join(values) for name, values in sorted(options_in(rest).items()) if name in recipe}
    return {"epochs": args.epochs, "batch_size": args.batch_size, "learning_rate": args.learning_rate, "options": options}


def plan(args, rest):
    """The runs in their order, seed by seed: pairs of a name and main.py's options. Raises ValueError and OSError."""
    taken = [name for name in options_in(rest) if name in OWN]
    if taken:
        raise ValueError(f"--{taken[0]} is set by ablate.py for each run; leave it out")
    if os.path.exists(os.path.join(args.exp_dir, STUDY_FILE)):
        there, common = read_study(args.exp_dir), common_recipe(args, rest)
        for name in common:
            if there[name] != common[name]:
                raise ValueError(f"--exp_dir {args.exp_dir}: the runs there have {name} {there[name]}, not {common[name]}; take another --exp_dir")
    names = STUDIES if "all" in args.studies else args.studies
    studies = make_studies(args.epochs, args.batch_size, args.learning_rate)
    variants = {variant.name: variant for name in names for variant in studies[name].variants}
    if args.only is not None:
        unknown = [name for name in args.only if name not in variants]
        if unknown:
            raise ValueError(f"--only {unknown[0]}: the variants of {', '.join(names)} are {', '.join(variants)}")
        variants = {name: variants[name] for name in args.only}
    rate = [] if args.learning_rate is None else ["--learning_rate", f"{args.learning_rate:g}"]
    common = ["--epochs", str(args.epochs), "--batch_size", str(args.batch_size), *rate, *rest, "--exp_dir", args.exp_dir]
    runs = []
    for seed in range(args.seeds):
        for variant in variants.values():
            name = run_name(variant, seed)
            untrained = ["--untrained"] if variant.name == DEFAULT else []
            runs.append((name, [*common, *variant.options, "--seed", str(seed), *untrained, "--trial", name, "--resume", "auto", "--quiet"]))
    return runs


def epochs_done(folder):
    """How many epochs the run in the folder has done; 0 where there is none."""
    try:
        records = log.read(folder, empty=True)
    except (OSError, ValueError):
        return 0
    return records[-1]["epoch"] if records else 0


# ---------------------------------------------------------------------------------------------------
# Running it


class Running:
    """A process of main.py on one of the runs."""

    def __init__(self, name, options, folder, threads):
        self.name, self.folder, self.errors = name, folder, tempfile.TemporaryFile("w+")
        environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
        # A group of its own: Ctrl-C reaches it once, from here.
        self.process = subprocess.Popen(
            [sys.executable, MAIN, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors,
            env=environment, start_new_session=True,
        )

    def words(self):
        """What it has said on stderr."""
        self.errors.seek(0)
        return self.errors.read().strip()


class Study:
    """Runs what is not done, args.jobs at a time, until `stop` has a signal. exit_code: 2 if main.py refused a run, 1 if one failed,
    else 0. Where the first one is refused, what is wrong is so for all, and no other is tried."""

    def __init__(self, runs, args, common, stop):
        self.args, self.common, self.stop = args, common, stop
        self.waiting, self.running = list(runs), []
        self.done = {name: epochs_done(self.folder(name)) for name, _ in runs}
        self.begun, self.exit_code = False, 0
        share = max(1, (os.cpu_count() or 1) // args.jobs)
        self.threads = None if args.jobs == 1 or "OMP_NUM_THREADS" in os.environ else share

    def folder(self, name):
        return os.path.join(self.args.exp_dir, name)

    def run(self):
        total = self.args.epochs * len(self.done)
        with Bar(total=total, smoothing=0, bar_format="{bar}| {n:.0f}/{total} epochs [{elapsed}<{remaining}{postfix}]") as bar:
            looked = 0.0
            try:
                while self.start_some() or self.running:
                    ended = [each for each in self.running if each.process.poll() is not None]
                    if ended or time.monotonic() - looked > LOOK_SECONDS:
                        looked = time.monotonic()
                        self.look()
                        bar.update(sum(self.done.values()) - bar.n)
                        bar.set_postfix_str(" ".join(each.name for each in self.running)[:40])
                    for each in ended:
                        self.running.remove(each)
                        self.end(each)
                    if self.stop.signal is not None:
                        self.stop_all()
                    elif self.running:
                        time.sleep(POLL_SECONDS)
            finally:
                for each in self.running:
                    each.process.kill()
                    each.process.wait()

    def start_some(self):
        """Begin, or go on with, as many runs as there is room for; whether there was one. The first runs alone until it has begun: it may
        have to download the data."""
        started = False
        while self.waiting and self.stop.signal is None and len(self.running) < (self.args.jobs if self.begun else 1):
            name, options = self.waiting.pop(0)
            if self.done[name] == self.args.epochs:
                say(f"{name}: done before")
                continue
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.remove(os.path.join(self.folder(name), FAILED))
            self.running.append(Running(name, options, self.folder(name), self.threads))
            started = True
        return started

    def look(self):
        """How far the runs are; and once one has begun, note what all have in common."""
        for each in self.running:
            self.done[each.name] = epochs_done(each.folder)
            if not self.begun and os.path.exists(os.path.join(each.folder, CONFIG)):
                self.begun = True
                log.write_json(os.path.join(self.args.exp_dir, STUDY_FILE), self.common)

    def end(self, ended):
        """Say how a run ended; note in its folder if it failed."""
        code, stopped = ended.process.returncode, self.stop.signal is not None
        words = ended.words()
        if code == 0 and self.done[ended.name] == self.args.epochs:
            say(f"{ended.name}: {log.summarize(ended.folder)}")
        for line in words.splitlines():
            complain(f"{ended.name}: {line}")
        if code == 0 or stopped:
            return
        if code == 2:
            self.exit_code = 2
            if not self.begun:
                self.waiting.clear()
            return
        if code != 1:
            words = f"ended with exit code {code}"
            complain(f"{ended.name}: {words}")
        self.exit_code = max(self.exit_code, 1)
        if os.path.isdir(ended.folder):
            with open(os.path.join(ended.folder, FAILED), "w") as file:
                file.write(words.splitlines()[-1] if words else "failed")

    def stop_all(self):
        """Pass the signal on, wait for the checkpoints, and begin nothing more."""
        self.waiting.clear()
        for each in self.running:
            each.process.send_signal(signal.SIGTERM if self.stop.signal == signal.SIGALRM else self.stop.signal)
        for each in self.running:
            each.process.wait()
        self.look()


def main(argv=None):
    begin = time.monotonic()
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    set_quiet(args.quiet)
    with parser.user_errors():
        runs = plan(args, rest)
    with StopRequest(args.max_minutes, begin) as stop:
        study = Study(runs, args, common_recipe(args, rest), stop)
        study.run()
    if os.path.exists(os.path.join(args.exp_dir, STUDY_FILE)):
        with parser.user_errors():
            files = write_studies(args.exp_dir, args.exp_dir)
        with open(os.path.join(args.exp_dir, TABLE)) as file:
            tell(file.read())
        say(f"{args.exp_dir}: {', '.join(files)}")
    if stop.signal is not None:
        tell(f"stopped; to go on: {shlex.join(['python', 'ablate.py', *(sys.argv[1:] if argv is None else argv)])}")
        return stop.exit_code
    return study.exit_code


if __name__ == "__main__":
    run(main)
