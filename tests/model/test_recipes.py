"""Ready configs: sizes as published, and a training step of each at a tiny size."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.kimi_linear import KimiLinearConfig
from transformers.models.minimax import MiniMaxConfig
from transformers.models.nemotron_h import NemotronHConfig
from transformers.models.olmo_hybrid import OlmoHybridConfig
from transformers.models.qwen3_next import Qwen3NextConfig

from longctx.model.decoder import Decoder, initialise
from longctx.sequence.local import LocalView
from longctx.train.settings import load_settings
from tests.presets import shrunk

NOMINAL = {
    "1b-lasp2h": (128256, 1.4),
    "gdn-h1": (32000, 1.3),
    "gdn-h2": (32000, 1.3),
    "lalte": (32000, 1.4),
    "nemotron-h-8b": (131072, 8.1),
    "olmo-hybrid-7b": (100352, 7.4),
    "samba": (32000, 1.3),
    "titans-mag": (32000, 0.4),
}
"""Vocabulary and published size in billions of weights, where the whole model is built."""
RECIPES = sorted({*NOMINAL, "kimi-linear", "lansa", "minimax", "qwen3-next"})


def on_meta(name: str, vocabulary: int) -> Decoder:
    with torch.device("meta"):
        return Decoder(load_settings(name).model, vocabulary)


def published(config) -> dict[str, int]:
    """Weights of a model as transformers builds it, by module."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def of_layer(sizes: dict[str, int], prefix: str) -> int:
    found = [size for name, size in sizes.items() if name.startswith(prefix)]
    assert found, prefix
    return sum(found)


def of_mixer(model: Decoder, letter: str) -> int:
    layer = model.config.letters.index(letter)
    return sum(p.numel() for p in model.blocks[layer].mixer.parameters())


@pytest.mark.parametrize("name", NOMINAL)
def test_a_recipe_has_the_published_size(name):
    vocabulary, billions = NOMINAL[name]
    assert on_meta(name, vocabulary).num_parameters() / 1e9 == pytest.approx(billions, rel=0.05)


def test_olmo_hybrid_has_as_many_weights_as_released():
    theirs = sum(published(OlmoHybridConfig()).values())
    ours = on_meta("olmo-hybrid-7b", 100352)
    # Their norms of queries and keys are over all heads, and softmax layers have other norms.
    assert abs(ours.num_parameters() - theirs) < 1e5


def test_nemotron_h_has_as_many_weights_as_released():
    pattern = load_settings("nemotron-h-8b").model.pattern
    kinds = {"M": "mamba", "-": "mlp", "A": "attention"}
    config = NemotronHConfig(layers_block_type=[kinds[letter] for letter in pattern])
    ours = on_meta("nemotron-h-8b", config.vocab_size)
    assert ours.num_parameters() == sum(published(config).values())


def test_layers_of_qwen3_next_have_as_many_weights_as_released():
    sizes = published(Qwen3NextConfig())
    ours = on_meta("qwen3-next", 151936)
    assert of_mixer(ours, "G") == of_layer(sizes, "model.layers.0.linear_attn.")
    assert of_mixer(ours, "S") == of_layer(sizes, "model.layers.3.self_attn.")
    assert sum(sizes.values()) / 1e9 == pytest.approx(80, rel=0.01)


def test_layers_of_kimi_linear_have_as_many_weights_as_released():
    config = KimiLinearConfig()
    sizes, ours = published(config), on_meta("kimi-linear", 163840)
    assert of_mixer(ours, "K") == of_layer(sizes, "model.layers.0.self_attn.")
    assert sum(sizes.values()) / 1e9 == pytest.approx(48, rel=0.03)


def test_layers_of_minimax_have_as_many_weights_as_released():
    config = MiniMaxConfig(
        hidden_size=2048, num_attention_heads=16, num_key_value_heads=2, head_dim=128,
        num_hidden_layers=8, num_local_experts=2, vocab_size=256,
        layer_types=["linear_attention"] * 7 + ["full_attention"],
    )  # fmt: skip
    sizes, ours = published(config), on_meta("minimax", 256)
    assert of_mixer(ours, "L") == of_layer(sizes, "model.layers.0.self_attn.")
    assert of_mixer(ours, "S") == of_layer(sizes, "model.layers.7.self_attn.")


@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_model_of_a_recipe_takes_a_step(name):
    model = Decoder(shrunk(load_settings(name).model), 61)
    initialise(model, seed=0)
    tokens = torch.randint(61, (2, 41), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(2):
        view = LocalView(((0,), (0, 17)), 40)
        total = model(tokens[:, :-1], tokens[:, 1:], view).cross_entropy / 80
        total.backward()
        assert all(p.grad is not None for p in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        losses.append(total.item())
    assert losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert losses[1] < losses[0]
