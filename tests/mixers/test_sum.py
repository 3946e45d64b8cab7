"""Sums of mixers: what parts give is added, weighed, named and refused."""

import pytest
import torch

from longctx.config import decode, to_toml
from longctx.errors import InputError
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.mosa import MosaConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.mixers.sum import SumConfig
from longctx.model.decoder import ModelConfig
from longctx.sequence.sharded import Transports
from tests.mixers.examples import WIDTH
from tests.mixers.test_every_mixer import build, example_input
from tests.tolerances import assert_close

LENGTH = 30
PARTS = {
    "dense": SoftmaxConfig(num_heads=2),
    "routed": MosaConfig(num_heads=4, head_dim=4, sparsity=2, selection="token_choice"),
    "moh": MoHConfig(inner=LinearConfig(num_heads=4), active_heads=2),
}
TABLE = {
    "dense": {"kind": "softmax", "num_heads": 4},
    "routed": {"kind": "mosa", "num_heads": 60, "head_dim": 4, "sparsity": 32},
}


def decoded(parts: dict) -> ModelConfig:
    mixers = {"M": {"kind": "sum", "parts": parts}}
    return decode(ModelConfig, {"width": WIDTH, "pattern": "M", "mixers": mixers}, "model")


def test_outputs_of_parts_are_added():
    mixer, x_BTD = build(SumConfig(parts=PARTS)), example_input(2, LENGTH)
    outs = [part(x_BTD).out for part in mixer.parts.values()]
    assert len(outs) == 3
    assert_close(mixer(x_BTD).out, sum(outs), "fp64")


def test_gates_weigh_parts_and_untrained_ones_leave_the_sum():
    mixer, x_BTD = build(SumConfig(parts=PARTS, gated=True)), example_input(2, LENGTH)
    outs = torch.stack([part(x_BTD).out for part in mixer.parts.values()], -1)
    gates = 3 * (x_BTD @ mixer.gate.weight.T).softmax(-1)
    mixed = mixer(x_BTD)
    assert_close(mixed.out, (outs * gates[:, :, None]).sum(-1), "fp64")
    figures = mixer.adapt(mixed.statistics, 2 * LENGTH)
    assert_close(figures["gate"], gates.mean((0, 1)), "fp64")
    mixer.gate.weight.data.zero_()
    assert_close(mixer(x_BTD).out, outs.sum(-1), "fp64")


def test_losses_of_one_name_are_added_and_figures_are_told_by_part():
    mixer, x_BTD = build(SumConfig(parts=PARTS)), example_input(2, LENGTH)
    mixed = mixer(x_BTD)
    single = [mixer.parts[name](x_BTD).losses["balance"] for name in ("routed", "moh")]
    assert set(mixed.losses) == {"balance"}
    assert_close(mixed.losses["balance"], sum(single), "fp64")
    figures = mixer.adapt({n: x.double() for n, x in mixed.statistics.items()}, 2 * LENGTH)
    own = mixer.parts["routed"].adapt(
        {n: x.double() for n, x in mixer.parts["routed"](x_BTD).statistics.items()}, 2 * LENGTH
    )
    assert {name for name in figures if name.startswith("routed/")} == {f"routed/{n}" for n in own}
    assert torch.equal(figures["routed/load"], own["load"])
    assert "moh/load" in figures


def test_a_sum_selects_causally_only_if_all_parts_do():
    leaking = MosaConfig(num_heads=2, selection="expert_choice", allow_leak=True)
    assert build(SumConfig(parts=PARTS)).causal_selection
    assert not build(SumConfig(parts=PARTS | {"leaking": leaking})).causal_selection


def test_tables_of_parts_are_read_and_written():
    config = decoded(TABLE)
    parts = config.mixers["M"].parts
    assert (parts["dense"].num_heads, parts["routed"].sparsity) == (4, 32)
    assert "[mixers.M.parts.routed]" in to_toml(config)
    assert config.layers[0].parts["dense"].backend == "auto"


WRONG = {
    "unknown field": (
        TABLE | {"dense": {"kind": "softmax", "heads": 4}},
        r"model\.mixers\.M\.parts\.dense\.heads is not a known field",
    ),
    "kind": (TABLE | {"dense": {"kind": "sofmax"}}, r"model\.mixers\.M\.parts\.dense\.kind = "),
    "type": (
        TABLE | {"dense": {"kind": "softmax", "num_heads": "4"}},
        r"model\.mixers\.M\.parts\.dense\.num_heads = '4'",
    ),
    "value": (
        TABLE | {"dense": {"kind": "softmax", "num_heads": 3}},
        r"model\.mixers\.M\.parts\.dense\.num_heads = 3 does not divide",
    ),
    "one part": ({"dense": TABLE["dense"]}, r"model\.mixers\.M\.parts has 1"),
    "name": (TABLE | {"keys": TABLE["dense"]}, r"model\.mixers\.M\.parts\.keys: is a name"),
}


@pytest.mark.parametrize(("parts", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_in_a_part_is_named(parts, message):
    with pytest.raises(InputError, match=message) as error:
        decoded(parts)
    assert "\n" not in str(error.value)


def test_a_part_that_cannot_be_split_so_is_named():
    config = SumConfig(parts={"dense": SoftmaxConfig(num_heads=6), "routed": PARTS["routed"]})
    assert config.refusal(Transports()) == ""
    assert config.refusal(Transports(heads=4)).startswith("parts.dense.num_heads = 6")
