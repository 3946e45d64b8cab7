"""Plans 1M, 4M and 16M tokens on 64 to 4096 GPUs, and shows where one transport overtakes another.

    python docs/results/plan_long.py [--picture docs/results/plan-long.png]

Prints the tables of plan-long.md. Everything is computed from a cluster's file; no GPU is needed.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from longctx.config import decode
from longctx.errors import InputError
from longctx.parallel.config import SCAN_PAYS_FROM
from longctx.plan.choices import Changes, joined, policies
from longctx.plan.clusters import GIB, ClusterConfig, LinkConfig, load_cluster
from longctx.plan.costs import step_time
from longctx.plan.exchange_time import chained, gathered, group_of
from longctx.plan.search import Candidate, Search
from longctx.plan.workload import workload
from longctx.sequence.ledger import Traffic
from longctx.sequence.sharded import SCAN_BLOCKS
from longctx.train.settings import Settings, load_settings

CLUSTER = "8xh100"
PRESETS = ("7b", "1b-lasp2h")
VOCABULARY = 128256
LENGTHS = (2**20, 2**22, 2**24)
PROCESSES = (64, 256, 1024, 4096)
STEP_TOKENS = 2**25
"""Of all cells, so that more GPUs only make steps shorter."""
STATES = {"1 MiB (1b-lasp2h: 16 heads)": 2**20, "2 MiB (7b: 32 heads)": 2**21}
WAYS: dict[str, dict[str, Any]] = {
    "gather": {},
    "gather, a key head at a time": {"gather_heads": 1},
    "ring": {"stream": "ring"},
    "ulysses 8, then gather": {"heads": 8, "gather_heads": 1},
    "ulysses 8, then ring": {"heads": 8, "stream": "ring"},
}
COLOURS = ("#4269d0", "#9ecae9", "#efb118", "#6cc5b0", "#3ca951")
RANKS = tuple(2**n for n in range(3, 13))
TOKENS = tuple(2**n for n in range(9, 18))
ALIKE = 0.005
"""Ways that take so much longer than the fastest, or less, count as equally fast."""


# Plans


def searched(preset: str, length: int, processes: int, cluster: ClusterConfig) -> Search:
    """For the best way to run a cell."""
    settings = load_settings(preset)
    train = replace(settings.train, seq_len=length, batch_size=STEP_TOKENS // length, micro_batch=1)
    return Search(replace(settings, train=train), cluster, processes, VOCABULARY, "bf16")


def print_plans(cluster: ClusterConfig) -> None:
    """A row for each cell: the best way; then what other transports would make of it."""
    rows: list[str] = []
    for preset in PRESETS:
        print(f"\n### {preset}\n")
        print(
            "| tokens | GPUs | dp x sp x tp | placement | states | keys | heads | keeps |", end=""
        )
        print(" GiB | s | MFU | tokens/s | days for 1T |")
        print("|---|---:|---|---|---|---|---:|---|---:|---:|---:|---:|---:|")
        for length in LENGTHS:
            for processes in PROCESSES:
                search = searched(preset, length, processes, cluster)
                best = search.run()[0]
                print(described(length, processes, best), flush=True)
                named = f"| {preset} | {millions(length)} | {processes} |"
                rows.append(named + others(search, best))
    print("\n### Seconds of a step by transport\n")
    print("| preset | tokens | GPUs | states: allgather | scan | ulysses |", end="")
    print(" keys: gather | by heads | ring | ulysses, then gather | by heads | ring |")
    print("|---|---|---:" + "|---:" * 9 + "|")
    print("\n".join(rows))


def millions(length: int) -> str:
    return f"{length // 2**20}M"


def described(length: int, processes: int, best: Candidate) -> str:
    """The best way, as a row."""
    split, step, memory = best.work.split, best.time, best.work.settings.memory
    way = split.transports
    keeps = memory.checkpointing + f", tiles of {memory.mlp_tokens}" * bool(memory.mlp_tokens)
    if not best.fits:
        return f"| {millions(length)} | {processes} | nothing fits |" + " |" * 10
    return (
        f"| {millions(length)} | {processes} | {split.dp} x {split.sp} x {split.tp} "
        f"| {split.placement} | {way.prefix} | {way.stream} | {way.heads} | {keeps} "
        f"| {best.memory.device / GIB:.0f} | {step.total:.4g} | {step.mfu:.0%} "
        f"| {step.tokens_per_second:,.0f} | {step.cost(1e12).seconds / 86400:.3g} |"
    )


def others(search: Search, best: Candidate) -> str:
    """Seconds with each transport on the mesh of the best way, with whatever memory policy fits."""
    heads = max(8, best.work.split.transports.heads)
    prefixes = [{"parallel.prefix": name} for name in ("allgather", "scan", "ulysses")]
    streams = [
        {"parallel.heads": n, "parallel.stream": way, "parallel.gather_heads": chunk}
        for n in (1, heads)
        for way, chunk in (("allgather", 0), ("allgather", 1), ("ring", 0))
    ]
    found = [on_mesh(search, best, each) for each in (*prefixes, *streams)]
    return " " + " | ".join(found) + " |"


def on_mesh(search: Search, best: Candidate, transport: Changes) -> str:
    """The same way, but for a transport and what layers keep."""
    placed = joined(best.overrides, {"parallel.placement": "auto"}, transport)
    tokens = max(best.work.placement.lengths)
    ways = (joined(placed, policy) for policy in policies("cuda", tokens))
    fits = [way for way in map(search.candidate, ways) if way is not None and way.fits]
    return f"{min(way.time.total for way in fits):.4g}" if fits else "-"


# States


def state_seconds(cluster: ClusterConfig, ranks: int, size: float) -> dict[str, float]:
    """Of one exchange of one layer's states on neighbouring ranks, contiguous."""
    group = group_of(cluster, ranks, ranks, 1)
    hops = ranks - group.nodes, group.nodes - 1
    return {
        "allgather": gathered(group, Traffic(1, int((ranks - 1) * size))),
        "scan": chained(group, hops, 1, size, SCAN_BLOCKS),
        "serial": chained(group, hops, 1, size, 1),
    }


def crossing(cluster: ClusterConfig, size: float) -> int:
    """Ranks from which on a scan is always faster."""
    slower = [
        ranks
        for ranks in range(2, 1025)
        if (found := state_seconds(cluster, ranks, size))["scan"] >= found["allgather"]
    ]
    return max(slower, default=1) + 1


def assumptions(cluster: ClusterConfig) -> dict[str, ClusterConfig]:
    """The cluster, and others that differ in what was assumed of it."""
    node, fabric = cluster.links["node"], cluster.links["fabric"]

    def linked(inside: LinkConfig, across: LinkConfig) -> ClusterConfig:
        return replace(cluster, links=cluster.links | {"node": inside, "fabric": across})

    slow = (LinkConfig(4 * link.latency, link.bandwidth) for link in (node, fabric))
    half = (LinkConfig(link.latency, link.bandwidth / 2) for link in (node, fabric))
    return {
        "as in the file": cluster,
        "four times the latency": linked(*slow),
        "half the bandwidth": linked(*half),
        "no faster inside a node than between nodes": linked(fabric, fabric),
    }


def print_states(cluster: ClusterConfig) -> None:
    """Times and crossings of states."""
    print("\n### One exchange of states, milliseconds\n")
    print("| state | way |" + "".join(f" {ranks} |" for ranks in RANKS))
    print("|---|---" + "|---:" * len(RANKS) + "|")
    for name, size in STATES.items():
        for way in ("allgather", "scan", "serial"):
            found = [state_seconds(cluster, ranks, size)[way] for ranks in RANKS]
            print(f"| {name} | {way} |" + "".join(f" {1e3 * x:.3g} |" for x in found))
    print("\n### Ranks from which a scan is faster\n")
    print("| assumption |" + "".join(f" {name} |" for name in STATES))
    print("|---" + "|---:" * len(STATES) + "|")
    for name, other in assumptions(cluster).items():
        found = [crossing(other, size) for size in STATES.values()]
        print(f"| {name} |" + "".join(f" {ranks} |" for ranks in found))


# Keys


def ways_of_keys(
    preset: str, ranks: int, tokens: int, cluster: ClusterConfig
) -> dict[str, tuple[float, float]]:
    """Of one sequence, tokens a rank: seconds of a step, and those in which it waits for keys."""
    found = {}
    for name, parallel in WAYS.items():
        settings = one_period(load_settings(preset), ranks * tokens)
        parallel = replace(settings.parallel, sp=ranks, **parallel)
        memory = replace(settings.memory, checkpointing="keep", mlp_tokens=4096)
        settings = replace(settings, parallel=parallel, memory=memory)
        try:
            step = step_time(workload(settings, ranks, VOCABULARY, "bf16"), cluster)
        except InputError:
            continue
        waits = sum(step.exposed.get(verb, 0.0) for verb in ("stream", "heads"))
        found[name] = step.total - step.fixed, waits
    return found


def one_period(settings: Settings, length: int) -> Settings:
    """As deep as the pattern is long, with one sequence a step."""
    model = replace(settings.model, depth=len(settings.model.pattern))
    train = replace(settings.train, seq_len=length, batch_size=1, micro_batch=1)
    return replace(settings, model=model, train=train)


def fastest(found: dict[str, tuple[float, float]]) -> str:
    """The first of those that are about as fast as the fastest."""
    least = min(total for total, _ in found.values())
    return next(name for name, (total, _) in found.items() if total <= (1 + ALIKE) * least)


def print_keys(preset: str, cluster: ClusterConfig) -> np.ndarray:
    """The fastest way by ranks and tokens a rank, as numbers of WAYS."""
    names = list(WAYS)
    grid = np.array(
        [[names.index(fastest(ways_of_keys(preset, p, n, cluster))) for p in RANKS] for n in TOKENS]
    )
    print(f"\n### Keys and values: the fastest way, {preset}\n")
    print("| tokens a rank |" + "".join(f" {ranks} ranks |" for ranks in RANKS))
    print("|---:" + "|---" * len(RANKS) + "|")
    for tokens, row in zip(TOKENS, grid):
        print(f"| {tokens} |" + "".join(f" {names[i]} |" for i in row))
    return grid


# Publications


QWEN3_8B = {
    "width": 4096,
    "depth": 36,
    "pattern": "S",
    "mlp_hidden": 12288,
    "tied_head": False,
    "mixers": {
        "S": {"kind": "softmax", "num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    },
}
PUBLISHED = {(2**20, 8): (364, 380), (2**21, 16): (696, 696), (2**22, 32): (1346, 1346)}
"""Seconds of a step by tokens and H100s: TRL with PyTorch's ring and cuDNN (trl 6845 and 6846)."""


def print_published(cluster: ClusterConfig) -> None:
    """Steps that others have timed; no number of the cluster's file was fitted to them."""
    print("\n### Published steps\n")
    print("| tokens | GPUs | published s | predicted s | error |")
    print("|---|---:|---:|---:|---:|")
    for (length, ranks), (least, most) in PUBLISHED.items():
        tables = {
            "model": QWEN3_8B,
            "train": {"seq_len": length, "batch_size": 1},
            "parallel": {"sp": ranks, "stream": "ring", "placement": "zigzag"},
            "memory": {"checkpointing": "full", "activations": "cpu"},
        }
        work = workload(decode(Settings, tables), ranks, 151936, "bf16")
        found, told = step_time(work, cluster).total, f"{least} to {most}" * (least < most)
        error = 2 * found / (least + most) - 1
        row = f"| {millions(length)} | {ranks} | {told or least} | {found:.0f} | {error:+.0%} |"
        print(row)


# Picture


def draw(cluster: ClusterConfig, grids: dict[str, np.ndarray], path: str) -> None:
    """States by ranks, keys by tokens a rank, and the fastest way of keys by both."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
    draw_states(axes[0, 0], cluster)
    draw_keys(axes[0, 1], cluster)
    for axis, (preset, grid) in zip(axes[1], grids.items()):
        draw_grid(axis, preset, grid)
    marks = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
    figure.legend(marks, list(WAYS), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"Predicted for {cluster.name}; nothing of this was measured", fontsize=11)
    figure.savefig(path, dpi=96)


def draw_states(axis: plt.Axes, cluster: ClusterConfig) -> None:
    ranks, styles = range(2, 4097), {"allgather": "-", "scan": "--", "serial": ":"}
    for colour, (name, size) in zip(COLOURS[::2], STATES.items()):
        found = [state_seconds(cluster, n, size) for n in ranks]
        for way, style in styles.items():
            line = [1e3 * each[way] for each in found]
            axis.loglog(ranks, line, style, color=colour, label=f"{way}, {name.split(' (')[0]}")
    axis.axvline(SCAN_PAYS_FROM, color="grey", lw=0.8)
    axis.text(SCAN_PAYS_FROM * 1.1, axis.get_ylim()[0] * 1.3, "auto: scan from here", fontsize=8)
    axis.set(xlabel="ranks", ylabel="ms", title="States: one exchange of one layer")
    axis.legend(fontsize=7)


def draw_keys(axis: plt.Axes, cluster: ClusterConfig) -> None:
    found = [ways_of_keys("7b", 64, tokens, cluster) for tokens in TOKENS]
    for colour, name in zip(COLOURS, WAYS):
        shares = [100 * waits / total for total, waits in (each[name] for each in found)]
        axis.plot(TOKENS, shares, "o-", color=colour, ms=3)
    axis.set_xscale("log", base=2)
    title = "Keys and values: waiting on 64 ranks, 7b"
    axis.set(xlabel="tokens a rank", ylabel="% of the step", title=title)


def draw_grid(axis: plt.Axes, preset: str, grid: np.ndarray) -> None:
    colours = matplotlib.colors.ListedColormap(COLOURS)
    axis.imshow(grid, cmap=colours, vmin=-0.5, vmax=len(WAYS) - 0.5, origin="lower", aspect="auto")
    axis.set_xticks(range(len(RANKS)), RANKS, fontsize=8)
    axis.set_yticks(range(len(TOKENS)), [f"{n / 1024:g}K" for n in TOKENS], fontsize=8)
    title = f"Keys and values: the fastest way, {preset}"
    axis.set(xlabel="ranks", ylabel="tokens a rank", title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", default="docs/results/plan-long.png")
    arguments, started = parser.parse_args(), time.process_time()
    cluster = load_cluster(CLUSTER)
    print_states(cluster)
    draw(cluster, {name: print_keys(name, cluster) for name in PRESETS}, arguments.picture)
    print_published(cluster)
    print_plans(cluster)
    print(f"\n{time.process_time() - started:.0f} s of one core")


if __name__ == "__main__":
    main()
