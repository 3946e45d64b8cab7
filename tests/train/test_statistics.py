"""Sums over tokens reach mixers after each step, and the log gets their figures."""

import pytest
import torch

from longctx.checkpoint import latest, open_checkpoint
from longctx.mixers.softmax import Softmax, SoftmaxConfig
from longctx.model.decoder import Decoder
from longctx.sequence.local import LocalView
from longctx.train.trainer import train
from tests.train.processes import run

DOUBLE = {"train__precision": "fp64", "model__depth": 1, "model__pattern": "S"}
SPLITS = {"replicas": (2, {}), "sequence": (2, {"parallel__sp": 2})}


class Drifting(Softmax):
    """Multiplies its values by a gain that follows their size."""

    def __init__(self, config, place):
        super().__init__(config, place)
        self.register_buffer("gain", torch.ones(self.num_kv_heads))

    def attention_parts(self, x_BTD, view):
        parts = super().attention_parts(x_BTD, view)
        return parts._replace(v_BTJV=parts.v_BTJV * self.gain[:, None])

    def statistics(self, projected, view):
        return {"size": projected.v_BTJV.square().sum((0, 1, 3))}

    def adapt(self, sums, tokens):
        self.gain.mul_(1 + 0.5 * sums["size"] / tokens).clamp_(max=4)
        return {"gain": self.gain}


@pytest.fixture
def drifting(monkeypatch):
    """Inner mixers of the preset adapt a buffer."""
    monkeypatch.setattr(SoftmaxConfig, "build", lambda config, place: Drifting(config, place))


def gains(rows, settings):
    return torch.tensor([row["router/0/inner/gain"] for row in rows(settings)])


def test_each_step_logs_how_a_router_spreads_tokens(settings, rows):
    config = settings(**DOUBLE)
    train(config)
    for row in rows(config):
        load = row["router/0/load"]
        assert len(load) == 6
        assert sum(load) == pytest.approx(4)
        assert max(load) <= 1
        assert 0 < row["router/0/entropy"] <= torch.tensor(6.0).log() + 1e-6


@pytest.mark.usefixtures("drifting")
@pytest.mark.parametrize(("ranks", "split"), SPLITS.values(), ids=SPLITS.keys())
def test_buffers_adapt_alike_however_tokens_are_spread(settings, rows, ranks, split):
    # A balance loss is of micro-batches, and so of what each replica has.
    quiet = DOUBLE | {"model__mixers.S.balance_weight": 0.0, "train__steps": 3}
    one, shared = settings("one", **quiet), settings("shared", **quiet, **split)
    micro = settings("micro", train__micro_batch=1, **quiet)
    for config in (one, micro):
        train(config)
    run(ranks, shared)
    for a, b, c in zip(rows(one), rows(shared), rows(micro), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9
        assert a["router/0/load"] == pytest.approx(b["router/0/load"], abs=1e-12)
        assert a["router/0/load"] == pytest.approx(c["router/0/load"], abs=1e-12)
    expected = gains(rows, one)
    assert (expected.diff(dim=0) != 0).all()
    for config in (shared, micro):
        torch.testing.assert_close(gains(rows, config), expected, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("drifting")
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_resume_brings_buffers_back_bit_for_bit(settings, rows, precision):
    options = DOUBLE | {"train__precision": precision}
    whole, parts = settings("whole", **options), settings("parts", **options)
    train(whole)
    train(settings("parts", train__stop_after=3, **options))
    train(parts)
    for a, b in zip(rows(whole), rows(parts), strict=True):
        assert (a["loss"], a["router/0/inner/gain"]) == (b["loss"], b["router/0/inner/gain"])
    one, other = (open_checkpoint(latest(config.checkpoints)) for config in (whole, parts))
    assert one.names == other.names
    for name in one.names - {"random/0/cpu"}:
        assert torch.equal(one.read(name), other.read(name)), name


def test_evaluation_gathers_no_statistics(settings):
    model = Decoder(settings(**DOUBLE).model, 16)
    tokens, view = torch.arange(8)[None], LocalView.whole(1, 8)
    assert set(model(tokens, tokens, view).statistics) == {"0.load", "0.entropy"}
    assert model.eval()(tokens, tokens, view).statistics == {}
