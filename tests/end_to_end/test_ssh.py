"""launch/ssh.sh, with an `ssh` that runs its command here and a torchrun that does as it is told."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.launched import REPOSITORY

# Options, the host, the command; sshd gives it to the login shell as one line.
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift 2; done
shift
exec sh -c "$*"
"""

# Takes the place of `python -m torch.distributed.run`: notes its arguments, and ends when told to, or by itself.
TORCHRUN = """#!/usr/bin/env bash
for argument; do
    case $argument in --local-addr=*) host=${argument#*=} ;; esac
done
printf '%s\\n' "$@" >"$host.arguments"
printf '%s\\n' "$NCCL_DEBUG $TORCH_DISABLE_SHARE_RDZV_TCP_STORE" >"$host.environment"
echo "$$" >"$host.pid"
trap 'echo TERM >>"$host.signals"; [[ -e stubborn ]] || exit 1' TERM
trap 'echo INT >>"$host.signals"' INT
while [[ ! -e $host.end ]]; do sleep 0.05; done
exit "$(cat "$host.end")"
"""

HOSTS = ("one", "two.example.org")


@pytest.fixture
def room(tmp_path) -> Path:
    """What every "host" has as its checkout; its name needs quoting."""
    folder = tmp_path / "check out's"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("torch run", TORCHRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def launch(room: Path, *arguments: str) -> subprocess.Popen[str]:
    """The script as a terminal starts it: in a process group of its own."""
    place = {"FOLDER": str(room), "PYTHON": "./torch run", "RANKS": "2", "PATH": f"{room}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [str(REPOSITORY / "launch" / "ssh.sh"), "me@one", HOSTS[1], "--", *arguments],
        env={**os.environ, **place, "NCCL_DEBUG": "a b"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A terminal's child hears Ctrl-C; where the tests run in the background, theirs would inherit not to.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def started(room: Path) -> list[int]:
    """Ids of both hosts' torchrun."""
    pids = [room / f"{host}.pid" for host in HOSTS]
    until(lambda: all(path.exists() and path.read_text().strip() for path in pids))
    return [int(path.read_text()) for path in pids]


def gone(pids: list[int]) -> None:
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_every_host_gets_the_command_as_it_was_written(room):
    awkward = ["pretrain.py", "--config", "my recipe.yaml", 'run=it\'s $HOME "here"', "a=[1, 2]", "*", "ü\n;x"]
    process = launch(room, *awkward)
    pids = started(room)
    for number, host in enumerate(HOSTS):
        (*options, last) = (room / f"{host}.arguments").read_text().split("pretrain.py\n", 1)
        assert "pretrain.py\n" + last == "\n".join(awkward) + "\n"
        options = options[0].split()
        assert options[:2] == ["-m", "torch.distributed.run"]
        assert "--nnodes=2" in options
        assert "--nproc-per-node=2" in options
        assert "--rdzv-endpoint=one:29500" in options
        assert f"--rdzv-conf=is_host={1 - number}" in options
        assert (room / f"{host}.environment").read_text() == "a b 1\n"
        (room / f"{host}.end").write_text("0")
    assert process.communicate(timeout=20) == ("", None)
    assert process.returncode == 0
    gone(pids)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_hosts_by_sigterm_and_waits_for_them(room, number, code):
    """Ctrl-C goes to the whole process group of a terminal."""
    process = launch(room, "pretrain.py")
    pids = started(room)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert "saving on me@one" in process.communicate(timeout=20)[0]
    assert process.returncode == code
    gone(pids)
    assert [(room / f"{host}.signals").read_text() for host in HOSTS] == ["TERM\n"] * 2


def test_a_host_that_fails_ends_the_others_and_its_code_counts(room):
    process = launch(room, "pretrain.py")
    pids = started(room)
    (room / f"{HOSTS[1]}.end").write_text("7")
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 7
    assert f"{HOSTS[1]} ended with 7; ending the others" in output
    assert (room / "one.signals").read_text() == "TERM\n"
    gone(pids)


def test_hosts_end_with_a_script_that_is_killed(room):
    process = launch(room, "pretrain.py")
    pids = started(room)
    process.kill()
    process.communicate()
    gone(pids)
    assert [(room / f"{host}.signals").read_text() for host in HOSTS] == ["TERM\n"] * 2


def test_a_second_signal_gives_up_at_once(room):
    (room / "stubborn").touch()
    process = launch(room, "pretrain.py")
    pids = started(room)
    process.send_signal(signal.SIGINT)
    until(lambda: all((room / f"{host}.signals").exists() for host in HOSTS))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_without_hosts_or_a_command_it_says_how_to_call_it(room):
    for line in (["--", "pretrain.py"], ["one", "--"], ["one"]):
        done = subprocess.run(
            [str(REPOSITORY / "launch" / "ssh.sh"), *line], capture_output=True, text=True, check=False, timeout=10
        )
        assert done.returncode == 2
        assert "launch/ssh.sh HOST1 HOST2" in done.stderr
