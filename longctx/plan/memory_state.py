"""Bytes of weights, gradients and optimizer state that one process holds, by engine."""

from collections.abc import Iterable
from dataclasses import dataclass

from longctx.model.in_flight import DTYPES
from longctx.parallel.zero import BUCKET, PERSISTENT
from longctx.plan.sizes import HollowLayer, Weight
from longctx.plan.workload import Workload

FP32 = 4


@dataclass(frozen=True)
class Held:
    """Bytes of some weights on one process."""

    weights: int = 0
    """As they lie between uses."""
    gradients: int = 0
    """As the optimizer takes them."""
    optimizer: int = 0
    together: int = 0
    """Of whole weights while a layer computes, where they lie spread."""
    raw_gradients: int = 0
    """Of whole gradients until they are summed over processes, where these are spread."""

    def times(self, count: int) -> "Held":
        """Of so many."""
        values = self.weights, self.gradients, self.optimizer, self.together, self.raw_gradients
        return Held(*(count * value for value in values))

    def plus(self, other: "Held") -> "Held":
        """Of both."""
        return Held(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.together + other.together,
            self.raw_gradients + other.raw_gradients,
        )


@dataclass(frozen=True)
class Engine:
    """Who holds what, as one process of a run sees it."""

    work: Workload
    rank: int
    """Of the whole run."""

    @property
    def spreads(self) -> bool:
        """Whether weights come together layer by layer."""
        return self.work.split.engine == "fsdp2" or self._zero == 3

    @property
    def holders(self) -> int:
        """Processes that a copy of a weight is spread over."""
        split = self.work.split
        if split.engine == "none":
            return 1
        return split.dp * split.sp // split.replicas

    @property
    def _zero(self) -> int:
        split, config = self.work.split, self.work.settings.parallel
        return config.zero_stage if split.engine == "deepspeed" else 0

    @property
    def _place(self) -> int:
        """Which shard this process has."""
        return self.rank // self.work.split.tp % self.holders

    @property
    def _width(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.work.precision].itemsize

    def of_layer(self, layer: HollowLayer) -> Held:
        """Of a layer's weights; its buffers are whole everywhere."""
        narrow = self.work.settings.parallel.weights == "bf16" and self.spreads
        held = self._of(layer.weights, 2 if narrow else self._width)
        return held.plus(Held(weights=layer.floats * self._width + layer.fixed))

    def of_outside(self, weights: Iterable[Weight]) -> Held:
        """Of embedding, norm and head, which never travel in bf16."""
        return self._of(weights, self._width)

    def _of(self, weights: Iterable[Weight], travelling: int) -> Held:
        total = Held()
        for weight in weights:
            total = total.plus(self._of_weight(weight, travelling))
        return total

    def _of_weight(self, weight: Weight, travelling: int) -> Held:
        width, states = self._width, self._states(weight)
        if self._zero:
            return self._by_zero(weight, travelling)
        if not self.spreads:
            whole = weight.numel * width
            return Held(whole, whole, states * whole + FP32 * self._counts(weight))
        length, row = weight.shape[0], weight.numel // weight.shape[0]
        rows = -(-length // self.holders)
        # Averages take what there is of a shard, weights and gradients with what fills it up.
        own = max(0, min(length - self._place * rows, rows)) * row
        padded = rows * row * width
        optimizer = states * own * width + FP32 * self._counts(weight)
        whole = rows * row * self.holders * travelling
        return Held(padded, padded, optimizer, whole, weight.numel * travelling)

    def _by_zero(self, weight: Weight, travelling: int) -> Held:
        """DeepSpeed's: flat parts, and a copy of the part of the weights beside the averages."""
        whole = weight.numel * FP32
        part = -(-weight.numel // self.holders) * FP32
        gradients = whole if self._zero == 1 else part
        if self._zero < 3:
            return Held(whole, gradients, 3 * part)
        own = whole if weight.numel <= PERSISTENT else part
        return Held(own, part, 3 * part, whole, weight.numel * travelling)

    def _states(self, weight: Weight) -> int:
        """AdamW's two averages; Muon's one."""
        return 1 if self._is_by_muon(weight) else 2

    def _counts(self, weight: Weight) -> int:
        """Steps that AdamW counts for a weight."""
        return 0 if self._is_by_muon(weight) else 1

    def _is_by_muon(self, weight: Weight) -> bool:
        return weight.is_hidden_matrix and self.work.settings.optim.kind == "muon"

    def for_update(self, held: Held, largest: int) -> int:
        """What the sum of gradients, or the update, takes besides; `largest` is the number of
        elements of the largest matrix."""
        split, muon = self.work.split, 0
        if self.work.settings.optim.kind == "muon":
            # One matrix arrives, is computed and leaves while the next arrives: counted, 8 times
            # the largest, or 9 if that is square.
            muon = 9 * largest * (2 if self.work.precision == "bf16" else self._width)
        if split.engine == "none" and split.dp * split.sp > 1:
            # All gradients in one message, and their sum.
            return max(muon, 2 * held.gradients)
        if self._zero:
            return min(held.gradients * self.holders, 2 * BUCKET * FP32)
        return muon
