"""Every variant of every mixer as a case: output and losses, gradients of input and parameters."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from longctx.mixers import MixerConfig
from longctx.sequence.local import LocalView
from longctx.sequence.view import SequenceView
from tests.mixers.examples import WIDTH, all_variants
from tests.mixers.test_every_mixer import build
from tests.sequence.cases import Case, Setting, Shard, Values


def with_losses(mixer: nn.Module, inputs: Values, view: SequenceView) -> Tensor:
    """Output of the mixer with given parameters; each loss is a channel more of every token."""
    parameters = {name: x for name, x in inputs.items() if name != "x"}
    mixed = functional_call(mixer.to(inputs["x"].dtype), parameters, (inputs["x"], view))
    losses = [x.expand(*mixed.out.shape[:2], 1) for x in mixed.losses.values()]
    return torch.cat((mixed.out, *losses), -1)


def mixer_case(name: str, config: MixerConfig) -> Case:
    def sharded(shard: Shard, inputs: Values) -> Tensor:
        return with_losses(build(config), inputs, shard.view)

    def whole(setting: Setting, inputs: Values) -> Tensor:
        view = LocalView(setting.documents, setting.length)
        return with_losses(build(config), inputs, view)

    parameters = {name: tuple(p.shape) for name, p in build(config).named_parameters()}
    return Case(name, {"x": (WIDTH,)}, sharded, whole, parameters)


MIXER_CASES = {name: mixer_case(name, config) for name, config in all_variants()}
CONFIGS = dict(all_variants())
