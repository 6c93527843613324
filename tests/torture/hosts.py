"""Two hosts that are network namespaces of this one: joined by torchrun, cut off, and let back in.

    host 0 (10.77.N.1) --- switch --- host 1 (10.77.N.2)

Cutting a host off takes its port out of the switch's bridge: as with a cable pulled further away, packets vanish and
nobody is told. Linux, iproute2 and root.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mae_et.tracking import read_metrics
from tests.torture.runs import Kind, Skipped, chance_of, rows_written, wait_until, whole_run

REPOSITORY = Path(__file__).resolve().parents[2]
PORT = 29_500  # each pair of namespaces has all ports to itself

TIMEOUT = 6.0  # seconds that ranks wait for each other
# Rendezvous settings that find a dead host within seconds; docs/launching.md has those for real networks.
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2,read_timeout=5,close_timeout=5"
CHANGES = ("engine.precision=fp32", f"engine.timeout_minutes={TIMEOUT / 60}", "saving.steps=10")
KIND = Kind("hosts", (*CHANGES, "epochs=20"))

_numbers = itertools.count()


def why_not() -> str | None:
    """Why there can be no namespaces here, None where there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` of iproute2"
    with contextlib.suppress(subprocess.CalledProcessError), namespaces(1):
        return None
    return "the kernel or the container lets nobody make network namespaces with a bridge"


def ip(*words: str) -> str:
    """Run `ip`, and return what it prints."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@dataclass
class Network:
    """Namespaces joined by a switch; host i has address `addresses[i]`."""

    name: str
    subnet: str
    count: int

    @property
    def switch(self) -> str:
        return f"{self.name}-switch"

    @property
    def addresses(self) -> list[str]:
        return [f"{self.subnet}.{host + 1}" for host in range(self.count)]

    def host(self, number: int) -> str:
        """Name of a host's namespace."""
        return f"{self.name}-{number}"

    def make(self) -> None:
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, address in enumerate(self.addresses):
            host, port = self.host(number), f"port{number}"
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
            # How often TCP repeats what nobody acknowledges: 5 times are 13 s, Linux's 15 times a quarter of an hour.
            ip("netns", "exec", host, "sysctl", "-q", "net.ipv4.tcp_retries2=5")
            ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("-n", self.switch, "link", "set", port, "up", "master", "bridge")
            ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")

    def remove(self) -> None:
        """Remove all of it, and whatever still runs within; also what was made by half."""
        for name in (*(self.host(number) for number in range(self.count)), self.switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in ip("netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                ip("netns", "delete", name)

    def cut(self, number: int) -> None:
        """Packets from and to a host vanish."""
        ip("-n", self.switch, "link", "set", f"port{number}", "nomaster")

    def mend(self, number: int) -> None:
        """They arrive again."""
        ip("-n", self.switch, "link", "set", f"port{number}", "master", "bridge")

    def processes(self, number: int) -> list[int]:
        """Ids of the living processes of a host."""
        return [int(pid) for pid in ip("netns", "pids", self.host(number)).split()]


@contextmanager
def namespaces(count: int = 2) -> Iterator[Network]:
    """A network that is gone after the block, however it ends."""
    number = next(_numbers)
    # Addresses may repeat: networks of other processes are worlds of their own.
    network = Network(f"mae-et-{os.getpid()}-{number}", f"10.77.{number % 250}", count)
    try:
        network.make()
        yield network
    finally:
        network.remove()


@dataclass
class Agent:
    """torchrun on a host, its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")


def launch(
    network: Network,
    host: int,
    lines: Sequence[str],
    log: Path,
    nodes: str = "2",
    restarts: int = 0,
    conf: str = QUICK,
    rendezvous: int = 0,
) -> Agent:
    """Start torchrun on a host, with one rank.

    Args:
        network, host: where.
        lines: arguments of pretrain.py.
        log: file of its output.
        nodes, restarts, conf: of torchrun.
        rendezvous: the host that holds the rendezvous. torchrun compares names to find out whether that is itself, and
            namespaces share theirs, so it is told.
    """
    options = [
        *(f"--nnodes={nodes}", "--nproc-per-node=1", f"--max-restarts={restarts}", "--rdzv-backend=c10d"),
        f"--rdzv-endpoint={network.addresses[rendezvous]}:{PORT}",
        f"--rdzv-conf=is_host={int(host == rendezvous)},{conf}",
        *(f"--local-addr={network.addresses[host]}", "--rdzv-id=torture", "--monitor-interval=0.1"),
    ]
    line = ["ip", "netns", "exec", network.host(host), sys.executable, "-m", "torch.distributed.run", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/launching.md
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*line, "pretrain.py", *lines], cwd=REPOSITORY, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    return Agent(process, log)


def losses(run: Path) -> list[float]:
    """One per step, as long as nothing was lost or repeated."""
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "steps are missing, or there twice"
    return [row["train/loss"] for row in rows]


def check_losses(run: Path, reference: Sequence[float]) -> None:
    """The run is complete, with the losses of one process.

    Raises:
        AssertionError: naming the first step that differs.
    """
    ours = losses(run)
    assert len(ours) == len(reference), f"{len(ours)} steps instead of {len(reference)}"
    for step, (mine, theirs) in enumerate(zip(ours, reference), 1):
        # Another order of fp32 sums; measured below 1e-6 over 300 steps of these runs.
        assert abs(mine - theirs) <= 1e-5 * abs(theirs), f"step {step}: loss {mine} instead of {theirs}"
    assert json.loads((run / "status.json").read_text())["state"] == "complete"


def wait_for_row(run: Path, rows: int, agents: Sequence[Agent]) -> None:
    """Until the run has logged so many steps.

    Raises:
        AssertionError: with what torchrun said, when it ended before that or took too long.
    """
    wait_until(
        lambda: rows_written(run) >= rows or any(agent.process.poll() is not None for agent in agents), 90, "no step"
    )
    ended = [agent for agent in agents if agent.process.poll() is not None]
    assert rows_written(run) >= rows, f"ended before step {rows}: {[agent.said[-2000:] for agent in ended]}"


@dataclass
class CutOff:
    """What came of a job of two hosts, one of which was cut off.

    Attributes:
        ranks_gone, agent_gone: seconds from the cut until the lost host had no rank, and nothing at all, any more.
        survivor_code, lost_code: of torchrun.
        said: by torchrun and the run on the host that survived.
    """

    ranks_gone: float
    agent_gone: float
    survivor_code: int
    lost_code: int
    said: str


def cut_off(network: Network, lines: Sequence[str], run: Path, logs: Path, step: int, keeper: int = 0) -> CutOff:
    """Start a run on two hosts and cut the line at a step; the host that keeps the rendezvous goes on to the end."""
    lost = 1 - keeper
    agents = [
        launch(network, host, lines, logs / f"host{host}.log", "1:2", restarts=3, rendezvous=keeper) for host in (0, 1)
    ]
    wait_for_row(run, step, agents)
    network.cut(lost)
    began = time.monotonic()
    wait_until(lambda: len(network.processes(lost)) <= 1, 60, "the rank that was cut off lives")
    ranks_gone = time.monotonic() - began
    wait_until(lambda: not network.processes(lost), 90, "torchrun on the host that was cut off lives")
    agent_gone = time.monotonic() - began
    survivor, other = agents[keeper], agents[lost]
    code = survivor.process.wait(120)
    assert not network.processes(keeper), "something on the surviving host lives on"
    return CutOff(ranks_gone, agent_gone, code, other.process.wait(10), survivor.said)


def check_cut_off(found: CutOff, run: Path, reference: Sequence[float]) -> None:
    """The survivor finished what both had begun, and nothing lives on for long."""
    assert found.survivor_code == 0, found.said[-2000:]
    assert "2 x cpu" not in found.said.split("resuming from")[-1], "both ranks finished; nobody was cut off"
    assert "resuming from" in found.said
    assert found.lost_code != 0
    assert found.ranks_gone < TIMEOUT + 20
    assert found.agent_gone < TIMEOUT + 60
    check_losses(run, reference)


def _reference(folder: Path) -> list[float]:
    reason = why_not()
    if reason is not None:
        raise Skipped(reason)
    return losses(whole_run(KIND, folder).run)


def two_hosts(folder: Path, seed: int) -> None:
    """A run on two hosts is the run of one process."""
    reference, run = _reference(folder), folder / "run"
    with namespaces() as network:
        lines = KIND.lines(folder, run)
        agents = [launch(network, host, lines, folder / f"host{host}.log", rendezvous=seed % 2) for host in (0, 1)]
        for agent in agents:
            assert agent.process.wait(120) == 0, agent.said[-2000:]
        assert "2 x cpu" in agents[0].said + agents[1].said
    check_losses(run, reference)


def host_cut_off(folder: Path, seed: int) -> None:
    """At any step one host is cut off, with the main rank or without: the other goes on alone from what was saved."""
    reference, run = _reference(folder), folder / "run"
    step = chance_of("host_cut_off", seed).randrange(11, len(reference) // 2)
    with namespaces() as network:
        found = cut_off(network, KIND.lines(folder, run), run, folder, step, keeper=seed % 2)
    check_cut_off(found, run, reference)


def host_comes_back(folder: Path, seed: int) -> None:
    """A host is cut off, ends, and is started again when the line is back: it joins the run that went on without it."""
    chance, run = chance_of("host_comes_back", seed), folder / "run"
    kind = Kind("hosts_long", (*CHANGES, "epochs=60"))
    _reference(folder)
    reference = losses(whole_run(kind, folder).run)
    with namespaces() as network:
        lines = kind.lines(folder, run)
        agents = [launch(network, host, lines, folder / f"host{host}.log", "1:2", restarts=3) for host in (0, 1)]
        wait_for_row(run, chance.randrange(11, 60), agents)
        network.cut(1)
        wait_until(lambda: not network.processes(1), 90, "torchrun on the host that was cut off lives")
        network.mend(1)
        agents[1] = launch(network, 1, lines, folder / "host1-again.log", "1:2", restarts=3)
        for agent in agents:
            assert agent.process.wait(240) == 0, agent.said[-2000:]
        starts = [line for line in agents[0].said.splitlines() if " x cpu" in line]
        # Where it is back before the other one has given up waiting, that one never runs alone.
        assert ["2 x" in line for line in starts] in ([True, False, True], [True, True]), starts
    check_losses(run, reference)


def rendezvous_lost(folder: Path, seed: int) -> None:
    """The host that keeps the rendezvous vanishes: the other ends with an error, and another start finishes."""
    reference, run = _reference(folder), folder / "run"
    step = chance_of("rendezvous_lost", seed).randrange(11, len(reference) // 2)
    with namespaces() as network:
        lines = KIND.lines(folder, run)
        agents = [launch(network, host, lines, folder / f"host{host}.log", "1:2", restarts=3) for host in (0, 1)]
        wait_for_row(run, step, agents)
        network.cut(0)
        for pid in network.processes(0):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not network.processes(1), 90, "torchrun on the other host lives")
        assert agents[1].process.wait(10) != 0
        again = launch(network, 1, lines, folder / "again.log", "1", rendezvous=1)
        assert again.process.wait(120) == 0, again.said[-2000:]
        assert "resuming from" in again.said
    check_losses(run, reference)


TRIALS = {
    "two_hosts": two_hosts,
    "host_cut_off": host_cut_off,
    "host_comes_back": host_comes_back,
    "rendezvous_lost": rendezvous_lost,
}
