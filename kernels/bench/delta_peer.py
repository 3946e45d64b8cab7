"""Compares the gated delta rule with the chunked PyTorch code of transformers' Qwen3-Next."""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from checks import difference
from longctx_kernels.delta_attention import delta_attention
from report import Section, table, verdict, version
from sizes import Sizes
from timing import interleave, note
from torch import Tensor

TOLERANCE = 1e-4
TARGET = 1.0
TITLE = "Peer: the gated delta rule of transformers' Qwen3-Next"


def compare_delta_peer(sizes: Sizes) -> tuple[Section, str]:
    """Speed of the core beside the peer's; an error if they disagree."""
    if not version("transformers"):
        text = "Skipped: transformers is not installed (pip install 'longctx[bench]')."
        return Section(TITLE, [text]), ""
    torch.manual_seed(0)
    cores = _cores(sizes)
    error = difference(cores["longctx"](), cores["transformers"]())
    if not error <= TOLERANCE:
        return Section(TITLE, []), (
            f"the delta rule differs from transformers' by {error:.1e} (allowed {TOLERANCE:.0e})"
        )
    timings = interleave(cores, sizes.repeats)
    ratio = timings["transformers"].seconds / timings["longctx"].seconds
    cells = [f"{timing.seconds * 1e3:.0f}" for timing in timings.values()]
    shape = f"B 1, T {sizes.peer_length}, {sizes.num_heads} heads x {sizes.head_dim}"
    section = Section(
        TITLE,
        [
            f"Forward and backward of the core, {shape}, fp32, a decay per head and token, "
            f"transformers {version('transformers')}; its backward pass is autograd's. Output and "
            f"all gradients agree to {error:.0e} (allowed {TOLERANCE:.0e}).",
            table(
                ["part", "longctx ms", "transformers ms", "ratio"],
                [["core", *cells, f"{ratio:.2f}"]],
            ),
            note({("core", who): timing for who, timing in timings.items()}),
        ],
        [
            verdict(
                f"core, peer over ours: {ratio:.2f} (at least {TARGET})",
                ratio >= TARGET,
                sizes.is_judged,
            )
        ],
    )
    return section, ""


def _cores(sizes: Sizes) -> dict[str, Callable[[], list[Tensor]]]:
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    peer = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)
    shape = (1, sizes.peer_length, sizes.num_heads)
    q, k, v = (torch.randn(*shape, sizes.head_dim) for _ in range(3))
    leaves = [q, F.normalize(k, dim=-1), v, torch.rand(shape), F.logsigmoid(torch.randn(shape) + 3)]
    leaves = [x.requires_grad_() for x in leaves]
    dout = torch.randn_like(v)

    def run(core: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            out = core()
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        return call

    q, k, v, beta, g = leaves
    return {
        "longctx": run(lambda: delta_attention(q, k, v, beta, g=g)[0]),
        "transformers": run(lambda: peer(q, k, v, g=g, beta=beta)[0]),
    }
