"""Which weights an optimizer changes how."""

import pytest
import torch

from longctx.config import decode
from longctx.errors import InputError
from longctx.model.decoder import Decoder
from longctx.train.optim import OptimConfig, build_optimizer, muon_names
from longctx.train.settings import load_settings


@pytest.fixture(scope="module")
def model() -> Decoder:
    with torch.device("meta"):
        return Decoder(load_settings("tiny").model, 97)


def test_adamw_decays_matrices_alone_at_one_rate(model):
    groups = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [group["lr_share"] for group in groups] == [1.0, 1.0]
    assert all(parameter.dim() > 1 for parameter in groups[0]["params"])
    embedding = model.embedding.weight
    assert all(p.dim() < 2 or p is embedding for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muons_weights_are_the_matrices_of_blocks(model):
    names = muon_names(model)
    parameters = dict(model.named_parameters())
    assert all(name.startswith("blocks.") and parameters[name].dim() > 1 for name in names)
    left_out = {n for n, p in parameters.items() if p.dim() > 1} - set(names)
    assert left_out == {"embedding.weight"}


REFUSED = {
    "kind": ({"kind": "sgd"}, "optim.kind"),
    "momentum": ({"momentum": 1.0}, r"optim.momentum = 1.0: must be at least 0 and below 1"),
    "steps": ({"ns_steps": 0}, r"optim.ns_steps = 0: must be at least 1"),
    "betas": ({"betas": [0.9]}, r"optim.betas"),
    "lr": ({"lr": 0.0}, r"optim.lr = 0.0: must be positive"),
}


@pytest.mark.parametrize(("fields", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_numbers_out_of_range_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        decode(OptimConfig, fields, "optim")
