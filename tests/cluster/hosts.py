"""Two hosts on one machine: network namespaces joined by a cable whose speed can be set."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
ROOT = Path(__file__).parents[2]


def missing() -> str:
    """What this machine lacks for two hosts; empty if nothing."""
    if os.geteuid():
        return "two hosts need root, to make network namespaces"
    tools = [name for name in ("ip", "tc") if not shutil.which(name)]
    return f"two hosts need {' and '.join(tools)} (Debian: iproute2)" if tools else ""


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


class TwoHosts:
    """A context in which commands can be run on host 0 and host 1."""

    def __init__(self) -> None:
        self._names = [f"lc{os.getpid()}h{i}" for i in range(2)]
        self._cables = [f"lc{os.getpid() % 10**6}c{i}" for i in range(2)]

    def __enter__(self) -> "TwoHosts":
        for name in self._names:
            _run("ip", "netns", "add", name)
        left, right = self._cables
        _run("ip", "link", "add", left, "type", "veth", "peer", "name", right)
        for name, cable, address in zip(self._names, self._cables, ADDRESSES):
            _run("ip", "link", "set", cable, "netns", name)
            inside = ("ip", "-n", name)
            _run(*inside, "addr", "add", f"{address}/24", "dev", cable)
            _run(*inside, "link", "set", cable, "up")
            _run(*inside, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def limit(self, megabits: int) -> None:
        """Sets the speed of the cable, in each direction."""
        for name, cable in zip(self._names, self._cables):
            rate = ("rate", f"{megabits}mbit", "burst", "64kb", "latency", "2s")
            _run("tc", "-n", name, "qdisc", "replace", "dev", cable, "root", "tbf", *rate)

    def launch(
        self, per_host: int, port: int, module: str, *arguments: str
    ) -> list[subprocess.Popen[str]]:
        """Starts `python -m module` on `per_host` processes of each host, through torchrun."""
        return [self._start(host, per_host, port, (module, *arguments)) for host in range(2)]

    def torchrun(self, per_host: int, port: int, *words: str) -> list[subprocess.Popen[str]]:
        """Runs launch/torchrun.sh with these words on both hosts."""
        shape = {"NNODES": "2", "NPROC_PER_NODE": str(per_host), "OMP_NUM_THREADS": "1"}
        meeting = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port), "PATIENCE": "60"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        started = []
        for host, (name, cable, address) in enumerate(zip(self._names, self._cables, ADDRESSES)):
            own = {"NODE_RANK": str(host), "LOCAL_ADDR": address, "GLOO_SOCKET_IFNAME": cable}
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, "launch/torchrun.sh", *words],
                env=os.environ | shape | meeting | own | {"PATH": path},
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            started.append(process)
        return started

    def cut(self, seconds: float) -> None:
        """Pulls the cable out for so long."""
        first = ("ip", "-n", self._names[0], "link", "set", self._cables[0])
        _run(*first, "down")
        time.sleep(seconds)
        _run(*first, "up")

    def _start(
        self, host: int, per_host: int, port: int, program: tuple[str, ...]
    ) -> subprocess.Popen[str]:
        torchrun = (sys.executable, "-m", "torch.distributed.run")
        shape = ("--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", str(per_host))
        master = ("--master-addr", ADDRESSES[0], "--master-port", str(port))
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[host], *torchrun, *shape, *master, "-m", *program],
            env=os.environ | {"GLOO_SOCKET_IFNAME": self._cables[host], "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
