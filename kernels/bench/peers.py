"""Compares Lightning Attention with the layer of transformers' MiniMax model.

The core is compared by running the peer's own forward: its projections, norm and gate become
modules that do nothing, so that a packed q, k, v goes in and what its norm would see comes out.
"""

from collections.abc import Callable

import torch
from checks import difference
from layers import DEPTH, LIGHTNING, Example, forward_backward
from longctx_kernels.decay_attention import decay_attention
from report import Section, table, verdict, version
from sizes import Sizes
from timing import interleave, note
from torch import Tensor, nn

from longctx.mixers import Place

TOLERANCE = 1e-4
TARGET = 1.5
TITLE = "Peer: Lightning Attention of transformers' MiniMax"


class Tap(nn.Module):
    """Stands for the output norm: keeps what reaches it and passes on nothing."""

    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """An empty slice, so that gate and output projection have nothing to do."""
        self.seen = x
        return x[..., :0]


class Empty(nn.Module):
    """Stands for the gate."""

    def forward(self, x: Tensor) -> Tensor:
        """An empty slice."""
        return x[..., :0]


def compare_peer(sizes: Sizes) -> tuple[Section, str]:
    """Speed of the core and of the whole layer beside the peer's; an error if they disagree."""
    if not version("transformers"):
        text = "Skipped: transformers is not installed (pip install 'longctx[bench]')."
        return Section(TITLE, [text]), ""
    torch.manual_seed(0)
    core = _cores(sizes)
    results, references = core["longctx"](), core["transformers"]()
    error = max(difference([a], [b]) for a, b in zip(results, references, strict=True))
    if not error <= TOLERANCE:
        return Section(TITLE, []), _red(error)
    pairs = {"core": core, "whole layer": _layers(sizes)}
    timings = {name: interleave(pair, sizes.repeats) for name, pair in pairs.items()}
    return _section(sizes, timings, error), ""


def _red(error: float) -> str:
    return f"the core differs from transformers' by {error:.1e} (allowed {TOLERANCE:.0e})"


def _peer_layer(sizes: Sizes) -> nn.Module:
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=sizes.width,
        num_attention_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        num_hidden_layers=DEPTH,
        layer_types=["linear_attention"] * DEPTH,
    )
    return MiniMaxLightningAttention(config, layer_idx=0)


def _cores(sizes: Sizes) -> dict[str, Callable[[], list[Tensor]]]:
    """Both cores on one packed q, k, v `[1, T, H, 3 D]` and the peer's decay."""
    peer = _peer_layer(sizes)
    peer.qkv_proj = peer.act_fn = peer.out_proj = nn.Identity()
    peer.norm, peer.output_gate = Tap(), Empty()
    g_H = -peer.slope_rate.flatten()
    shape = (1, sizes.peer_length, sizes.num_heads, 3 * sizes.head_dim)
    qkv = torch.randn(shape).div_(2).requires_grad_()
    dout = torch.randn(1, sizes.peer_length, sizes.width)

    def run_peer() -> list[Tensor]:
        peer(qkv.flatten(2), position_embeddings=None, attention_mask=None)
        return [peer.norm.seen, *torch.autograd.grad(peer.norm.seen, qkv, dout)]

    def run_ours() -> list[Tensor]:
        out, _ = decay_attention(*qkv.split(sizes.head_dim, -1), g_gamma=g_H, scale=1.0)
        return [out.flatten(2), *torch.autograd.grad(out.flatten(2), qkv, dout)]

    return {"longctx": run_ours, "transformers": run_peer}


def _layers(sizes: Sizes) -> dict[str, Callable[[], object]]:
    """Whole layers of equal sizes, projections, norm and gate included."""
    mixer = Example("peer", LIGHTNING).config(sizes.num_heads).build(Place(sizes.width, 0, DEPTH))
    peer = _peer_layer(sizes)
    x_BTD = torch.randn(1, sizes.peer_length, sizes.width, requires_grad=True)
    dout_BTD = torch.randn(1, sizes.peer_length, sizes.width)

    def run_peer() -> None:
        x_BTD.grad = None
        peer.zero_grad()
        peer(x_BTD, position_embeddings=None, attention_mask=None)[0].backward(dout_BTD)

    ours = forward_backward(mixer, sizes.peer_length, sizes.width)
    return {"longctx": ours, "transformers": run_peer}


def _section(sizes: Sizes, timings: dict, error: float) -> Section:
    ratios = {
        n: pair["transformers"].seconds / pair["longctx"].seconds for n, pair in timings.items()
    }
    rows = [
        [name, *(f"{timing.seconds * 1e3:.0f}" for timing in pair.values()), f"{ratios[name]:.2f}"]
        for name, pair in timings.items()
    ]
    shape = f"B 1, T {sizes.peer_length}, {sizes.num_heads} heads x {sizes.head_dim}"
    text = f"core, peer over ours: {ratios['core']:.2f} (at least {TARGET})"
    return Section(
        TITLE,
        [
            f"Forward and backward, {shape}, fp32, transformers {version('transformers')}; "
            "the peer runs its own code with its own block size and decay.",
            table(["part", "longctx ms", "transformers ms", "ratio"], rows),
            "Core: the same packed q, k, v in, outputs in the same layout out; output and "
            f"gradients agree to {error:.0e} (allowed {TOLERANCE:.0e}). Whole layer: as many "
            "projections of the same sizes, but not the same function: the peer norms all heads "
            "together and also applies silu to v.",
            note({(n, who): t for n, pair in timings.items() for who, t in pair.items()}),
        ],
        [verdict(text, ratios["core"] >= TARGET, sizes.is_judged)],
    )
