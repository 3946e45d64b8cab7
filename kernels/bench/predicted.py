"""What `longctx plan` foretells of steps on this device, beside steps that were taken.

    python kernels/bench/predicted.py [--config 340m] [--lengths 4096,16384,65536] [--out FILE]

`longctx doctor CONFIG --measure` first measures the device. Then each length is trained for some
steps, in a process of its own, and the median time of a step and the peak of memory stand beside
the plan's. Ends with 1 if a time is further off than 20 %, or on a GPU a peak than 10 %. On a CPU
peaks are not compared: they are mostly Python and torch, and a plan counts tensors. Seconds are of
a clock: measure and train while nothing else runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "kernels")]
# On a machine where nothing is installed, the packages are found beside the bench.
sys.path[:0] = PATHS

import torch  # noqa: E402
from report import machine, table, verdict  # noqa: E402

SETTLING = 2
"""First steps, which are not timed."""
BARS = {"time": 0.2, "memory": 0.1}
DEFAULTS = {"cpu": ("tiny", "1024,2048,4096"), "cuda": ("340m", "4096,16384,65536")}
"""Config and lengths by device."""
GIB = 2**30


@dataclass(frozen=True)
class Found:
    """A step of one length: of a plan, or as it was measured."""

    seconds: float
    peak_bytes: float


def options_of(length: int, steps: int) -> list[str]:
    """What makes a short run of any config."""
    train = {"seq_len": length, "batch_size": 1, "steps": steps}
    words = [word for name, value in train.items() for word in (f"--train.{name}", str(value))]
    return [*words, "--eval.sequences", "1", "--eval.every", str(steps)]


def longctx(*words: str) -> None:
    """A command in a process of its own; on a CPU of one thread, as `--measure` has it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = "1"
    call = [sys.executable, "-m", "longctx", *words]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"longctx {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def measured(config: str, length: int, steps: int, folder: Path) -> Found:
    """The median step of a training, and the most that any of them took."""
    run = folder / f"length-{length}"
    longctx("train", config, *options_of(length, steps), "--run.dir", str(run))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taken = [row for row in rows if "seconds" in row][SETTLING:]
    peak = max(row["peak_memory_bytes"] for row in taken)
    return Found(median(row["seconds"] for row in taken), peak)


def foretold(config: str, length: int, cluster_file: Path) -> Found:
    """The plan of one process."""
    from longctx.config import apply_overrides
    from longctx.plan.automatic import size_of_vocabulary
    from longctx.plan.clusters import load_cluster
    from longctx.plan.costs import step_time
    from longctx.plan.memory import memory_of
    from longctx.plan.workload import workload
    from longctx.train.settings import load_settings

    settings = apply_overrides(load_settings(config), options_of(length, 1), "longctx train")
    precision = settings.train.resolve_precision(settings.train.resolve_device())
    work = workload(settings, 1, size_of_vocabulary(settings.data), precision)
    memory = memory_of(work, 0, torch.cuda.is_available())
    return Found(step_time(work, load_cluster(str(cluster_file))).total, memory.device)


def report(config: str, lengths: list[int], pairs: list[tuple[Found, Found]]) -> tuple[str, bool]:
    """A table with a line for each length, and whether all errors are within the bars."""
    on_gpu, rows, errors = torch.cuda.is_available(), [], {"time": [0.0], "memory": [0.0]}
    for length, (plan, step) in zip(lengths, pairs, strict=True):
        errors["time"].append(plan.seconds / step.seconds - 1)
        cells = [f"{step.seconds:.3f}", f"{plan.seconds:.3f}", f"{errors['time'][-1]:+.0%}"]
        if on_gpu:
            errors["memory"].append(plan.peak_bytes / step.peak_bytes - 1)
            sizes = (f"{size / GIB:.2f}" for size in (step.peak_bytes, plan.peak_bytes))
            cells += [*sizes, f"{errors['memory'][-1]:+.0%}"]
        rows.append([f"{length:,}", *cells])
    header = ["tokens", "step, s", "planned, s", "off"]
    header += ["peak, GiB", "planned, GiB", "off"] if on_gpu else []
    judged = BARS if on_gpu else {"time": BARS["time"]}
    worst = {name: max(map(abs, errors[name])) for name in judged}
    is_met = {name: worst[name] <= bar for name, bar in judged.items()}
    device = torch.cuda.get_device_name() if on_gpu else "the CPU, one thread"
    lines = [
        "# Steps as planned and as taken",
        f"Config {config}, one sequence a step, on {device}. {machine()}",
        table(header, rows),
        *(
            verdict(f"{name} off by {worst[name]:.0%} at most, bar {bar:.0%}", is_met[name], True)
            for name, bar in judged.items()
        ),
    ]
    return "\n\n".join(lines) + "\n", all(is_met.values())


def main() -> None:
    """Measures, trains, plans and reports."""
    config, lengths = DEFAULTS["cuda" if torch.cuda.is_available() else "cpu"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=config)
    parser.add_argument("--lengths", default=lengths)
    parser.add_argument("--steps", type=int, default=8, help=f"the first {SETTLING} are not timed")
    parser.add_argument("--out", type=Path, help="file that gets the report")
    options = parser.parse_args()
    counts = [int(length) for length in options.lengths.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder, cluster = Path(name), Path(name) / "cluster.toml"
        longctx("doctor", options.config, "--measure", "--output", str(cluster))
        steps = [measured(options.config, count, options.steps, folder) for count in counts]
        plans = [foretold(options.config, count, cluster) for count in counts]
    text, is_met = report(options.config, counts, list(zip(plans, steps)))
    if options.out:
        options.out.write_text(text)
    print(text)
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
