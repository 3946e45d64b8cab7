"""Layers that reuse keys or values of the attention layer before them."""

import pytest
import torch

from longctx.config import decode
from longctx.errors import InputError
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.sequence.local import LocalView
from tests.tolerances import assert_close

SOFTMAX = {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2}
LINEAR = {"kind": "linear", "num_heads": 2}


def model_config(pattern: str = "ALBC", **changes) -> ModelConfig:
    mixers = {
        "A": SOFTMAX,
        "B": SOFTMAX | {"reuses": "keys and values"} | changes,
        "C": {"kind": "s2", "reuses": "values", "block": 4, "local_blocks": 1, "stride": 2}
        | {"num_heads": 4, "num_kv_heads": 2},
        "L": LINEAR,
    }
    table = {"width": 16, "depth": len(pattern), "pattern": pattern, "mixers": mixers}
    return decode(ModelConfig, table, path="model")


def model(pattern: str = "ALBC") -> Decoder:
    built = Decoder(model_config(pattern), 11)
    initialise(built, 0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return built.double()


def batch() -> tuple:
    tokens_BT = torch.randint(11, (2, 23), generator=torch.Generator().manual_seed(0))
    return tokens_BT, tokens_BT.roll(-1, 1), LocalView.whole(2, 23)


def test_reused_keys_and_values_are_those_of_the_layer_before():
    reusing, full = model("ALB"), Decoder(model_config("ALB", reuses="nothing"), 11).double()
    first, second = full.blocks[0].mixer, full.blocks[2].mixer
    full.load_state_dict(reusing.state_dict(), strict=False)
    seen = {}
    first.key_norm.register_forward_hook(lambda *args: seen.update(k=args[2]))
    first.value.register_forward_hook(lambda *args: seen.update(v=args[2]))
    second.key_norm.register_forward_hook(lambda *_: seen["k"])
    second.value.register_forward_hook(lambda *_: seen["v"])
    losses = [each(*batch()).cross_entropy for each in (reusing, full)]
    assert_close(*losses, "fp64")
    for loss in losses:
        loss.backward()
    expected = dict(full.named_parameters())
    for name, parameter in reusing.named_parameters():
        assert_close(parameter.grad, expected[name].grad, "fp64", name)


def test_what_is_reused_has_no_weights():
    names = {name for name, _ in model().named_parameters()}
    assert not any(
        name.startswith(("blocks.2.mixer.key", "blocks.2.mixer.value")) for name in names
    )
    assert "blocks.3.mixer.key.weight" in names
    assert "blocks.3.mixer.value.weight" not in names


def test_generation_equals_the_whole_sequence():
    built, (tokens_BT, *_) = model(), batch()
    whole, _ = built.step(tokens_BT, 0, [])
    memory, start = [], 0
    for length in (9, 1, 1, 12):
        logits, memory = built.step(tokens_BT[:, start : start + length], start, memory)
        start += length
    assert_close(logits, whole, "fp64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "LBA"}, "layer 1 needs 2 heads x 4, .* none before it has any"),
        ({"num_kv_heads": 4}, "layer 2 needs 4 heads x 4, .* the last has 2 x 4"),
    ],
)
def test_reuse_of_what_is_not_there_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        model_config(**arguments)
