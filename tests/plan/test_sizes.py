"""Numbers of weights, found without building models."""

import time
from dataclasses import replace

import pytest
import torch

from longctx.config import decode
from longctx.model.decoder import Decoder, ModelConfig
from longctx.plan.sizes import hollow_model, parameters_of
from longctx.train.settings import load_settings
from tests.presets import NAMES, shrunk

VOCABULARY = 300
KNOWN = {
    # width, depth, heads, key heads, hidden, vocabulary; weights in billions as published
    "7b of Llama 2": (4096, 32, 32, 32, 11008, 32000, 6.738),
    "70b of Llama 2": (8192, 80, 64, 8, 28672, 32000, 68.977),
    "8b of Llama 3": (4096, 32, 32, 8, 14336, 128256, 8.030),
    "405b of Llama 3.1": (16384, 126, 128, 8, 53248, 128256, 405.853),
    "7b of Mistral": (4096, 32, 32, 8, 14336, 32000, 7.242),
}


def softmax_model(width, depth, heads, key_heads, hidden) -> ModelConfig:
    mixer = {"kind": "softmax", "num_heads": heads, "num_kv_heads": key_heads, "qk_norm": False}
    table = {"width": width, "depth": depth, "mlp_hidden": hidden, "tied_head": False}
    return decode(ModelConfig, table | {"pattern": "S", "mixers": {"S": mixer}}, path="model")


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_presets_are_those_of_whole_models(name):
    whole = load_settings(name).model
    for model in (shrunk(whole), replace(whole, depth=min(whole.depth, 12))):
        with torch.device("meta"):
            built = Decoder(model, VOCABULARY)
        found = parameters_of(model, VOCABULARY)
        assert found.total == built.num_parameters()
        assert found.head == (0 if model.tied_head else VOCABULARY * model.width)
        blocks = zip(model.letters, built.blocks, strict=True)
        of_letter = {a: sum(p.numel() for p in block.parameters()) for a, block in blocks}
        assert found.layers == of_letter


def test_a_first_layer_may_have_weights_of_its_own():
    mixer = {"kind": "linear", "num_heads": 2, "lrpe": "first"}
    table = {"width": 32, "depth": 3, "pattern": "L", "mixers": {"L": mixer}}
    model = decode(ModelConfig, table, path="model")
    found = hollow_model(model, VOCABULARY, (0, 1))
    assert found.first.numel > found.others["L"].numel
    assert parameters_of(model, VOCABULARY).total == Decoder(model, VOCABULARY).num_parameters()


@pytest.mark.parametrize("name", KNOWN)
def test_published_models_have_the_published_number(name):
    *sizes, vocabulary, billions = KNOWN[name]
    found = parameters_of(softmax_model(*sizes), vocabulary)
    assert found.total / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.parametrize("name", ["340m", "gdn-h2", "kimi-linear"])
def test_shares_of_a_model_make_up_the_whole(name):
    """Each has all norms within heads and what else follows no head."""
    model = shrunk(load_settings(name).model)
    whole = hollow_model(model, VOCABULARY, (0, 1))
    halves = [hollow_model(model, VOCABULARY, (number, 2)) for number in (0, 1)]
    for layer, *parts in zip(*(dict(m.layers()) for m in (whole, *halves)), strict=True):
        assert layer.numel <= sum(part.numel for part in parts) < 1.1 * layer.numel
    assert sum(half.outside[0].shape[0] for half in halves) == VOCABULARY


@pytest.mark.alone
def test_400b_are_counted_in_no_time():
    model = softmax_model(16384, 120, 128, 16, 53248)
    started = time.perf_counter()
    assert parameters_of(model, 128256).total > 390e9
    assert time.perf_counter() - started < 2
