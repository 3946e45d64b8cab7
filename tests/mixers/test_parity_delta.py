"""Delta rules with the weights of published implementations give their outputs."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from longctx_kernels.delta_attention import delta_attention, delta_attention_reference
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as olmo
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from longctx.mixers import Place
from longctx.mixers.delta import GDNConfig, KDAConfig

KERNELS = {
    qwen: ("causal_conv1d_fn", "torch_chunk_gated_delta_rule"),
    olmo: ("causal_conv1d_fn", "torch_chunk_gated_delta_rule"),
    kimi: ("causal_conv1d_fn", "chunk_kimi_delta_attention"),
}
WIDTH, LENGTH = 32, 150
PLACE = Place(WIDTH, 0, 1)
ALLOWED = 1e-5


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    """transformers takes the kernels of flash-linear-attention where that is installed."""
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))


def randomised(module):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + ("norm" in name) - 2.0 * name.endswith("A_log"))
    return module.eval()


def assert_same_output(theirs, ours):
    x_BTD = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected, actual = theirs(x_BTD), ours(x_BTD).out
    assert expected.std() > 0.1
    assert (expected - actual).abs().max() <= ALLOWED * expected.abs().max()


def copy(pairs):
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.weight.copy_(theirs.weight.reshape(ours.weight.shape))


def copy_rate(ours, theirs):
    with torch.no_grad():
        ours.log_rate.copy_(theirs.A_log.flatten())
        ours.bias.copy_(theirs.dt_bias)


@pytest.mark.parametrize("value_heads", [2, 4])
def test_gdn_equals_qwen3_next(value_heads):
    config = qwen.Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=2,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        num_hidden_layers=2,
    )
    theirs = randomised(qwen.Qwen3NextGatedDeltaNet(config, 0))
    ours = GDNConfig(
        num_heads=value_heads, num_key_heads=2, head_dim=8, value_dim=6, norm_eps=1e-6
    ).build(PLACE)
    group = value_heads // 2
    fused = theirs.in_proj_qkvz.weight.view(2, -1, WIDTH)
    parts = fused.split((8, 8, 6 * group, 6 * group), 1)
    b, a = theirs.in_proj_ba.weight.view(2, -1, WIDTH).split((group, group), 1)
    linears = (ours.query, ours.key, ours.value, ours.gate, ours.beta, ours.decay.project)
    with torch.no_grad():
        for linear, weight in zip(linears, (*parts, b, a)):
            linear.weight.copy_(weight.reshape(linear.weight.shape))
    copy([(ours.convolve, theirs.conv1d), (ours.norm, theirs.norm)])
    copy([(ours.project_out, theirs.out_proj)])
    copy_rate(ours.decay.rate, theirs)
    assert_same_output(theirs, ours)


@pytest.mark.parametrize("negative", [True, False])
def test_gdn_equals_olmo_hybrid(negative):
    config = olmo.OlmoHybridConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=6,
        linear_value_head_dim=12,
        linear_allow_neg_eigval=negative,
        num_hidden_layers=2,
    )
    theirs = randomised(olmo.OlmoHybridGatedDeltaNet(config, 0))
    ours = GDNConfig(
        num_heads=3, head_dim=6, value_dim=12, negative_eigenvalues=negative, norm_eps=1e-5
    ).build(PLACE)
    copy(
        [
            (ours.query, theirs.q_proj),
            (ours.key, theirs.k_proj),
            (ours.value, theirs.v_proj),
            (ours.beta, theirs.b_proj),
            (ours.decay.project, theirs.a_proj),
            (ours.gate, theirs.g_proj),
            (ours.convolve, theirs.conv1d),
            (ours.norm, theirs.o_norm),
            (ours.project_out, theirs.o_proj),
        ]
    )
    copy_rate(ours.decay.rate, theirs)
    assert_same_output(theirs, ours)


def test_kda_equals_kimi_linear():
    config = kimi.KimiLinearConfig(
        hidden_size=WIDTH, linear_num_heads=3, linear_head_dim=8, num_hidden_layers=2
    )
    theirs = randomised(kimi.KimiLinearDeltaAttention(config, 0))
    eps = config.rms_norm_eps
    ours = KDAConfig(num_heads=3, head_dim=8, norm_eps=eps).build(PLACE)
    copy(
        [
            (ours.query, theirs.q_proj),
            (ours.key, theirs.k_proj),
            (ours.value, theirs.v_proj),
            (ours.beta, theirs.b_proj),
            (ours.decay.project.down, theirs.forget_gate.f_a_proj),
            (ours.decay.project.up, theirs.forget_gate.f_b_proj),
            (ours.gate.down, theirs.g_a_proj),
            (ours.gate.up, theirs.g_b_proj),
            (ours.convolve, theirs.conv1d),
            (ours.norm, theirs.o_norm),
            (ours.project_out, theirs.o_proj),
        ]
    )
    copy_rate(ours.decay.rate, theirs.forget_gate)
    assert_same_output(theirs, ours)


@pytest.mark.parametrize("kind", ["none", "g", "gk"])
@pytest.mark.parametrize("op", [delta_attention, delta_attention_reference])
def test_the_core_equals_flash_linear_attentions_definition(op, kind):
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.kda.naive import naive_recurrent_kda

    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 70, 3, n, generator=generator) for n in (8, 8, 5))
    k, beta = F.normalize(k, dim=-1), torch.rand(2, 70, 3, generator=generator)
    g = F.logsigmoid(torch.randn(2, 70, 3, generator=generator))
    gk = F.logsigmoid(torch.randn(2, 70, 3, 8, generator=generator))
    if kind == "none":
        rows = (x.transpose(1, 2) for x in (q, k, v, beta))
        expected = delta_rule_recurrence(*rows)[0].transpose(1, 2)
    elif kind == "g":
        expected = naive_recurrent_gated_delta_rule(q, k, v, beta, g)[0]
    else:
        expected = naive_recurrent_kda(q, k, v, gk, beta)[0]
    gates = {"none": {}, "g": {"g": g}, "gk": {"gk": gk}}[kind]
    actual, _ = op(q, k, v, beta, **gates)
    assert (expected - actual).abs().max() <= ALLOWED * expected.abs().max()
