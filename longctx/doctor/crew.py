"""Checks that need several processes: do they agree, see one folder, and how fast are they."""

import secrets
import socket
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from longctx.doctor.findings import Finding
from longctx.doctor.storage import nearest_folder
from longctx.doctor.versions import versions_here
from longctx.parallel.links import CollectiveTime, LinkTime, Peers
from longctx.parallel.mesh import is_first_here

GROUP = "processes"
ALL_PAIRS = 8
"""Processes up to which every pair is measured."""
MOST_PAIRS = 128
"""Within hosts, and between them: each takes about a second over NCCL."""
MUST_AGREE = ("python", "longctx", "torch", "cuda", "nccl", "triton")
MOST_SKEW = 1.0
SLOW_SHARE = 0.8
SLOW_LINK = 0.5
SEEN_SECONDS = 10.0
POLL_SECONDS = 0.005

Links = dict[tuple[int, int], LinkTime]


class Facts(NamedTuple):
    """What a process says of itself."""

    host: str
    versions: dict[str, str]
    device: str
    """What it computes on."""
    findings: list[Finding]
    """Of its host, if it speaks for that."""


class Crew(NamedTuple):
    """What was found of all processes."""

    findings: list[Finding]
    hosts: list[str]
    """By rank."""
    tiers: dict[str, LinkTime]
    """Medians by tier: node and fabric."""


def examine(
    peers: Peers, local: Sequence[Finding], folder: Path, products: Callable[[], float]
) -> Crew:
    """Every process calls it, with what was found on its host, and what finds its FLOP/s in matrix
    products while all others do the same; all get the same findings."""
    facts = Facts(socket.gethostname(), versions_here(), peers.device.type, list(local))
    crew: list[Facts] = peers.gather(facts._replace(findings=facts.findings * is_first_here()))
    hosts = [facts.host for facts in crew]
    found = _by_host(crew)
    count = len(set(hosts))
    told = f"{peers.size} processes on {count} host{'s' * (count > 1)}"
    found += [Finding("ok", told, "they met"), *agreement(crew)]
    found += see_one_folder(peers, folder)
    if apart := devices_differ(crew):
        return Crew([f._replace(group=f.group or GROUP) for f in [*found, *apart]], hosts, {})
    stages: dict[str, Callable[[], Any]] = {
        "matrix products": products,
        "clocks": peers.clocks,
        "links": lambda: peers.links(pairs_of(hosts)),
        "collectives": peers.collectives,
    }
    results: dict[str, list[Any]] = {}
    for name, work in stages.items():
        results[name], errors = peers.together(work)
        if errors:
            found.append(Finding("problem", f"measuring {name}", f"failed: {errors[0]}"))
            return Crew([f._replace(group=f.group or GROUP) for f in found], hosts, {})
    found += stragglers(results["matrix products"], hosts)
    links: Links = {pair: link for own in results["links"] for pair, link in own.items()}
    found += clocks(results["clocks"][0], hosts)
    tiers, of_links = tiers_of(links, hosts)
    found += [*of_links, *collectives(results["collectives"])]
    return Crew([f._replace(group=f.group or GROUP) for f in found], hosts, tiers)


def _by_host(crew: Sequence[Facts]) -> list[Finding]:
    """Each finding once, with its hosts if others do not have it."""
    firsts = [facts for facts in crew if facts.findings]
    with_it: dict[Finding, list[str]] = {}
    for facts in firsts:
        for finding in facts.findings:
            with_it.setdefault(finding, []).append(facts.host)
    groups = list(dict.fromkeys(finding.group for finding in with_it))
    return [
        finding
        if len(hosts) == len(firsts)
        else finding._replace(found=f"{', '.join(hosts)}: {finding.found}")
        for finding, hosts in sorted(with_it.items(), key=lambda item: groups.index(item[0].group))
    ]


def agreement(crew: Sequence[Facts]) -> list[Finding]:
    """Whether all processes have the same versions."""
    found = []
    for name in dict.fromkeys(name for facts in crew for name in facts.versions):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(crew):
            ranks.setdefault(facts.versions.get(name, "missing"), []).append(rank)
        if len(ranks) > 1:
            told = ", ".join(f"{have} on rank {own[0]}" for have, own in ranks.items())
            level = "problem" if name in MUST_AGREE else "warning"
            found.append(Finding(level, f"{name} differs", f"{told}; install one everywhere"))
    return found or [Finding("ok", "versions are equal on all ranks", "they can work together")]


def devices_differ(crew: Sequence[Facts]) -> list[Finding]:
    """A process without a GPU among others that have one; they cannot pass messages."""
    kinds = [facts.device for facts in crew]
    if len(set(kinds)) == 1:
        return []
    rank = kinds.index("cpu")
    meaning = f"rank {rank} on {crew[rank].host} has none that it could use: no message was tried"
    return [Finding("problem", "GPUs on some ranks only", meaning)]


def stragglers(rates: Sequence[float], hosts: Sequence[str]) -> list[Finding]:
    """Whether one process computes more slowly than the others."""
    usual = median(rates)
    slowest = min(range(len(rates)), key=rates.__getitem__)
    share = rates[slowest] / usual
    found = f"matrix products at {usual / 1e9:.0f} GFLOP/s, rank {slowest} at {share:.0%} of that"
    if share < SLOW_SHARE:
        return [Finding("warning", found, f"all wait for it, on {hosts[slowest]}")]
    return [Finding("ok", found, "nobody holds up the others")]


def see_one_folder(peers: Peers, folder: Path) -> list[Finding]:
    """Whether what one process writes is seen by all, and after how long."""
    token = peers.gather(secrets.token_hex(8))[0]
    names = [f".doctor-{token}-{rank}" for rank in range(peers.size)]

    def files() -> list[Path]:
        return [nearest_folder(folder) / name for name in names]

    _, errors = peers.together(lambda: files()[peers.rank].write_text(token))
    seconds, _ = peers.together(lambda: _seconds_until(files(), token))
    _, _ = peers.together(lambda: files()[peers.rank].unlink(missing_ok=True))
    if errors:
        return [Finding("problem", f"{folder} cannot be written by all", errors[0])]
    blind = [rank for rank, waited in enumerate(seconds) if waited is None]
    if blind:
        meaning = f"rank {blind[0]} does not see what others write: set run.dir to a shared folder"
        return [Finding("problem", f"{folder} is not shared", meaning)]
    return [Finding("ok", f"{folder} is shared", f"files are seen after {max(seconds):.3f} s")]


def _seconds_until(files: Sequence[Path], content: str) -> float | None:
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < SEEN_SECONDS:
        if all(_holds(file, content) for file in files):
            return waited
        time.sleep(POLL_SECONDS)
    return None


def _holds(file: Path, content: str) -> bool:
    try:
        return file.read_text() == content
    except OSError:
        return False


def clocks(ahead: Sequence[float], hosts: Sequence[str]) -> list[Finding]:
    """Whether the hosts agree on the time."""
    rank = max(range(len(ahead)), key=lambda r: abs(ahead[r]))
    if abs(ahead[rank]) > MOST_SKEW:
        meaning = "times in logs do not compare; start a time service"
        told = f"the clock of {hosts[rank]} is {ahead[rank]:.1f} s off"
        return [Finding("warning", told, meaning)]
    return [Finding("ok", f"clocks differ by {abs(ahead[rank]):.4f} s", "times in logs compare")]


def pairs_of(hosts: Sequence[str]) -> list[tuple[int, int]]:
    """All pairs of a few ranks; of many, neighbours, also within a host, and the first ranks of
    hosts, of which MOST_PAIRS of either kind are taken."""
    if len(hosts) <= ALL_PAIRS:
        return list(combinations(range(len(hosts)), 2))
    ranks = range(len(hosts))
    own = {host: [rank for rank in ranks if hosts[rank] == host] for host in dict.fromkeys(hosts)}
    firsts = [each[0] for each in own.values()]
    within = {pair for each in own.values() for pair in zip(each, each[1:])}
    pairs = sorted({*zip(ranks, ranks[1:]), (0, ranks[-1]), *zip(firsts, firsts[1:]), *within})
    tiers = ([(a, b) for a, b in pairs if (hosts[a] == hosts[b]) == near] for near in (True, False))
    return sorted(pair for tier in tiers for pair in tier[:: -(-len(tier) // MOST_PAIRS) or 1])


def tiers_of(links: Links, hosts: Sequence[str]) -> tuple[dict[str, LinkTime], list[Finding]]:
    """Medians within nodes and between them, and the slowest pair of each."""
    tiers, found = {}, []
    for tier, within in (("node", True), ("fabric", False)):
        own = {p: link for p, link in links.items() if (hosts[p[0]] == hosts[p[1]]) == within}
        if not own:
            continue
        usual = LinkTime(
            median(link.latency for link in own.values()),
            median(link.bandwidth for link in own.values()),
        )
        tiers[tier] = usual
        pair, slowest = min(own.items(), key=lambda item: item[1].bandwidth)
        share = slowest.bandwidth / usual.bandwidth
        where = "within a node" if within else "between nodes"
        told = f"{where} {usual.latency * 1e6:.0f} us, {usual.bandwidth / 1e9:.2f} GB/s"
        meaning = f"slowest ranks {pair[0]} and {pair[1]}, {slowest.bandwidth / 1e9:.2f} GB/s"
        found.append(Finding("warning" if share < SLOW_LINK else "ok", told, meaning))
    return tiers, found


def collectives(times: Sequence[Sequence[CollectiveTime]]) -> list[Finding]:
    """Of the slowest rank, a line a verb."""
    found, slowest = [], [max(same, key=lambda t: t.seconds) for same in zip(*times)]
    for verb in dict.fromkeys(each.verb for each in slowest):
        rates = [
            f"{each.bandwidth / 1e9:.2f} GB/s at {each.size / 2**20:g} MiB"
            for each in slowest
            if each.verb == verb
        ]
        found.append(Finding("ok", verb, ", ".join(rates)))
    return found
