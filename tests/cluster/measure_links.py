"""Step time and bytes of every transport when two hosts share a sequence over a slow cable.

`python -m tests.cluster.measure_links` writes docs/results/two-hosts.md; it needs root.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from longctx.mixers import Mixer, MixerConfig, Place
from longctx.mixers.linear import LinearConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from tests.cluster.hosts import TwoHosts, missing
from tests.sequence.links import gloo_links

WIDTH, LENGTH, STEPS, RANKS = 256, 4096, 5, 4
RATES = (None, 100, 20)
REPORT = Path(__file__).parents[2] / "docs" / "results" / "two-hosts.md"
LINEAR, SOFTMAX = LinearConfig(num_heads=4), SoftmaxConfig(num_heads=4, num_kv_heads=2)
WINDOW = SoftmaxConfig(num_heads=4, num_kv_heads=2, window=256)
CASES: dict[str, tuple[MixerConfig, str, Transports]] = {
    "linear, allgather": (LINEAR, "contiguous", Transports(prefix="allgather")),
    "linear, scan": (LINEAR, "contiguous", Transports(prefix="scan")),
    "linear, serial": (LINEAR, "contiguous", Transports(prefix="serial")),
    "linear, ulysses": (LINEAR, "contiguous", Transports(prefix="ulysses", heads=4)),
    "softmax, allgather": (SOFTMAX, "zigzag", Transports(stream="allgather")),
    "softmax, ring": (SOFTMAX, "zigzag", Transports(stream="ring")),
    "softmax, ulysses": (SOFTMAX, "contiguous", Transports(heads=4)),
    "softmax, ulysses 2 x ring 2": (SOFTMAX, "mirror", Transports(stream="ring", heads=2)),
    "softmax, window of 256": (WINDOW, "contiguous", Transports()),
}


def work() -> None:
    """One rank: checks each case against the whole sequence, then times it; rank 0 prints JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, (config, placement, transports) in CASES.items():
        torch.manual_seed(0)
        mixer, x_BTD = config.build(Place(WIDTH, 0, 1)), torch.randn(1, LENGTH, WIDTH)
        ledger = Ledger()
        plan = Plan(place(placement, RANKS, LENGTH, transports.heads), dist.get_rank(), ((0,),))
        view = ShardedView(plan, gloo_links(transports.heads, ledger), transports)
        own_BTD = x_BTD[:, plan.token_ids_BT[0]].requires_grad_()
        out_BTD = mixer(own_BTD, view).out
        expected = mixer(x_BTD, LocalView.whole(1, LENGTH)).out[:, plan.token_ids_BT[0]]
        assert torch.allclose(out_BTD, expected, atol=1e-4), name
        seconds = [_step(mixer, own_BTD, view, ledger) for _ in range(STEPS)]
        results[name] = {"seconds": statistics.median(seconds), "bytes": ledger.total().received}
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _step(mixer: Mixer, x_BTD: torch.Tensor, view: ShardedView, ledger: Ledger) -> float:
    ledger.clear()
    dist.barrier()
    start = time.perf_counter()
    mixer(x_BTD, view).out.sum().backward()
    dist.barrier()
    return time.perf_counter() - start


def measure(rate: int | None, port: int) -> dict[str, dict[str, float]]:
    """Results of all cases over a cable of `rate` Mbit/s."""
    with TwoHosts() as hosts:
        if rate:
            hosts.limit(rate)
        launched = hosts.launch(RANKS // 2, port, "tests.cluster.measure_links", "--work")
        outputs = [process.communicate()[0] for process in launched]
    line = next(x for x in outputs[0].splitlines() if x.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def report(by_rate: dict[int | None, dict[str, dict[str, float]]]) -> str:
    """The table as Markdown."""
    names = ["no limit" if rate is None else f"{rate} Mbit/s" for rate in by_rate]
    lines = [
        "# One sequence across two hosts: step time and bytes",
        "",
        "    python -m tests.cluster.measure_links    # as root",
        "",
        f"{RANKS} gloo processes, two on each of two network namespaces joined by a veth pair",
        "whose speed `tc tbf` sets; one layer, forward and backward, fp32, "
        f"1 x {LENGTH} tokens, width {WIDTH},",
        f"4 heads of {WIDTH // 4}, 2 key heads; median of {STEPS} steps in one run per speed,",
        "after a check against one process. Bytes are what rank 0 receives in a step, by the",
        f"ledger. The four processes share 2 cores ({platform.machine()}, torch",
        f"{torch.__version__}), so the first column is compute; compare rows within a column.",
        "",
        "| layer, transport | bytes | " + " | ".join(f"{name}, ms" for name in names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for case in CASES:
        times = " | ".join(f"{1000 * r[case]['seconds']:.0f}" for r in by_rate.values())
        received = next(iter(by_rate.values()))[case]["bytes"]
        lines.append(f"| {case} | {received:,} | {times} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--work" in sys.argv:
        work()
    elif reason := missing():
        sys.exit(reason)
    else:
        REPORT.write_text(report({rate: measure(rate, 29600 + i) for i, rate in enumerate(RATES)}))
        print(REPORT.read_text())
