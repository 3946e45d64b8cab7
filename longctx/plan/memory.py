"""Peak memory of one process of a run, predicted from sizes alone.

The peak is sought in a walk through one pass: forward layer by layer, the loss, backward layer by
layer while gradients take the place of activations, and the update. What is kept between the
passes and what the optimizer holds follow formulas that tests compare with counted tensors; what
comes and goes in between is estimated.
"""

from collections import Counter
from dataclasses import dataclass, replace

from longctx.model.in_flight import Batch
from longctx.model.loss import CHUNK_ELEMENTS
from longctx.model.saved_bytes import of_ends, of_shelf
from longctx.plan.memory_layers import Passing, in_flight, passing
from longctx.plan.memory_state import Engine, Held
from longctx.plan.sizes import HollowLayer, HollowModel, hollow_model
from longctx.plan.workload import Workload

SLACK = 0.05
"""Share of a GPU's memory that PyTorch's allocator takes besides tensors: pieces left over when
blocks are split, and rounding; that of CUDA itself, about 0.5 GiB, is not counted."""
COPIES_OF_LOGITS = 3
"""Logits, their softmax and its gradient, in the precision of the loss."""
TABLES = 40
"""Bytes of a token's id, label, two positions and key of random numbers."""
FOUND = 9
"""Bytes of where a token's row is in a share of the embedding, and of whether it is there."""
UNDER_WAY = 2
"""Inputs of layers on their way to the host, or from there."""

Parts = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes on one process."""

    weights: int
    """As they are held between uses, wherever that is."""
    gradients: int
    optimizer: int
    activations: dict[str, int]
    """On the device between forward and backward pass: by kind of mixer, mlp and head. With
    checkpointing, what is left of a whole layer counts as its mixer's."""
    moment: str
    """When most is in use: forward, loss, backward or update."""
    parts: Parts
    """Then on the device, by component; their sum is `device`."""
    on_host: Parts
    """By component; none of it is on the device."""

    @property
    def device(self) -> int:
        """The peak on the device."""
        return sum(self.parts.values())

    @property
    def host(self) -> int:
        """What waits on the host."""
        return sum(self.on_host.values())


def memory_of(work: Workload, rank: int, on_gpu: bool | None = None) -> Memory:
    """Of a process by its rank in the whole run; unless told, bf16 runs on a GPU."""
    tp, memory = work.split.tp, work.settings.memory
    part = rank % tp, tp
    hollow = hollow_model(work.settings.model, work.vocab_size, part)
    on_gpu = work.precision == "bf16" if on_gpu is None else on_gpu
    batch = in_flight(work, rank // tp % work.split.sp, on_gpu)
    walk = _Walk(work, hollow, Engine(work, rank), batch)
    moment, peak = max(walk.moments(), key=lambda found: sum(found[1].values()))
    if on_gpu:
        peak["allocator slack"] = int(SLACK * sum(peak.values()))
    held, host = walk.held, {}
    if memory.weights == "cpu":
        host["weights"] = held.weights
    if memory.optimizer == "cpu":
        host |= {"optimizer": held.optimizer, "gradients": held.gradients}
    host["activations"] = walk.waiting
    return Memory(
        held.weights,
        held.gradients,
        held.optimizer,
        walk.activations,
        moment,
        {name: size for name, size in peak.items() if size},
        {name: size for name, size in host.items() if size},
    )


class _Walk:
    """One pass through the layers."""

    def __init__(self, work: Workload, hollow: HollowModel, engine: Engine, batch: Batch):
        self.work, self.hollow, self.engine, self.batch = work, hollow, engine, batch
        model, memory = work.settings.model, work.settings.memory
        number, parts = engine.rank % work.split.tp, work.split.tp
        layers: dict[int, HollowLayer] = {0: hollow.first}
        layers |= {i: hollow.others[a] for i, a in enumerate(model.letters) if i}
        self.layers = layers
        known = {
            id(layer): (
                passing(work, layer, batch, (number, parts)),
                engine.of_layer(layer),
            )
            for layer, _ in hollow.layers()
        }
        self.each: list[tuple[Passing, Held]] = [known[id(layer)] for layer in layers.values()]
        blocks = {layer.letter: layer.block for layer in layers.values()}
        for number, size in of_shelf(model, memory, blocks, batch).items():
            found, held = self.each[number]
            self.each[number] = replace(found, mixing=found.mixing + size), held
        self.outside = engine.of_outside(hollow.outside)
        self.held = self.outside
        for layer, count in hollow.layers():
            self.held = self.held.plus(known[id(layer)][1].times(count))
        self.ends = of_ends(model, hollow.outside[0].shape[0], batch)
        self.ends += FOUND * batch.total if parts > 1 else 0
        self.waiting = sum(found.on_host for found, _ in self.each)
        self.weights_here = memory.weights == "device"
        self.optimizer_here = memory.optimizer == "device"

    @property
    def activations(self) -> dict[str, int]:
        """Kept on the device, by kind."""
        model, kept = self.work.settings.model, Counter[str]()
        for letter, (found, _) in zip(model.letters, self.each, strict=True):
            kind = model.mixers[letter].kind if letter in model.mixers else "mlp"
            kept[kind] += found.mixing
            kept["mlp"] += found.feeding
        kept["head"] = self.ends
        return {kind: size for kind, size in kept.items() if size}

    def moments(self) -> list[tuple[str, Parts]]:
        """Moments that may be the peak, and what is in use."""
        found, kept = [], 0
        gradients = self.held.gradients if len(self.work.micro_rows) > 1 else 0
        for number, (layer, _) in enumerate(self.each):
            kept += layer.kept
            found.append(("forward", self._at(number, kept, gradients)))
        loss = self._loss(kept, gradients)
        found.append(("loss", loss))
        done = self.held.gradients if gradients else 0
        for number, (layer, held) in reversed(list(enumerate(self.each))):
            kept -= layer.kept
            at = self._at(number, kept + layer.kept, gradients or done)
            at["recomputed"] = layer.recomputed
            at["gathered weights"] += 2 * held.raw_gradients
            at["loss"] = self.outside.raw_gradients if self.engine.spreads else 0
            found.append(("backward", at))
            done += held.gradients
        found.append(("update", self._update()))
        return found

    def _standing(self, gradients: int) -> Parts:
        held = self.held
        return {
            "weights": held.weights if self.weights_here else 0,
            "gradients": gradients if self.optimizer_here else 0,
            "optimizer": held.optimizer if self.optimizer_here else 0,
            "batch": TABLES * self.batch.total,
            "gathered weights": self.outside.together,
        }

    def _at(self, number: int, kept: int, gradients: int) -> Parts:
        """While a layer computes: the weights of the one that comes next are on their way."""
        layer, held = self.each[number]
        near = self.each[(number + 1) % len(self.each)][1]
        parts = self._standing(gradients)
        parts["gathered weights"] += held.together + near.together
        stream = self.batch.total * self.work.settings.model.width * self.batch.wide
        under_way = UNDER_WAY * stream if layer.on_host else 0
        return parts | {
            "activations": kept + under_way,
            "recomputed": 0,
            "working set": layer.working,
            "exchange": layer.exchanged,
            "loss": 0,
        }

    def _loss(self, kept: int, gradients: int) -> Parts:
        """While the loss and its gradients are computed, some tokens at a time."""
        vocabulary, width = self.hollow.outside[0].shape
        batch, tp = self.batch, self.work.split.tp
        rows = self.work.settings.memory.loss_tokens or max(1, CHUNK_ELEMENTS // vocabulary)
        logits = min(rows, batch.total) * vocabulary * batch.wide * COPIES_OF_LOGITS
        rounded = vocabulary * width * (batch.wide + batch.narrow)
        sums = rounded if batch.narrow < batch.wide or tp > 1 else 0
        return self._standing(gradients) | {
            "activations": kept + self.ends,
            "loss": logits + sums,
        }

    def _update(self) -> Parts:
        """While gradients are summed, or weights changed."""
        parts = self._standing(self.held.gradients)
        layers = (layer for layer, _ in self.hollow.layers())
        matrices = (w for layer in layers for w in layer.weights if w.is_hidden_matrix)
        largest = max((w.numel for w in matrices), default=0)
        parts["working set"] = self.engine.for_update(self.held, largest)
        parts["gathered weights"] = 0
        return parts
