"""Where the scripts are started: notebooks, threads, odd streams and locales, queues, launchers, other systems."""
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

import export
import main as pretraining
import main_lincls
import visualize
from conftest import CPU_ONLY, REPO, SMALL
from utils import checkpoint, cli, log

STARTS = [*SMALL, "--epochs", "1", "--eval_freq", "1"]


def test_runs_in_a_thread_and_several_in_a_process(run_main, no_gpu, monkeypatch):
    """As in a notebook: no signals in a thread, nothing of a run left for the next one."""
    codes, options = [], ("--epochs", 2, "--max_minutes", 0, "--trial", "run")
    thread = threading.Thread(target=lambda: codes.append(run_main(*options)))
    thread.start()
    thread.join()
    assert codes == [0] and log.read("experiments/run", empty=True) == []
    handlers = [signal.getsignal(number) for number in cli.STOP_SIGNALS]
    for _ in range(2):  # the second time it is finished
        assert run_main("--epochs", 2, "--resume", "auto", "--quiet") == 0
    assert run_main("--epochs", 1) == 0 and not cli.quiet
    assert len(log.read("experiments/run")) == 2 and len(log.read("experiments/1")) == 1
    assert handlers == [signal.getsignal(number) for number in cli.STOP_SIGNALS]
    assert checkpoint.read_json("experiments/1/config.json")["argv"][:2] == ["main.py", "--dataset"]
    # A notebook keeps the traceback of an exception, and with it everything that the run held.
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "pretrain", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:
            run_main("--epochs", 1, "--trial", "failed")
    assert run_main("--epochs", 1, "--trial", "failed", "--resume", "auto") == 0 and kept.tb


@pytest.mark.parametrize("size, index", [
    ("WORLD_SIZE", "RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
])
def test_one_of_several_processes_says_that_there_is_one_device(monkeypatch, capsys, size, index):
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    monkeypatch.setenv(size, "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv(index, rank)
        with pytest.raises(SystemExit, match="^2$"):
            cli.run_script(lambda: pytest.fail("started"))
        assert capsys.readouterr().err.count("\n") == lines
    with monkeypatch.context() as patch:  # a shell in an allocation of several tasks
        patch.setenv("SLURM_PTY_PORT", "41000")
        patch.setenv(index, "0")
        with pytest.raises(SystemExit, match="^4$" if size.startswith("SLURM") else "^2$"):
            cli.run_script(lambda: 4)
        patch.setenv("SLURM_TASK_PID", str(os.getpid()))  # what srun starts itself, there, is a task
        with pytest.raises(SystemExit, match="^2$"):
            cli.run_script(lambda: 4)
        capsys.readouterr()
    monkeypatch.setattr(cli, "TORCHRUN", True)  # one torchrun a node, started by srun
    with pytest.raises(SystemExit, match="^3$"):
        cli.run_script(lambda: 3, torchrun=True)


@pytest.mark.parametrize("option", ["--local-rank=0", "--local_rank=1"])
def test_the_old_launcher_is_told_to_use_torchrun(refused, option):
    for main in (pretraining.main, main_lincls.main):
        refused(main, [option, *SMALL], "torchrun")


def test_cublas_can_be_reproducible_from_its_first_product():
    """It reads the variable once; in a notebook an earlier run may have used it."""
    code, name = "import utils, os; print(os.environ['{0}'])", "CUBLAS_WORKSPACE_CONFIG"
    for given, found in (({}, ":4096:8"), ({name: ":16:8"}, ":16:8")):
        environment = {key: value for key, value in os.environ.items() if key != name} | given
        done = subprocess.run([sys.executable, "-c", code.format(name)], cwd=REPO, env=environment, capture_output=True)
        assert done.stdout.decode() == f"{found}\n"


def test_paths_are_expanded_in_every_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch dir")
    paths = {"DIR", "PATH", "FILE", "FOLDER", "CHECKPOINT", "CLASSIFIER", "RUN", "auto|PATH"}
    parsers = [module.make_parser() for module in (pretraining, main_lincls, visualize, export)]
    parsers += [*parsers[3]._subparsers._group_actions[0].choices.values()]
    actions = [action for parser in parsers for action in parser._actions if action.metavar in paths]
    assert len(actions) >= 20 and all(action.type is cli.file_path for action in actions)
    args = parsers[0].parse_args(["--exp_dir=~/runs é", "--data_root", "$SCRATCH/${SCRATCH}"])
    assert (args.exp_dir, args.data_root) == (f"{tmp_path}/home/runs é", "/scratch dir//scratch dir")
    (tmp_path / "a$SCRATCH").touch()
    assert cli.file_path("a$SCRATCH") == "a$SCRATCH"


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["", "<&- >&- 2>&-", "| true", ">/dev/full 2>&1"])
def test_foreign_backends_locales_and_streams_end_nothing(tmp_path, redirect):
    """A notebook's backend that is not installed, no home, ASCII as the locale's encoding, closed and full streams."""
    environment = {"MPLBACKEND": "module://not_installed.backend", "HOME": "/nonexistent", "DISPLAY": "", "LC_ALL": "C",
                   "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    folder = f"{tmp_path}/runs é"
    data = "--features cached --dataset shapes --train_size 128 --test_size 100 --pretrained"
    for words in (["main.py", *STARTS], ["main_lincls.py", data, f"'{folder}/1/backbone.pt'"]):
        command = f"{sys.executable} {' '.join(words)} --exp_dir '{folder}' {redirect}"
        done = subprocess.run(command, shell=True, cwd=REPO, env=CPU_ONLY | environment, capture_output=True)
        assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert not redirect or b"Exception ignored" not in done.stderr
    assert b"linear top-1" in done.stdout or redirect
    assert [record["epoch"] for record in log.read(f"{folder}/1")] == [1]
    assert "std of the l2-normalized outputs z, times √d" in open(f"{folder}/1/report.html", encoding="utf-8").read()
    assert {"loss-plot.png", "top1-acc.png"} <= {*os.listdir(f"{folder}/1")}
    assert {"results.json", "confusion.png"} <= {*os.listdir(f"{folder}/2")}


@pytest.mark.slow
def test_nothing_that_only_unix_has_is_needed(tmp_path):
    """A small training, resumed and evaluated, without fcntl, os.O_DIRECTORY, fork, and Unix's signals."""
    code = textwrap.dedent(f"""
        import os, signal, sys
        import torch, torchvision, matplotlib.figure, tqdm  # what they need is not the question
        for module in ("fcntl", "resource", "termios", "pwd", "grp", "pty"):
            sys.modules[module] = None
        for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL", "SIGCHLD", "SIGPIPE", "alarm", "setitimer"):
            delattr(signal, name)
        for name in ("O_DIRECTORY", "fork", "forkpty", "killpg", "getuid", "geteuid", "setsid", "sched_getaffinity"):
            delattr(os, name)
        import ablate, export, main, main_lincls, visualize
        for words in {[STARTS + ["--max_minutes", "0"], ["--resume", "auto"]]}:
            assert not main.main([*words, "--exp_dir", "runs"])
        data = "--dataset shapes --train_size 128 --test_size 100".split()
        assert not main_lincls.main([*data, *"--pretrained runs/1/backbone.pt --epochs 1 --exp_dir linear".split()])
        assert not ablate.main(["default", *data, *"--width 4 --epochs 1 --batch_size 32 --exp_dir study".split()])
        assert not visualize.main(["--pretrained", "runs/1"])
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=CPU_ONLY | {"PYTHONPATH": str(REPO)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["epoch"] for record in log.read(str(tmp_path / "runs" / "1"))] == [1]
    assert {"results.json", "confusion.png"} <= {*os.listdir(tmp_path / "linear" / "1")}


@pytest.mark.slow
def test_the_slurm_script_requeues_itself_until_the_run_is_finished(tmp_path):
    """The README's script with stand-ins for srun and scontrol; SIGUSR1 reaches the running script."""
    script = re.search(r"```\n(#!/bin/bash\n.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    options = " ".join([*SMALL, "--epochs 40 --eval_freq 40 --exp_dir", str(tmp_path / "runs")])
    (tmp_path / "job.sh").write_text(re.sub(r"--data_root \S+", options, script))
    stand_ins = {"srun": f'#!/bin/bash\n"$@" & echo $! > {tmp_path}/pid; wait $!',
                 "scontrol": f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued',
                 "python": f'#!/bin/bash\nexec {sys.executable} "$@"'}
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = CPU_ONLY | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHONUNBUFFERED": "1"}
    command, codes = ["bash", tmp_path / "job.sh"], []
    for first in (True, False):
        job = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
        if first:
            assert any(line.startswith("epoch ") for line in job.stdout)  # as soon as one is done
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
        assert ("Interrupted" in job.communicate()[0]) == first
        codes.append(job.returncode)
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert codes == [128 + signal.SIGUSR1, 0] and len(log.read(str(next((tmp_path / "runs").iterdir())))) == 40
