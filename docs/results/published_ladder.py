"""ALST's ladder as the memory model of `longctx plan` reckons it for longctx itself."""

from dataclasses import replace

from published_models import ALST_MODELS, GIB, HOST_BYTES, cluster

from longctx.plan.memory import Memory, memory_of
from longctx.plan.workload import Workload, workload
from longctx.train.settings import load_settings

LEAST, MOST, STEP = 2**16, 2**25, 2**10


def run_of(gpus: int) -> Workload:
    """Llama-3.1-8B in bf16 with everything that saves memory."""
    shape, base = ALST_MODELS["8b"], load_settings("340m-softmax")
    letter = base.model.pattern[0]
    mixers = {letter: replace(base.model.mixers[letter], num_heads=32, num_kv_heads=8)}
    model = replace(
        base.model,
        width=shape.width,
        depth=shape.depth,
        mlp_hidden=shape.mlp,
        tied_head=False,
        pattern=letter,
        mixers=mixers,
    )
    memory = replace(
        base.memory,
        checkpointing="full",
        activations="cpu",
        weights="cpu",
        optimizer="cpu",
        mlp_tokens=4096,
    )
    heads = min(gpus, 8)
    parallel = replace(base.parallel, sp=gpus, heads=heads, weights="bf16")
    if gpus > heads:
        parallel = replace(parallel, stream="allgather", gather_heads=1)
    train = replace(base.train, batch_size=1, micro_batch=1, seq_len=LEAST, precision="bf16")
    settings = replace(base, model=model, memory=memory, parallel=parallel, train=train)
    return workload(settings, gpus, shape.vocabulary, "bf16")


def longest(work: Workload) -> tuple[int, Memory, str]:
    """Tokens of the longest sequence on H100s with ALST's hosts, its memory, what ends it."""
    device, host = cluster("8xh100").memory_gib * GIB, HOST_BYTES / min(work.processes, 8)

    def lacking(tokens: int) -> str:
        found = memory_of(work.with_length(tokens), 0)
        return "device" * (found.device > device) or "host" * (found.host > host)

    low, high = LEAST, MOST
    while high - low > max(STEP, low // 64):
        middle = (low + high) // 2 // STEP * STEP
        low, high = (low, middle) if lacking(middle) else (middle, high)
    return low, memory_of(work.with_length(low), 0), lacking(high)


def table(published: dict[int, int]) -> str:
    """A line for each number of GPUs; thousands of tokens."""
    lines = [
        "| GPUs | ALST | longctx, predicted | ends at | GiB on a GPU | TB on a node's host |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for gpus, thousands in published.items():
        tokens, memory, ends = longest(run_of(gpus))
        host = memory.host * min(gpus, 8) / 1e12
        figures = f"{tokens / 1e3:,.0f} | {ends} | {memory.device / GIB:.1f} | {host:.2f}"
        lines.append(f"| {gpus} | {thousands:,} | {figures} |")
    return "\n".join(lines)
