"""Bytes that a layer keeps between its passes, and takes for a while in either of them."""

from dataclasses import dataclass, replace
from typing import Any

from longctx.model.in_flight import Batch
from longctx.model.layers import SwiGLU
from longctx.model.memory import MemoryConfig
from longctx.model.saved_bytes import of_hollow
from longctx.plan.sizes import HollowLayer
from longctx.plan.traffic_layers import expected_of
from longctx.plan.workload import Workload
from longctx.sequence.expected import Expected
from longctx.sequence.ledger import Traffic

NOTHING = Traffic(0, 0)
CORE_GRADIENTS = 0.25
"""What gradients in a mixer's backward pass take, as a share of what the pass has kept; the rest
takes the place of what is no longer needed. docs/memory.md has the measurement."""


@dataclass(frozen=True)
class Passing:
    """What one layer takes of the device's memory."""

    mixing: int
    """Kept by the mixer, and with checkpointing by the whole layer."""
    feeding: int
    """Kept by the feed-forward part."""
    recomputed: int
    """What comes besides when the layer is computed again."""
    working: int
    """Of gradients, or of what a pass makes and drops."""
    exchanged: int
    """What arrives and leaves at once."""
    on_host: int = 0
    """Kept on the host."""

    @property
    def kept(self) -> int:
        """On the device from the forward to the backward pass."""
        return self.mixing + self.feeding


def passing(work: Workload, layer: HollowLayer, batch: Batch, part: tuple[int, int]) -> Passing:
    """Of one process, in the pass over a batch."""
    settings, block = work.settings, layer.block
    which, memory = (settings.model, layer.letter, part), settings.memory
    mixing, feeding = of_hollow(block, which, memory, batch)
    plain = MemoryConfig(mlp_tokens=memory.mlp_tokens)
    is_again = memory.of_layer(layer.letter) != "none"
    everything = of_hollow(block, which, plain, batch) if is_again else (mixing, feeding)
    recomputed = sum(everything) - mixing - feeding
    stream = batch.total * settings.model.width * batch.wide
    # Gradients of its output and input, and those inside of the feed-forward part, which comes
    # first and then is done with, or of the mixer.
    inside = int(CORE_GRADIENTS * (everything[0] - stream)) - everything[1]
    working = 2 * stream + max(inside, _feeding(layer, memory, batch))
    exchanged = _exchanged(work, layer, batch)
    waits = is_again and memory.activations == "cpu" and batch.on_gpu
    if not waits:
        return Passing(mixing, feeding, recomputed, working, exchanged)
    pinned = 1 << (stream - 1).bit_length()
    return Passing(mixing - stream, 0, recomputed + stream, working, exchanged, pinned)


def _feeding(layer: HollowLayer, memory: MemoryConfig, batch: Batch) -> int:
    """Of the feed-forward part: what a tile keeps, and gradients, of which half take the place of
    what was kept."""
    mlp: Any = layer.block.mlp
    if mlp is None:
        return 0
    columns, steps = mlp.up.out_features, 4 if isinstance(mlp, SwiGLU) else 2
    tokens = min(batch.total, memory.mlp_tokens or batch.total)
    each = tokens * columns * batch.narrow
    return each * (steps if memory.mlp_tokens else 0) + each * steps // 2


def _exchanged(work: Workload, layer: HollowLayer, batch: Batch) -> int:
    mixer = layer.block.mixer
    if mixer is None or batch.split is None:
        return 0
    expected = expected_of(mixer, batch.split)
    verbs = {verb for verb, _ in expected}
    return max((_of_verb(expected, verb, work) for verb in verbs), default=0)


def _of_verb(expected: Expected, verb: str, work: Workload) -> int:
    """What one exchange has in its hands: arriving keys of the next while those of one are read,
    and on the way back gradients that are made while others leave."""
    forward = expected.get((verb, False), NOTHING)
    backward = expected.get((verb, True), NOTHING)
    if verb != "stream":
        received = max(forward.received, backward.received)
        return received // 2 if verb == "heads" else 2 * received
    calls = max(1, forward.calls)
    keys = forward.received // calls
    gradients = max(0, backward.received - forward.received) // calls
    ahead = 2 if calls > 1 else 1
    return ahead * keys + (3 if work.split.transports.stream == "ring" else 2) * gradients


def in_flight(work: Workload, sp_rank: int, on_gpu: bool) -> Batch:
    """The largest pass of a process, with what it has of the sequences."""
    rows = max(work.micro_rows)
    arrives_narrow = work.settings.parallel.weights == "bf16" and work.split.engine == "fsdp2"
    return replace(
        work.batch(sp_rank),
        share=work.share(sp_rank, rows),
        documents=sum(map(len, work.documents)),
        rounds_weights=not arrives_narrow,
        on_gpu=on_gpu,
    )
