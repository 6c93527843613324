"""Children end with their parents, however both were started."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest

from mae_et.data.parents import when_parent_dies

PARENT = """
import multiprocessing, signal, sys, time
from mae_et.data.parents import when_parent_dies

def child(pipe):
    when_parent_dies(signal.SIGKILL)
    pipe.send(multiprocessing.current_process().pid)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ours, theirs = context.Pipe()
    context.Process(target=child, args=(theirs,)).start()
    print(ours.recv(), flush=True)
    time.sleep(60)
"""


def lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_lives_as_long_as_its_parent_and_no_longer(tmp_path, repository, method):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin"}
    parent = subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert lives(pid), "it took its parent for dead"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_without_a_parent_of_its_kind_goes_on():
    assert multiprocessing.parent_process() is None
    code = (
        f"import signal; from {when_parent_dies.__module__} import *; when_parent_dies(signal.SIGTERM); print('here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "here\n"
