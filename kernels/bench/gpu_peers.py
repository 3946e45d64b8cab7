"""The peers of the GPU bench: flash-linear-attention, and torch's FlashAttention-2."""

import atexit
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_problems import Tensors
from longctx_kernels.delta_attention import delta_attention
from report import version
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LAYER, LAYERS = 2, 12
Peer = Callable[[Tensors], Tensor]


def unpack_wheels(folder: Path) -> list[str]:
    """Makes the wheels in a folder importable; their names. Triton reads sources from files."""
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if wheels:
        target = tempfile.mkdtemp(prefix="wheels-")
        atexit.register(shutil.rmtree, target, ignore_errors=True)
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(target)
        sys.path.append(target)
    return [wheel.name for wheel in wheels]


def fla_version() -> str:
    """Of the installed or carried fla-core, or ""."""
    return version("fla-core")


def lightning_gamma(H: int, device: torch.device) -> Tensor:
    """Decays that `chunk_lightning_attn` makes for one of its layers."""
    return -(8 / H * (1 - LAYER / LAYERS)) * torch.arange(H, dtype=torch.float32, device=device)


def decay_peers(gate: str, gamma_H: Tensor) -> dict[str, Peer]:
    """fla's ops for a kind of gate, if it can be used here; each imports what it needs itself."""
    if not _has_fla(gamma_H.device):
        return {}
    return {
        "constant": {
            "fla simple_gla": lambda x: _simple_gla(x, g_gamma=gamma_H),
            "fla lightning": _lightning,
        },
        "scalar": {"fla simple_gla": lambda x: _simple_gla(x, g=x["g"])},
        "diagonal": {"fla gla": _gla},
    }[gate]


def _simple_gla(x: Tensors, **gate: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(x["q"], x["k"], x["v"], **gate)[0]


def _lightning(x: Tensors) -> Tensor:
    from fla.ops.lightning_attn import chunk_lightning_attn

    return chunk_lightning_attn(x["q"], x["k"], x["v"], LAYER, LAYERS)[0]


def _gla(x: Tensors) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(x["q"], x["k"], x["v"], g=x["g"])[0]


def delta_peers(gate: str, device: torch.device) -> dict[str, Peer]:
    """Of a delta rule: the backend "fla" that a mixer can choose."""
    return {f"fla {gate} delta": lambda x: _fla_delta(gate, x)} if _has_fla(device) else {}


def _fla_delta(gate: str, x: Tensors) -> Tensor:
    gates = {"none": {}, "scalar": {"g": x.get("g")}, "diagonal": {"gk": x.get("g")}}[gate]
    operands = (x["q"], x["k"], x["v"], x["beta"])
    return delta_attention(*operands, **gates, backend="fla")[0]


def convolution_peers(device: torch.device) -> dict[str, Peer]:
    """Of a short convolution of x with weight and bias, then SiLU."""
    fla = {"fla causal_conv1d": _fla_conv1d}
    return {"torch eager": _conv1d} | (fla if _has_fla(device) else {})


def norm_peers(device: torch.device, eps: float) -> dict[str, Peer]:
    """Of a gated RMSNorm."""
    peers = {"torch eager": lambda x: _rms_norm(x, eps)}
    return (
        peers | {"fla rms_norm_gated": lambda x: _fla_norm(x, eps)} if _has_fla(device) else peers
    )


def index_add(x: Tensors, index_BHE: Tensor, length: int) -> Tensor:
    """Rows of one sequence, weighted and added at their tokens by torch, in no fixed order."""
    rows_BHED = x["rows"] * x["weight"][..., None].to(x["rows"].dtype)
    out_TD = rows_BHED.new_zeros(length, rows_BHED.shape[-1])
    return out_TD.index_add(0, index_BHE.flatten(), rows_BHED.flatten(0, 2))[None]


def _has_fla(device: torch.device) -> bool:
    return bool(fla_version()) and device.type == "cuda"


def _conv1d(x: Tensors) -> Tensor:
    weight_CW, bias_C = (x[name].to(x["x"].dtype) for name in ("weight", "bias"))
    C, W = weight_CW.shape
    x_BCT = F.pad(x["x"].transpose(1, 2), (W - 1, 0))
    return F.silu(F.conv1d(x_BCT, weight_CW[:, None], bias_C, groups=C)).transpose(1, 2)


def _fla_conv1d(x: Tensors) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d

    return causal_conv1d(x["x"], x["weight"], x["bias"], activation="silu")[0]


def _rms_norm(x: Tensors, eps: float) -> Tensor:
    weight_V = x["weight"].to(x["x"].dtype)
    return F.rms_norm(x["x"], weight_V.shape, weight_V, eps) * F.silu(x["gate"])


def _fla_norm(x: Tensors, eps: float) -> Tensor:
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    return rms_norm_gated(x["x"], x["gate"], x["weight"], None, eps=eps)


def sdpa(x: Tensors) -> Tensor:
    """Causal attention `[B, T, H, D]` by torch's FlashAttention-2 kernels."""
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
