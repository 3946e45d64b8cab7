"""The longest training step that one device holds, with each saving of memory switched on in turn.

    python kernels/bench/ladder.py [--preset 1b-lasp2h] [--rungs loss,keep] [--minutes 10]
    python kernels/bench/ladder.py --tiny

Every step is a process of its own: forward, backward and AdamW on one sequence, bf16 by autocast
on a GPU. A rung doubles its tokens until a step does not fit, or until the next one would take
longer than what is left of the time; such a rung is marked, and says what was not tried. Writes
kernels/bench/results/ladder-<device>.json and .md, the latter with published figures beside ours.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# On a machine where nothing is installed, the packages are found beside the bench.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from report import table  # noqa: E402

RESULTS = ROOT / "kernels" / "bench" / "results"
VOCABULARY = 131072
FIRST_TOKENS = 16384
SECONDS_TO_START = 30
OUT_OF_MEMORY = 3
"""Exit code of a step that did not fit."""
TILES = {"loss_tokens": 2048, "mlp_tokens": 16384}
RUNGS = {
    "none": {},
    "loss": {"loss_tokens": TILES["loss_tokens"]},
    "full": {"loss_tokens": TILES["loss_tokens"], "checkpointing": "full"},
    "keep": {"loss_tokens": TILES["loss_tokens"], "checkpointing": "keep"},
    "tiles": TILES | {"checkpointing": "keep"},
    "offload": TILES | {"checkpointing": "keep", "activations": "cpu"},
}
"""What each rung has switched on; without a number of its own the loss makes 64 MiB of logits."""
PUBLISHED = (
    ("LASP-2 (arXiv 2502.07563), 1B, 80 GB GPU", "16K a GPU"),
    ("ALST (arXiv 2506.13996), Llama 8B, one H200, baseline", "65K"),
    ("ALST, + tiled loss", "300K"),
    ("ALST, + checkpoint offload", "650K"),
    ("ALST, + tiled MLP", "1.2M"),
)


@dataclass(frozen=True)
class Step:
    """One step as it was measured."""

    rung: str
    tokens: int
    seconds: float
    mfu: float
    peak_bytes: int
    kept_bytes: int
    """By formula, between the forward and the backward pass."""


@dataclass(frozen=True)
class Rung:
    """The longest step of a rung, if any fitted, and why there is no longer one."""

    name: str
    longest: Step | None
    end: str


def step(rung: str, tokens: int, preset: str, is_tiny: bool) -> Step:
    """Takes two steps in this process, and measures the second."""
    from dataclasses import replace

    from longctx.model.decoder import Decoder, initialise
    from longctx.model.memory import MemoryConfig
    from longctx.model.saved_bytes import Batch, of_model
    from longctx.sequence.local import LocalView
    from longctx.train.hardware import forget_peak_memory, peak_flops, peak_memory_bytes
    from longctx.train.settings import load_settings

    device = torch.device("cpu" if is_tiny else "cuda")
    config, vocabulary = load_settings(preset).model, VOCABULARY
    if is_tiny:
        config, vocabulary = replace(config, width=64, depth=4, mlp_hidden=128), 512
    memory = MemoryConfig(**RUNGS[rung])
    model = Decoder(config, vocabulary, memory)
    initialise(model, 0)
    model = model.to(device, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    view = LocalView.whole(1, tokens, device).keyed(0, 0, (0,))
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
    for number in range(2):
        if number:
            forget_peak_memory(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            losses = model(tokens_BT, tokens_BT.roll(-1, 1), view)
        (losses.cross_entropy / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not is_tiny:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if seconds > 60:
            break
    flops = 3 * sum(model.flops(view.positions_BT.flatten().cpu() + 1).values())
    rate, _ = peak_flops(device, torch.float32 if is_tiny else torch.bfloat16)
    kept = of_model(config, vocabulary, memory, Batch(1, tokens, "bf16"))
    peak = peak_memory_bytes(device)
    return Step(rung, tokens, seconds, flops / seconds / rate, peak, kept)


def climb(name: str, options: argparse.Namespace, deadline: float) -> Rung:
    """Doubles the tokens of a rung until a step does not fit."""
    longest, tokens = None, options.first
    for tokens in _doubled(options.first, options.most):
        left = deadline - time.perf_counter()
        # Softmax layers take four times as long for twice the tokens, at worst; steps are two.
        needed = SECONDS_TO_START + 8 * (longest.seconds if longest else 0)
        if left < needed:
            return Rung(name, longest, f"{tokens} tokens were not tried: no time")
        call = [sys.executable, __file__, "--step", name, "--tokens", str(tokens)]
        call += ["--preset", options.preset, *(["--tiny"] if options.tiny else [])]
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        try:
            done = subprocess.run(
                call, capture_output=True, text=True, timeout=left, env=environment
            )
        except subprocess.TimeoutExpired:
            return Rung(name, longest, f"{tokens} tokens were broken off: no time")
        if done.returncode == OUT_OF_MEMORY:
            return Rung(name, longest, f"{tokens} tokens do not fit")
        if done.returncode:
            raise RuntimeError(f"rung {name}, {tokens} tokens:\n{done.stderr[-3000:]}")
        longest = Step(**json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {tokens} tokens in {longest.seconds:.1f} s", flush=True)
    return Rung(name, longest, f"more than {tokens} tokens were not asked for")


def _doubled(first: int, most: int) -> Iterator[int]:
    tokens = first
    while tokens <= most:
        yield tokens
        tokens *= 2


def report(rungs: list[Rung], preset: str, device: str) -> str:
    """Our rungs, and published ones that other models and devices reached."""
    header = ["savings", "tokens", "s", "tokens/s", "MFU", "peak GiB", "kept GiB", "then"]
    rows = []
    for rung in rungs:
        s = rung.longest
        cells = ["-"] * 6
        if s is not None:
            sizes = (f"{size / 2**30:.2f}" for size in (s.peak_bytes, s.kept_bytes))
            rate = f"{s.tokens / s.seconds:,.0f}"
            cells = [str(s.tokens), f"{s.seconds:.1f}", rate, f"{s.mfu:.1%}", *sizes]
        rows.append([rung.name, *cells, rung.end])
    return "\n\n".join(
        (
            "# The longest step of one device",
            f"Preset {preset} with {VOCABULARY} tokens in its vocabulary, on {device}; torch "
            f"{torch.__version__}. Kept is the formula's, between forward and backward.",
            table(header, rows),
            "Published, of other models; nothing here was run by us:",
            table(["what", "tokens"], PUBLISHED),
        )
    )


def main() -> None:
    """Climbs the ladder, or takes one step of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="1b-lasp2h")
    parser.add_argument("--rungs", default=",".join(RUNGS))
    parser.add_argument("--first", type=int, default=FIRST_TOKENS, help="tokens of the first step")
    parser.add_argument("--most", type=int, default=2**21, help="tokens of the last step")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all rungs together")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--step", choices=RUNGS)
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args()
    if options.step:
        try:
            found = step(options.step, options.tokens, options.preset, options.tiny)
        except torch.OutOfMemoryError:
            sys.exit(OUT_OF_MEMORY)
        print(json.dumps(asdict(found)))
        return
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("no GPU here: --tiny takes small steps on the CPU")
    device = "the CPU, tiny" if options.tiny else torch.cuda.get_device_name()
    deadline = time.perf_counter() + 60 * options.minutes
    rungs = [climb(name, options, deadline) for name in options.rungs.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"ladder-{device.replace(' ', '-').replace(',', '')}"
    text = report(rungs, options.preset, device)
    stem.with_suffix(".json").write_text(json.dumps([asdict(rung) for rung in rungs], indent=1))
    stem.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
