"""Many epochs of a tiny run: memory, open files and the time of an epoch stay flat. SOAK=400 in the environment sets their number."""
import os
import statistics
import sys

import pytest

import children
from utils import log

EPOCHS = int(os.environ.get("SOAK", 40))


def note_resources():
    """Have each log line note the process's resident MiB and open files."""
    usual = log.append

    def append(folder, record):
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        usual(folder, {**record, "resident": resident, "files": len(os.listdir("/proc/self/fd"))})

    log.append = append


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_many_epochs_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    argv = (
        "--dataset shapes --train_size 64 --test_size 50 --width 4 --dim 32 --pred_dim 16 --batch_size 32 --no-compile "
        f"--epochs {EPOCHS} --eval_freq 2 --save_freq 4 --trial soak --exp_dir"
    ).split()
    process = children.start([*argv, tmp_path], tmp_path / "output.txt", (note_resources, ()))
    assert children.finish(process, 3600) == 0
    with open(tmp_path / "soak" / "log.jsonl") as file:
        assert len(file.readlines()) == EPOCHS
    records = log.read(str(tmp_path / "soak"))
    early, late = records[EPOCHS // 4: EPOCHS // 2], records[-EPOCHS // 4:]
    middle = {
        key: [statistics.median(record[key] for record in part) for part in (early, late)] for key in ("resident", "files", "seconds")
    }
    print(middle)
    assert middle["resident"][1] - middle["resident"][0] < 20
    assert middle["files"][1] == middle["files"][0]
    assert middle["seconds"][1] < 2 * middle["seconds"][0]
