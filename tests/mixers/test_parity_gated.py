"""Mixers with decay against published implementations, which compute in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.mixers import Place
from longctx.mixers.hgrn2 import HGRN2Config, forget_gate
from longctx.mixers.linear import LinearConfig, log_decay
from longctx.mixers.mamba2 import Mamba2Config
from longctx.sequence.local import LocalView
from tests.tolerances import assert_close

LENGTH = 75


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def gates(*shape: int) -> Tensor:
    """Log decays from almost none to -12."""
    generator = torch.Generator().manual_seed(5)
    return -torch.empty(shape).uniform_(-6, 2.5, generator=generator).exp()


def randomised(module: nn.Module) -> nn.Module:
    """Weights that leave something to see of everything."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = float(name in ("D", "norm.weight"))
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def decayed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Our core; fla's divide by sqrt(K)."""
    view = LocalView.whole(*q.shape[:2])
    return view.decay_attention(q * q.shape[-1] ** -0.5, k, v, log_decay)


MAMBA2 = {
    "one group": {"num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 1, "conv_kernel": 4},
    "two groups": {"num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 2, "conv_kernel": 4},
    "wide state": {"num_heads": 2, "head_dim": 16, "state_size": 128, "n_groups": 2},
    "group a head": {"num_heads": 4, "head_dim": 8, "state_size": 5, "n_groups": 4},
    "two taps": {"num_heads": 1, "head_dim": 32, "state_size": 16, "n_groups": 1, "conv_kernel": 2},
}


def mamba2_pair(sizes: dict[str, int]):
    """Ours and theirs with the same random weights; width 16."""
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    theirs = randomised(Mamba2Mixer(TheirConfig(hidden_size=16, chunk_size=16, **sizes), 0))
    ours = Mamba2Config(
        num_heads=sizes["num_heads"],
        head_dim=sizes["head_dim"],
        state_size=sizes["state_size"],
        num_groups=sizes["n_groups"],
        convolution=theirs.conv_kernel_size,
    ).build(Place(16, 0, 1))
    names = {
        "project_in.weight": theirs.in_proj.weight,
        "convolve.weight": theirs.conv1d.weight,
        "convolve.bias": theirs.conv1d.bias,
        "decay.log_rate": theirs.A_log,
        "decay.bias": theirs.dt_bias,
        "D": theirs.D,
        "norm_weight": theirs.norm.weight,
        "project_out.weight": theirs.out_proj.weight,
    }
    assert {id(p) for p in names.values()} == {id(p) for p in theirs.parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(names.pop(name).view_as(parameter))
    assert not names
    return ours, theirs


@pytest.mark.parametrize("sizes", MAMBA2.values(), ids=MAMBA2)
def test_mamba2_equals_transformers(sizes):
    ours, theirs = mamba2_pair(sizes)
    x_BTD, weight_BTD = noise(2, LENGTH, 16).requires_grad_(), noise(1, LENGTH, 16)
    actual, expected = ours(x_BTD).out, theirs(x_BTD)
    assert expected.std() > 0.1
    assert_close(actual, expected, "fp32", "output")
    (actual,) = torch.autograd.grad((actual * weight_BTD).sum(), x_BTD)
    (expected,) = torch.autograd.grad((expected * weight_BTD).sum(), x_BTD)
    assert_close(actual, expected, "fp32", "gradient of the input")


def test_packed_mamba2_equals_transformers_on_each_document():
    ours, theirs = mamba2_pair(MAMBA2["two groups"])
    x_BTD, starts = noise(1, LENGTH, 16), (0, 1, 3, 40)
    expected = [theirs(x_BTD[:, a:b]) for a, b in zip(starts, (*starts[1:], LENGTH))]
    actual = ours(x_BTD, LocalView((starts,), LENGTH)).out
    assert_close(actual, torch.cat(expected, 1), "fp32")


def test_the_core_of_gla_equals_that_of_fla():
    from fla.ops.gla.naive import naive_recurrent_gla

    q, k, v = noise(2, LENGTH, 3, 4), noise(2, LENGTH, 3, 4) + 1, noise(2, LENGTH, 3, 5)
    gk = gates(2, LENGTH, 3, 4)
    assert_close(decayed(q, k, v, gk), naive_recurrent_gla(q, k, v, gk)[0], "fp32")


@pytest.mark.parametrize("bound", [0.0, 0.4])
def test_hgrn2_is_fla_gla_with_the_keys_that_forget_gates_leave(bound):
    from fla.ops.gla.naive import naive_recurrent_gla

    config = HGRN2Config(num_heads=2, head_dim=5, bounds="constant", lower_bound=bound)
    mixer, x_BTD = randomised(config.build(Place(16, 3, 4))), noise(2, LENGTH, 16)
    alpha = bound + (1 - bound) * mixer.forget(x_BTD).unflatten(-1, (2, 5)).sigmoid()
    q = F.silu(mixer.query(x_BTD)).unflatten(-1, (2, 5))
    v = mixer.value(x_BTD).unflatten(-1, (2, 8))
    expected = 5**0.5 * naive_recurrent_gla(q, 1 - alpha, v, alpha.log())[0]
    view = LocalView.whole(2, LENGTH)
    assert_close(mixer.core(mixer.project(x_BTD, view), view), expected, "fp32")


def test_hgrn2_with_heads_of_one_channel_is_hgrn():
    from fla.ops.hgrn.naive import naive_recurrent_hgrn

    v_BTH, f_BTH = noise(2, LENGTH, 6), 2 * noise(1, LENGTH, 6)
    k_BTH, log_decay_BTH = forget_gate(f_BTH.expand_as(v_BTH), 0.2)
    expected, _ = naive_recurrent_hgrn(k_BTH * v_BTH, log_decay_BTH)
    q, k, v, gk = (x[..., None] for x in (torch.ones_like(v_BTH), k_BTH, v_BTH, log_decay_BTH))
    assert_close(decayed(q, k, v, gk)[..., 0], expected, "fp32")


def test_retention_equals_fla():
    from fla.ops.retention.naive import naive_retention

    q, k, v = (noise(2, LENGTH, 4, 6) + shift for shift in (0, 1, 2))
    expected = naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    log_decay_H = log_decay("retention", 4, Place(24, 0, 1))
    assert_close(decayed(q, k, v, log_decay_H), expected, "fp32")


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_linear_equals_minimaxs_lightning_attention_in_transformers(layer):
    from transformers.models.minimax.modeling_minimax import (
        MiniMaxConfig,
        MiniMaxLightningAttention,
    )

    H, K, width, depth = 4, 6, 16, 5
    config = MiniMaxConfig(
        hidden_size=width,
        num_attention_heads=H,
        head_dim=K,
        num_hidden_layers=depth,
        block_size=16,
        hidden_act="silu",
        layer_types=["linear_attention"] * depth,
    )
    theirs = randomised(MiniMaxLightningAttention(config, layer))
    ours = LinearConfig(
        num_heads=H, head_dim=K, decay="minimax", value_map="silu", norm="all", gate="sigmoid"
    ).build(Place(width, layer, depth))
    parts = theirs.qkv_proj.weight.view(H, 3, K, width).unbind(1)
    with torch.no_grad():
        # Queries are not scaled, neither here nor there.
        for linear, weight in zip((ours.query, ours.key, ours.value), parts):
            linear.weight.copy_(weight.reshape(linear.weight.shape))
        ours.gate.weight.copy_(theirs.output_gate.weight)
        ours.project_out.weight.copy_(theirs.out_proj.weight)
        ours.norm.weight.copy_(theirs.norm.weight)
    x_BTD = noise(2, LENGTH, width)
    expected = theirs(x_BTD, (x_BTD, x_BTD), None)[0]
    assert_close(ours(x_BTD).out, expected, "fp32")
