"""A case computes something per token, once on whole sequences and once on shards of them.

The same case runs on one process, on simulated ranks and on gloo ranks; outputs and gradients are
compared token by token, gradients of what all ranks share after summing over ranks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longctx.sequence.ledger import Label, Ledger, Traffic
from longctx.sequence.placement import place
from longctx.sequence.plan import Documents, Plan
from longctx.sequence.sharded import Links, ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from longctx.sequence.verbs import Wire
from tests.sequence.links import simulated_links
from tests.tolerances import error_of

LENGTH = 31
DOCUMENTS: Documents = ((0,), (0, 7, 8, 15, 16, 27))
"""Of two rows: one document; six, that begin inside, at and across cuts, two of length 1."""
LAYER = 3

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A batch and its split."""

    ranks: int
    placement: str = "contiguous"
    transports: Transports = field(default_factory=Transports)
    length: int = LENGTH
    documents: Documents = DOCUMENTS
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def with_seed(self, seed: int) -> "Setting":
        """The same split of other inputs."""
        return replace(self, seed=seed)

    def plan(self, rank: int) -> Plan:
        """What a rank holds."""
        placement = place(self.placement, self.ranks, self.length, self.transports.heads)
        return Plan(placement, rank, self.documents)

    def __str__(self) -> str:
        t = self.transports
        heads = f"-{t.heads}heads" if t.heads > 1 else ""
        return f"{self.placement}-{t.prefix}-{t.stream}{t.gather_heads}{heads}-{self.ranks}ranks"


@dataclass(frozen=True)
class Shard:
    """What a sharded computation may use on one rank."""

    setting: Setting
    plan: Plan
    links: Links

    def label(self, verb: str) -> Label:
        """Where its exchanges are counted."""
        return Label(LAYER, verb)

    def wire(self, verb: str) -> Wire:
        """The whole group of the sequence."""
        return Wire(self.plan, self.links.sequence, self.label(verb))

    @property
    def view(self) -> ShardedView:
        """For mixers."""
        return ShardedView(self.plan, self.links, self.setting.transports, LAYER)


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs `[B, T, *shape]` by name and shared ones `[*shape]`, to outputs `[B, T, ...]`."""

    name: str
    tokens: dict[str, tuple[int, ...]]
    sharded: Callable[[Shard, Values], Tensor]
    whole: Callable[[Setting, Values], Tensor]
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def inputs(self, setting: Setting) -> tuple[Values, Values]:
        """(per token, shared) random values; shared vectors lie around 1."""
        generator = torch.Generator().manual_seed(setting.seed)
        rows = (len(setting.documents), setting.length)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        tokens = {name: leaf(*rows, *shape) for name, shape in self.tokens.items()}
        return tokens, {
            name: (len(shape) == 1) + 0.3 * leaf(*shape) for name, shape in self.shared.items()
        }


@dataclass
class Result:
    """What one rank found; `ids` are the positions of its tokens."""

    ids: Tensor
    per_token: Values
    shared: Values
    traffic: dict[Label, Traffic] = field(default_factory=dict)
    counted: Traffic | None = None


def loss_weight(shape: torch.Size) -> Tensor:
    """Random weights of the outputs of whole sequences in the loss that is differentiated."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def differentiate(
    out: Tensor, ids: Tensor, length: int, tokens: Values, shared: Values
) -> tuple[Values, Values]:
    """Output and gradients of its weighted sum: (per token, of shared leaves)."""
    per_token, totals = {"output": out.detach()}, {}
    if out.requires_grad:
        weight = loss_weight(torch.Size((out.shape[0], length, *out.shape[2:])))[:, ids].to(out)
        (out * weight).sum().backward()
        for name, x in (tokens | shared).items():
            gradient = torch.zeros_like(x) if x.grad is None else x.grad
            (per_token if name in tokens else totals)[f"gradient of {name}"] = gradient
    return per_token, totals


def run_shard(case: Case, setting: Setting, rank: int, links: Links) -> Result:
    """The case on one rank, from the same global inputs on every rank."""
    plan = setting.plan(rank)
    ids = plan.token_ids_BT[0]
    tokens, shared = case.inputs(setting)
    tokens = {name: x[:, ids].to(setting.dtype).requires_grad_() for name, x in tokens.items()}
    shared = {name: x.to(setting.dtype).requires_grad_() for name, x in shared.items()}
    out = case.sharded(Shard(setting, plan, links), tokens | shared)
    values = differentiate(out, ids, setting.length, tokens, shared)
    return Result(ids, *values, links.sequence.ledger.traffic())


def run_simulated(case: Case, setting: Setting) -> list[Result]:
    """The case on threads."""

    def work(rank: int, hub: Any) -> Result:
        links = simulated_links(hub, rank, setting.ranks, setting.transports.heads, Ledger())
        return run_shard(case, setting, rank, links)

    return run_ranks(setting.ranks, work)


def run_whole(case: Case, setting: Setting) -> tuple[Values, Values]:
    """The case on one process."""
    tokens, shared = case.inputs(setting)
    tokens = {name: x.to(setting.dtype).requires_grad_() for name, x in tokens.items()}
    shared = {name: x.to(setting.dtype).requires_grad_() for name, x in shared.items()}
    out = case.whole(setting, tokens | shared)
    return differentiate(out, torch.arange(setting.length), setting.length, tokens, shared)


@functools.cache
def expected_of(case: Case, setting: Setting) -> tuple[Values, Values]:
    """Result of one process; the split does not matter unless the case says so."""
    return run_whole(case, setting)


def errors(results: list[Result], expected: tuple[Values, Values]) -> dict[str, float]:
    """Error by name, the largest over ranks."""
    per_token, shared = expected
    found = {
        name: max(error_of(r.per_token[name], value[:, r.ids], "fp64") for r in results)
        for name, value in per_token.items()
    }
    for name, value in shared.items():
        found[name] = error_of(sum(r.shared[name] for r in results), value, "fp64")
    return found
