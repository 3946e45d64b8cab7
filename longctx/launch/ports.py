"""A port at which the processes of one machine meet."""

import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST, HIGHEST = 10000, 65535
TRIES = 100


def free_port() -> int:
    """A port that nobody listens on, nor is given by chance until its own process listens there.

    It lies outside of the ports of which the kernel hands out any to whoever names none, as do all
    gloo groups: others would take a stranger's for that of their first process, and wait.
    """
    first, last = map(int, RANGE.read_text().split()) if RANGE.exists() else (HIGHEST + 1, 0)
    apart = [port for port in range(LOWEST, HIGHEST + 1) if not first <= port <= last]
    tries = random.SystemRandom().sample(apart, min(TRIES, len(apart)))
    for port in [*tries, 0]:
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return tried.getsockname()[1]
    raise AssertionError("the kernel has a port left")


if __name__ == "__main__":
    print(free_port())
