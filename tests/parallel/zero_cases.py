"""Steps of a tiny decoder inside an engine, on random tokens."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.config import apply_overrides
from longctx.model.decoder import Decoder, initialise
from longctx.model.memory import MemoryConfig
from longctx.parallel import Mesh, ParallelConfig, resolve, zero
from longctx.parallel.box import Box
from longctx.parallel.deepspeed import DeepSpeedEngine
from longctx.parallel.engine import Engine, Replicated
from longctx.parallel.zero import Zero
from longctx.train.optim import build_optimizer
from longctx.train.settings import Settings, load_settings

LENGTH, ROWS, VOCABULARY, CLIP = 24, 4, 50, 0.5
CPU = torch.device("cpu")


def settings() -> Settings:
    """Of the tiny preset, smaller still; the loss adds up over rows, so splits do not matter."""
    argv = ["--model.width", "32", "--model.pattern", "LS", "--model.depth", "2"]
    argv += ["--model.mixers.S.balance_weight", "0"]
    return apply_overrides(load_settings("tiny"), argv, "test")


def mesh_of(ranks: int, sp: int) -> Mesh:
    """The mesh of the ranks of a test, which may have met already."""
    config = ParallelConfig(sp=sp, engine="deepspeed")
    split = resolve(config, settings().model.layers, ranks, LENGTH)
    return Mesh(split, CPU, 60)


def build(
    mesh: Mesh,
    micro: int = 1,
    memory: MemoryConfig | None = None,
    **options: Any,
) -> "Course":
    """A new model inside DeepSpeed with these options, without any inside `none`."""
    config = settings()
    model = Decoder(config.model, VOCABULARY, memory)
    initialise(model, 0)
    optimizer = build_optimizer(model, config.optim)
    if not options:
        return Course(Replicated(model, optimizer, CLIP, mesh), mesh, micro)
    zero.PERSISTENT = 40  # weights of norms stay whole, matrices do not
    options = {"micro_batches": micro, "clip_norm": CLIP} | options
    return Course(DeepSpeedEngine(model, optimizer, Zero(**options), mesh), mesh, micro)


@dataclass
class Course:
    """What an engine is trained with."""

    engine: Engine
    mesh: Mesh
    micro: int
    bf16: bool = False

    def _rows(self, number: int) -> Tensor:
        """This process's rows of a batch, whole."""
        generator = torch.Generator().manual_seed(number)
        both = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        return both.chunk(self.mesh.split.dp)[self.mesh.dp_rank]

    def _loss(self, both: Tensor) -> Tensor:
        """This process's share of the loss of some rows of a batch."""
        tokens, labels = (
            torch.cat([x[:, a:b] for a, b in self.mesh.segments(LENGTH)], 1)
            for x in (both[:, :-1], both[:, 1:])
        )
        view = self.mesh.view(((0,),) * len(both), LENGTH)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            losses = self.engine.model(tokens, labels, view)
        share = len(both) / ROWS / self.mesh.split.sp
        return losses.cross_entropy / (ROWS * LENGTH) + sum(losses.mixers.values()) * share

    def accumulate(self, number: int, factor: float = 1.0) -> float:
        """Backward passes of a step; the loss over all processes."""
        total = torch.zeros(())
        self.engine.model.train()
        for rows in self._rows(number).chunk(self.micro):
            loss = self._loss(rows)
            self.engine.backward(loss * factor)
            total += loss.detach()
        return float(self.mesh.sum(total, "loss"))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Loss of a batch that no step sees."""
        self.engine.model.eval()
        return float(self.mesh.sum(self._loss(self._rows(1000)), "loss"))

    def train(self, numbers: Iterable[int]) -> list[tuple[float, ...]]:
        """Loss, gradient norm, loss on other data and update norm of each step."""
        rows = []
        for number in numbers:
            loss, norm = self.accumulate(number), self.engine.gradient_norm()
            update = self.engine.update(1e-3 * (1 + number % 3))
            rows.append((loss, float(norm), self.evaluate(), float(update)))
        return rows

    def gathered(self) -> dict[str, Tensor]:
        """All that a checkpoint would hold, on every process."""
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, self.engine.boxes())
        return held(everybody)


def worst(rows: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> float:
    """Largest difference of losses and gradient norms."""
    pairs = zip(rows, expected, strict=True)
    return max(abs(x - y) for a, b in pairs for x, y in zip(a[:3], b[:3]))


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of the elements of equal names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def held(boxes: list[list[Box]]) -> dict[str, Tensor]:
    """The whole tensors that the boxes of all processes make; NaN where none has anything."""
    whole: dict[str, Tensor] = {}
    for box in (box for own in boxes for box in own):
        tensor = whole.setdefault(box.name, torch.full(box.shape, math.nan))
        there = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.tensor.shape))
        assert tensor[there].isnan().all(), f"{box.name} is written twice"
        tensor[there] = box.tensor
    return whole


def reader(whole: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Reads blocks as a checkpoint does."""

    def read(name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, shape))].clone()

    return read
