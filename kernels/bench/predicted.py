"""What `longctx plan` foretells of steps on this device, beside steps that were taken.

    python kernels/bench/predicted.py [--config 340m] [--lengths 4096,16384,65536] [--processes 1]

`longctx doctor CONFIG --measure` first measures the devices, and links if there are several. Then
each length is trained for some steps, one sequence over all processes, and the median time of a
step and the peak of memory stand beside the plan's. Ends with 1 if a time is further off than 20 %,
or on a GPU a peak than 10 %. On a CPU peaks are not compared: they are mostly Python and torch, and
a plan counts tensors. Seconds are of a clock: measure and train while nothing else runs.
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

from longctx.config import apply_overrides  # noqa: E402
from longctx.launch.ports import free_port  # noqa: E402
from longctx.plan.automatic import size_of_vocabulary  # noqa: E402
from longctx.plan.clusters import load_cluster  # noqa: E402
from longctx.plan.costs import step_time  # noqa: E402
from longctx.plan.memory import memory_of  # noqa: E402
from longctx.plan.workload import workload  # noqa: E402
from longctx.train.settings import load_settings  # noqa: E402

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


@dataclass(frozen=True)
class Runs:
    """How short runs are made."""

    config: str
    steps: int
    processes: int
    folder: Path

    def options(self, length: int) -> list[str]:
        """One sequence a step, over all processes."""
        train = {"seq_len": length, "batch_size": 1, "steps": self.steps}
        words = [word for name, value in train.items() for word in (f"--train.{name}", str(value))]
        words += ["--parallel.sp", str(self.processes)]
        return [*words, "--eval.sequences", "1", "--eval.every", str(self.steps)]

    def longctx(self, *words: str) -> None:
        """A command, in processes of their own; on a CPU each of one thread."""
        common = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}
        if not torch.cuda.is_available():
            common["OMP_NUM_THREADS"] = "1"
        if self.processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(self.processes))
        started = []
        for rank in range(self.processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.processes > 1 else {}
            call, said = [sys.executable, "-m", "longctx", *words], subprocess.PIPE
            streams = {"stdout": subprocess.DEVNULL, "stderr": said, "text": True}
            started.append(subprocess.Popen(call, env=common | own, **streams))
        said = [process.communicate()[1] for process in started]
        if code := max(process.returncode for process in started):
            sys.exit(f"longctx {' '.join(words)} ended with {code}:\n{''.join(said)[-3000:]}")

    def measured(self, length: int) -> Found:
        """The median step of a training, and the most that any of them took."""
        run = self.folder / f"length-{length}"
        self.longctx("train", self.config, *self.options(length), "--run.dir", str(run))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        taken = [row for row in rows if "seconds" in row][SETTLING:]
        peak = max(row["peak_memory_bytes"] for row in taken)
        return Found(median(row["seconds"] for row in taken), peak)

    def foretold(self, length: int, cluster_file: Path) -> Found:
        """The plan of the same."""
        settings = apply_overrides(
            load_settings(self.config), self.options(length), "longctx train"
        )
        precision = settings.train.resolve_precision(settings.train.resolve_device())
        vocab_size = size_of_vocabulary(settings.data)
        work = workload(settings, self.processes, vocab_size, precision)
        memory = memory_of(work, 0, torch.cuda.is_available())
        return Found(step_time(work, load_cluster(str(cluster_file))).total, memory.device)


def report(what: str, lengths: list[int], pairs: list[tuple[Found, Found]]) -> tuple[str, bool]:
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
    device = torch.cuda.get_device_name() if on_gpu else "the CPU, one thread each"
    lines = [
        "# Steps as planned and as taken",
        f"{what}, one sequence a step, on {device}. {machine()}",
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
    parser.add_argument("--processes", type=int, default=1, help="that share the sequence")
    parser.add_argument("--out", type=Path, help="file that gets the report")
    options = parser.parse_args()
    counts = [int(length) for length in options.lengths.split(",")]
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(options.config, options.steps, options.processes, Path(name))
        cluster = runs.folder / "cluster.toml"
        runs.longctx("doctor", options.config, "--measure", "--output", str(cluster))
        steps = [runs.measured(count) for count in counts]
        plans = [runs.foretold(count, cluster) for count in counts]
    what = f"Config {options.config}, processes: {options.processes}"
    text, is_met = report(what, counts, list(zip(plans, steps)))
    if options.out:
        options.out.write_text(text)
    print(text)
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
