"""What the GPU bench times, and the targets."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from gpu_checks import TOLERANCE, relative_error
from gpu_delta import delta_groups
from gpu_items import OURS, PRECISION, Item, Items, random_values
from gpu_peers import decay_peers, lightning_gamma, sdpa
from gpu_problems import Tensors
from gpu_routed import SHARES, routed_groups, routed_name
from gpu_small import small_groups, small_names
from gpu_timing import Cost, cost
from longctx_kernels.decay_attention import decay_attention
from longctx_kernels.lifetime_attention import flash_lifetime
from torch import Tensor

WINDOW = 4096
SHAPES = (
    (2, 16384, 16, 128),
    (1, 131072, 16, 128),
    (8, 2048, 32, 256),
    (1, 8192, 96, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 1024, 8, 64),
)
"""B, T, H, D: the first three have targets, all but the second are fla's standard ones."""

LENGTHS, LONG, FULL_HEADS = (8192, 32768), 131072, 16
TINY_SHAPES, TINY_LENGTHS, TINY_LONG = ((2, 48, 2, 16),) * 3, (48, 80), 160
PEER_LIMIT = 2e-2
"""A peer whose error is larger does not compute the same and is no measure."""


@dataclass(frozen=True)
class Row:
    """Errors and cost of one way to compute an item; a note if it was not timed."""

    item: str
    who: str
    errors: dict[str, float] = field(default_factory=dict)
    cost: Cost | None = None
    note: str = ""

    @property
    def worst(self) -> float:
        """Largest of the errors."""
        return max(self.errors.values(), default=float("inf"))


def groups(device: torch.device, tiny: bool) -> Iterator[Items]:
    """Everything that is timed, what has targets first."""
    shapes = TINY_SHAPES if tiny else SHAPES
    for gate in ("constant", "scalar", "diagonal"):
        chosen = dict.fromkeys(shapes if gate == "constant" else shapes[:1])
        makers = tuple(
            (decay_name(gate, shape), partial(_decay_item, gate, shape, device)) for shape in chosen
        )
        yield Items(f"Decay attention, {gate} gate", f"decay {gate}", makers)
    lengths, long = (TINY_LENGTHS, TINY_LONG) if tiny else (LENGTHS, LONG)
    H, D, window = (2, 16, 20) if tiny else (FULL_HEADS, 128, WINDOW)
    makers = [
        (f"causal T{T}", partial(_causal_item, (T, H, D), None, device)) for T in (*lengths, long)
    ]
    makers.append((f"window T{long}", partial(_causal_item, (long, H, D), window, device)))
    yield Items("Lifetime attention", "lifetime", tuple(makers))
    yield from routed_groups((lengths[-1], H, D), device)
    yield from delta_groups(device, tiny)
    yield from small_groups(device, tiny)


def decay_name(gate: str, shape: tuple[int, ...]) -> str:
    """Of an item, as in the report."""
    return f"{gate} " + " ".join(f"{letter}{size}" for letter, size in zip("BTHD", shape))


def time_item(make: Callable[[], Item], device: torch.device) -> Iterator[Row]:
    """Ours first: if it is wrong at this shape nothing of the item is timed."""
    item = make()
    first = next(iter(item.inputs.values()))
    heads = _some_heads(first)
    with torch.no_grad():
        dout = torch.randn_like(item.runs[OURS](item.inputs))
    expected = _reference(item, heads, dout)
    for who, run in item.runs.items():
        row = Row(item.name, who)
        try:
            row = replace(row, errors=_errors(item, run, heads, dout, expected))
            if who == OURS and not row.worst <= TOLERANCE[PRECISION]:
                name = max(row.errors, key=row.errors.get)
                yield replace(row, note=f"not timed: {name} off by {row.worst:.1e} at this shape")
                return
            yield replace(row, cost=_cost(item.inputs, run, dout, device))
        except Exception as error:  # a peer may refuse this machine: that is a result too
            yield replace(row, note=f"{type(error).__name__}: {str(error)[:200]}")
            if who == OURS:
                return
        print(f"    {who}", file=sys.stderr, flush=True)


def _errors(item: Item, run, heads: list[int], dout: Tensor, expected: Tensors) -> dict[str, float]:
    leaves = _leaves(item.inputs)
    out = run(leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    named = {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads)}
    return {name: relative_error(item.part(x, heads), expected[name]) for name, x in named.items()}


def _reference(item: Item, heads: list[int], dout: Tensor) -> Tensors:
    leaves = _leaves({name: item.part(x, heads).double() for name, x in item.inputs.items()})
    out = item.reference(leaves, heads)
    cotangent = item.part(dout, heads).double()
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def _cost(inputs: Tensors, run, dout: Tensor, device: torch.device) -> Cost:
    leaves = _leaves(inputs)

    def forward() -> None:
        with torch.no_grad():
            run(leaves)

    def both() -> None:
        torch.autograd.grad(run(leaves), list(leaves.values()), dout)

    return cost(forward, both, device)


def _leaves(inputs: Tensors) -> Tensors:
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


def _some_heads(q: Tensor) -> list[int]:
    """Rows and heads are alike, so a few tell; decays differ from the first to the last head."""
    H = q.shape[2]
    return sorted({0, H // 2, H - 1}) if q.shape[1] <= 32768 else [H // 2]


def _decay_item(gate: str, shape: tuple[int, ...], device: torch.device) -> Item:
    B, T, H, D = shape
    inputs = {name: random_values(B, T, H, D, device=device) for name in "qkv"}
    gamma_H = lightning_gamma(H, device)
    if gate == "scalar":
        inputs["g"] = torch.nn.functional.logsigmoid(torch.randn(B, T, H, device=device))
    if gate == "diagonal":
        inputs["g"] = torch.nn.functional.logsigmoid(torch.randn(B, T, H, D, device=device)) / 16
    name = {"constant": "g_gamma", "scalar": "g", "diagonal": "gk"}[gate]

    def ours(x: Tensors, gamma=gamma_H, backend: str = "auto") -> Tensor:
        gates = {name: x.get("g", gamma)}
        return decay_attention(x["q"], x["k"], x["v"], **gates, backend=backend)[0]

    return Item(
        f"decay {gate}",
        decay_name(gate, shape),
        inputs,
        {OURS: ours} | decay_peers(gate, gamma_H),
        lambda x, heads: ours(x, gamma_H[heads].double(), "torch"),
    )


def _causal_item(shape: tuple[int, ...], window: int | None, device: torch.device) -> Item:
    T, H, D = shape
    inputs = {name: random_values(1, T, H, D, device=device) for name in "qkv"}
    expiry = None
    if window is not None:
        expiry = torch.arange(T, dtype=torch.int32, device=device)[None] + window

    def ours(x: Tensors, backend: str = "auto") -> Tensor:
        return flash_lifetime(x["q"], x["k"], x["v"], expiry, backend=backend)[0]

    # At the longest length ours is the measure of the window; the peer would only take time.
    peers = {"torch SDPA flash": sdpa} if window is None and T < LONG else {}
    name = f"causal T{T}" if window is None else f"window T{T}"
    return Item("lifetime", name, inputs, {OURS: ours} | peers, lambda x, _: ours(x, "torch"))


@dataclass(frozen=True)
class Target:
    """A bound on a number that rows give, if they are all there."""

    text: str
    value: Callable[["Rows"], float]
    bound: float
    at_least: bool = True

    def line(self, rows: "Rows", unjudged: str) -> str:
        """PASS or FAIL with the number; `unjudged`: why nothing is judged."""
        bound = f"{self.text} ({'at least' if self.at_least else 'at most'} {self.bound:g})"
        if unjudged:
            return f"{unjudged}: not judged: {bound}"
        try:
            value = self.value(rows)
        except LookupError as error:
            return f"not judged: {bound}: no {error.args[0]}"
        is_met = value >= self.bound if self.at_least else value <= self.bound
        return f"{'PASS' if is_met else 'FAIL'}: {bound}: {value:.3g}"


class Rows(list[Row]):
    """Rows, by item and who."""

    def of(self, item: str, who: str = OURS) -> Row:
        """The timed row."""
        for row in self:
            if row.item == item and row.who == who and row.cost is not None:
                return row
        raise LookupError(f"timing of {item} by {who}")

    def peer(self, item: str) -> Row:
        """The fastest peer that is right."""
        found = [row for row in self if row.item == item and row.who != OURS and row.cost]
        found = [row for row in found if row.worst <= PEER_LIMIT]
        if not found:
            raise LookupError(f"peer for {item} (not installed, refused, or wrong)")
        return min(found, key=lambda row: row.cost.both.median)

    def milliseconds(self, item: str) -> float:
        """Ours, forward and backward."""
        return self.of(item).cost.both.median

    def over_peer(self, item: str) -> float:
        """Time of the peer over ours."""
        return self.peer(item).cost.both.median / self.milliseconds(item)

    def error_over_peer(self, item: str) -> float:
        """Our worst error over the peer's."""
        return self.of(item).worst / self.peer(item).worst


def paying_share(rows: Rows, length: int) -> float:
    """The largest share of active heads at which it is faster to skip the others; 0 if none is."""
    everything = rows.milliseconds(f"causal T{length}")
    times = {share: rows.milliseconds(routed_name(length, share)) for share in SHARES}
    return max((share for share, time in times.items() if time < everything), default=0.0)


def targets() -> Iterator[Target]:
    """Of forward and backward on one H200."""
    first, long, wide = (decay_name("constant", shape) for shape in SHAPES[:3])
    for name in (first, long, wide):
        yield Target(f"{name}: fla's time over ours", lambda r, n=name: r.over_peer(n), 2.0)
    yield Target(f"{first}: ms", lambda r: r.milliseconds(first), 1.2, at_least=False)
    others = [decay_name(gate, SHAPES[0]) for gate in ("scalar", "diagonal")]
    for name in (first, long, wide, *others):
        text = f"{name}: our worst error over fla's"
        yield Target(text, lambda r, n=name: r.error_over_peer(n), 1.0, at_least=False)
    for T in LENGTHS:
        text, name = f"causal T{T}: our time over SDPA's", f"causal T{T}"
        yield Target(text, lambda r, n=name: 1 / r.over_peer(n), 1.15, at_least=False)
    text = f"routed heads at T{LENGTHS[-1]}: largest share of active heads that pays"
    yield Target(text, lambda r: paying_share(r, LENGTHS[-1]), 0.5)
    for name, bound in zip(small_names(), (1.3, 1.0, 2.0)):
        yield Target(f"{name}: peer's time over ours", lambda r, n=name: r.over_peer(n), bound)
    yield Target(
        f"window {WINDOW} at T{LONG}: time of full causal over the window's",
        lambda r: r.milliseconds(f"causal T{LONG}") / r.milliseconds(f"window T{LONG}"),
        8.0,
    )
