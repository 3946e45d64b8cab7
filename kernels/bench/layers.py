"""Times one forward and backward pass of each mixer over the sequence length."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from report import Section, table, verdict
from sizes import Sizes
from timing import Timing, interleave, note

from longctx.config import decode
from longctx.mixers import Mixer, MixerConfig, Place
from longctx.mixers.base import HeadsConfig
from longctx.sequence.local import LocalView

MAX_GROWTH = 1.20
DEPTH = 4


@dataclass(frozen=True)
class Example:
    """A mixer to time, as its table in a config file, without its number of heads."""

    name: str
    table: dict[str, Any] = field(default_factory=dict)
    is_quadratic: bool = False
    is_judged: bool = False
    """Its cost per token must not depend on the length."""
    longest: int = 0
    """The longest sequence, where another limit would take minutes; 0 has no other."""

    def config(self, num_heads: int) -> MixerConfig:
        """The decoded table; heads are given to the mixer that has them."""
        filled = dict(self.table)
        if "inner" in filled:
            filled["inner"] = {"num_heads": num_heads, **filled["inner"]}
        elif issubclass(MixerConfig.kinds()[filled["kind"]], HeadsConfig):
            filled = {"num_heads": num_heads, **filled}
        return decode(MixerConfig, filled, path=self.name)

    def build(self, num_heads: int, place: Place) -> Mixer:
        """The mixer with matrices of unit gain, or what it draws by itself."""
        mixer = self.config(num_heads).build(place)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in mixer.modules():
                draw = getattr(module, "initial", lambda _name, _generator: None)
                for name, parameter in module.named_parameters(recurse=False):
                    value = draw(name, generator)
                    if value is not None:
                        parameter.copy_(value)
                    elif parameter.dim() > 1:
                        parameter.normal_(std=place.width**-0.5, generator=generator)
        return mixer


LIGHTNING = {"kind": "linear", "feature_map": "silu", "decay": "alibi", "gate": "sigmoid"}


def _linear(name: str, **table: Any) -> Example:
    return Example(f"linear: {name}", {"kind": "linear", **table}, is_judged=True)


EXAMPLES = (
    _linear("elu1, denominator", feature_map="elu1", decay="none", denominator=True),
    Example("linear: lightning", LIGHTNING, is_judged=True),
    _linear("hedgehog", feature_map="hedgehog", decay="none", denominator=True),
    _linear("based", feature_map="based", decay="none", denominator=True),
    *(
        Example(kind, {"kind": kind}, is_judged=True)
        for kind in ("gla", "hgrn2", "mamba2", "deltanet", "gdn", "kda", "titans")
    ),
    Example("titans: MAG, window 512", {"kind": "titans", "window": 512, "persistent": 16}),
    *(
        Example(kind, {"kind": kind}, is_judged=True)
        for kind in ("aaren", "agent", "efficient", "favor", "rala", "flowformer")
    ),
    Example("softmax: window 512", {"kind": "softmax", "window": 512}),
    Example(
        "moh, 4 of 8 heads: softmax, window 512",
        {
            "kind": "moh",
            "shared_heads": 2,
            "active_heads": 2,
            "inner": {"kind": "softmax", "window": 512},
        },
    ),
    Example("softmax: full", {"kind": "softmax"}, is_quadratic=True),
    Example(
        "sum: softmax, window 512, and mosa",
        {
            "kind": "sum",
            "parts": {
                "near": {"kind": "softmax", "num_heads": 4, "window": 512},
                "routed": {"kind": "mosa", "num_heads": 16},
            },
        },
    ),
    Example("lla", {"kind": "lla"}, longest=4096),
)


def examples() -> tuple[Example, ...]:
    """The examples above, and each registered kind without one, with its default options."""
    shown = {example.table["kind"] for example in EXAMPLES}
    others = sorted(set(MixerConfig.kinds()) - shown)
    return EXAMPLES + tuple(Example(kind, {"kind": kind}, is_quadratic=True) for kind in others)


def time_mixers(sizes: Sizes) -> Section:
    """Microseconds per token of every example at every length, and whether linear ones stay."""
    rows, timings, verdicts = [], {}, []
    for example in examples():
        print(f"  {example.name}", file=sys.stderr, flush=True)
        measured = _time_lengths(example, sizes)
        timings |= {(example.name, length): timing for length, timing in measured.items()}
        micros = {length: timing.seconds / length * 1e6 for length, timing in measured.items()}
        growth = max(micros.values()) / min(micros.values())
        cells = [f"{micros[length]:.1f}" if length in micros else "" for length in sizes.lengths]
        rows.append([example.name, *cells, f"{growth:.2f}"])
        if example.is_judged:
            text = f"{example.name}: max/min {growth:.2f} (at most {MAX_GROWTH:.2f})"
            verdicts.append(verdict(text, growth <= MAX_GROWTH, sizes.is_judged))
    heads = f"{sizes.num_heads} heads x {sizes.head_dim}"
    header = ["mixer", *(f"T {length}" for length in sizes.lengths), "max/min"]
    return Section(
        "Mixers: forward and backward, microseconds per token",
        [
            f"One layer with its projections, B 1, width {sizes.width}, {heads}, fp32.",
            table(header, rows),
            note(timings),
        ],
        verdicts,
    )


def _time_lengths(example: Example, sizes: Sizes) -> dict[int, Timing]:
    mixer = example.build(sizes.num_heads, Place(sizes.width, 0, DEPTH))
    limit = sizes.quadratic_limit if example.is_quadratic else max(sizes.lengths)
    limit = min(limit, example.longest or limit)
    lengths = [length for length in sizes.lengths if length <= limit]
    operations = {str(length): forward_backward(mixer, length, sizes.width) for length in lengths}
    calls = {str(length): max(1, sizes.tokens_per_sample // length) for length in lengths}
    timings = interleave(operations, sizes.repeats, calls)
    return {int(name): timing for name, timing in timings.items()}


def forward_backward(mixer: Mixer, length: int, width: int) -> Callable[[], None]:
    """A call that runs `mixer` on fixed random input and differentiates input and weights."""
    x_BTD = torch.randn(1, length, width, requires_grad=True)
    dout_BTD = torch.randn(1, length, width)
    view = LocalView.whole(1, length)

    def run() -> None:
        x_BTD.grad = None
        mixer.zero_grad()
        mixed = mixer(x_BTD, view)
        torch.autograd.backward(
            [mixed.out, *mixed.losses.values()], [dout_BTD, *(None for _ in mixed.losses)]
        )

    return run
