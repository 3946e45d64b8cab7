"""Times softmax attention of all heads beside that of the ones that tokens choose, as in MoH.

`python kernels/bench/routed_heads.py --length 4096` prints the table alone.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from checks import difference
from longctx_kernels.lifetime_attention import flash_lifetime
from report import Section, table
from sizes import FULL, Sizes
from timing import interleave, note
from torch import Tensor

from longctx.sequence.local import LocalView
from longctx.sequence.routed import attend_routed

SHARES = (0.25, 0.5, 0.75, 0.9)
TOLERANCE = 1e-10
TOKENS = 300
TITLE = "Routed heads: skipping those that a token does not choose"
ALL, SAME = "all", "all, by the routed kernel"


def compare_routed(sizes: Sizes) -> tuple[Section, str]:
    """Both ways at the shortest length; an error if they disagree."""
    error = max(map(difference, *zip(*_pairs(sizes))))
    if not error <= TOLERANCE:
        return Section(TITLE, []), (
            f"routed heads differ from all heads by {error:.1e} (allowed {TOLERANCE:.0e})"
        )
    length = sizes.lengths[0]
    timings = interleave(_cores(length, sizes, torch.float32), sizes.repeats)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    rows = [
        [name, f"{time * 1e3:.0f}", f"{seconds[ALL] / time:.2f}", f"{seconds[SAME] / time:.2f}"]
        for name, time in seconds.items()
    ]
    shape = f"B 1, T {length}, {sizes.num_heads} heads x {sizes.head_dim}"
    section = Section(
        TITLE,
        [
            f"Forward and backward of the core, {shape}, fp32, all heads by PyTorch's fused "
            "attention or by the kernel that can skip. Output and all gradients agree to "
            f"{error:.0e} (allowed {TOLERANCE:.0e}).",
            table(["heads", "ms", f"{ALL}, over this", f"{SAME}, over this"], rows),
            *(_pays(seconds, measure) for measure in (ALL, SAME)),
            note(timings),
        ],
    )
    return section, ""


def _pays(seconds: dict[str, float], measure: str) -> str:
    """Up to which share of heads it is faster to skip the others."""
    paying = [name for name in _names() if seconds[name] < seconds[measure]]
    share = f"while a token uses at most {paying[-1]} of its heads" if paying else "at no share"
    return f"Skipping pays {share}, against {measure}."


def _names() -> dict[str, float]:
    return {f"{share:.0%}": share for share in SHARES}


def _cores(length: int, sizes: Sizes, dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    """Output and gradients, of all heads and of shares of them."""
    inputs, view = _inputs(length, sizes, dtype), LocalView.whole(1, length)
    attend: dict[str, Callable[..., Tensor]] = {
        ALL: partial(view.softmax_attention, window=0),
        SAME: lambda q, k, v: flash_lifetime(q, k, v)[0],
    }
    for name, share in _names().items():
        chosen = _chosen(length, sizes, share)
        attend[name] = lambda *x, chosen=chosen: attend_routed(view, x, chosen, 0, "auto")
    return {name: partial(_differentiated, call, inputs) for name, call in attend.items()}


def _pairs(sizes: Sizes) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Results of each share in fp64, and what they should be."""
    inputs, view = _inputs(TOKENS, sizes, torch.float64), LocalView.whole(1, TOKENS)
    cores = _cores(TOKENS, sizes, torch.float64)
    for name, share in _names().items():
        chosen = _chosen(TOKENS, sizes, share)[..., None]
        masked = lambda *x, c=chosen: view.softmax_attention(*x, window=0) * c  # noqa: E731
        yield cores[name](), _differentiated(masked, inputs)


def _inputs(length: int, sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, length, sizes.num_heads, sizes.head_dim)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def _chosen(length: int, sizes: Sizes, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, length, sizes.num_heads, generator=generator) < share


def _differentiated(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def main() -> int:
    """Prints the section for one length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=FULL.lengths[0], help="tokens")
    parser.add_argument("--repeats", type=int, default=FULL.repeats, help="samples of each")
    options = parser.parse_args()
    sizes = replace(FULL, lengths=(options.length,), repeats=options.repeats)
    section, red = compare_routed(sizes)
    print(red or section)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
