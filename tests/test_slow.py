"""What takes long: real kills, random arguments, many epochs."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import main as pretraining
import main_lincls
from conftest import CPU_ONLY, REPO, SMALL
from test_main import assert_same_run
from utils import log

pytestmark = pytest.mark.slow


def test_runs_killed_at_any_moment_end_as_the_one_that_is_not(tmp_path):
    """SIGKILL at random times, of the start too: the same log and the same bits."""
    options = f"--epochs 40 --eval_freq 7 --resume auto --exp_dir {tmp_path} --trial".split()
    command = [sys.executable, "main.py", *SMALL, *options]
    begin = time.monotonic()
    subprocess.run([*command, "whole"], cwd=REPO, env=CPU_ONLY, check=True, stdout=subprocess.DEVNULL)
    duration, generator, codes = time.monotonic() - begin, random.Random(0), []
    while len(codes) < 3 and 0 not in codes:
        process = subprocess.Popen([*command, "killed"], cwd=REPO, env=CPU_ONLY, stdout=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.1, 0.5) * duration)  # the whole run may have been slowed down
        process.kill()
        codes.append(process.wait())
    subprocess.run([*command, "killed"], cwd=REPO, env=CPU_ONLY, check=True, stdout=subprocess.DEVNULL)
    assert codes[0] == -signal.SIGKILL and set(codes) <= {-signal.SIGKILL, 0}
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


WORDS = ["", "0", "1", "2", "-1", "0.5", "1e9", "nan", "inf", "x", "auto", "none", "a/b", "..", "/dev/null", "é", "\n"]


@pytest.mark.parametrize("module, train, base", [
    (pretraining, "pretrain", [*SMALL, "--epochs", "2"]),
    (main_lincls, "evaluate", ["--dataset", "shapes", "--train_size", "20", "--test_size", "20", "--pretrained", "{}"]),
])
def test_any_arguments_are_taken_or_refused_in_a_line(
    tmp_path, monkeypatch, no_gpu, no_network, finished_run, capsys, module, train, base,
):
    """All but the training itself: exit code 2, one line and nothing written, or a run."""
    monkeypatch.setattr(module, train, lambda *args, **options: 0)
    monkeypatch.setattr("utils.report.begin", lambda *args: None)
    generator, codes = random.Random(0), []
    actions = [action for action in module.make_parser()._actions if action.option_strings and action.dest != "help"]
    for i in range(150):
        folder = tmp_path / f"case-{i}"
        (folder / "here").mkdir(parents=True)
        monkeypatch.chdir(folder / "here")
        argv = [word.format(os.path.join(finished_run, "backbone.pt")) for word in base]
        for action in generator.sample(actions, generator.randint(1, 3)):
            values = [] if action.nargs == 0 else [generator.choice([*WORDS, *map(str, action.choices or ())])]
            argv += [generator.choice(action.option_strings), *values * (action.nargs or 1)]
        try:
            codes.append(module.main(argv))
        except SystemExit as stop:
            codes.append(stop.code)
        error = capsys.readouterr().err
        assert codes[-1] in (0, 2), argv
        if codes[-1] == 2:
            assert error.count("\n") == 1 and ".py: error: " in error, (argv, error)
            assert not [path for path in folder.rglob("*") if path.is_file()], argv
    assert min(codes.count(0), codes.count(2)) > 10


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_many_epochs_leave_nothing_behind(tmp_path, monkeypatch, no_gpu, no_figures):
    """Memory and open files after 20 and after 60 epochs."""
    seen = {}

    def note(folder, records, usual=log.write):
        usual(folder, records)
        with open("/proc/self/statm") as file:
            seen[records[-1]["epoch"] if records else 0] = int(file.read().split()[1]), len(os.listdir("/proc/self/fd"))

    monkeypatch.setattr(log, "write", note)
    options = ["--epochs", "60", "--eval_freq", "2", "--exp_dir", str(tmp_path)]
    assert pretraining.main([*SMALL, *options]) == 0
    (early, early_files), (late, late_files) = seen[20], seen[60]
    assert late_files == early_files and (late - early) * os.sysconf("SC_PAGE_SIZE") < 30 * 2**20
