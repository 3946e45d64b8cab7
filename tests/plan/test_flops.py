"""FLOPs of each process: they add up to the model's, by hand if small, by samples if long."""

from dataclasses import replace

import pytest
import torch

from longctx.config import decode
from longctx.errors import InputError
from longctx.model.block import Block
from longctx.model.decoder import Decoder
from longctx.plan.flops import (
    EXACT,
    SAMPLE,
    STRATA,
    Contexts,
    _summed,
    contexts_of,
    flops_of,
    layer_flops,
    summed,
)
from longctx.plan.workload import Workload, workload
from longctx.train.settings import Settings, load_settings
from tests.mixers.examples import PLACE, all_variants
from tests.presets import NAMES, shrunk

VOCABULARY = 50
SPLITS = (
    {"sp": 1},
    {"sp": 3},
    {"sp": 3, "placement": "zigzag"},
    {"sp": 4, "heads": 2, "placement": "mirror"},
    {"sp": 2, "heads": 2, "placement": "contiguous"},
)
SMALL = {
    "model": {
        "width": 8,
        "depth": 3,
        "pattern": "LS-",
        "mlp_hidden": 5,
        "without_mlp": "L",
        "mixers": {
            "L": {"kind": "linear", "num_heads": 2, "gate": "none"},
            "S": {"kind": "softmax", "num_heads": 2, "num_kv_heads": 1},
        },
    },
    "train": {"seq_len": 6, "batch_size": 2},
}


def split(settings: Settings, **parallel) -> Workload:
    """On as many processes as share a sequence."""
    settings = replace(settings, parallel=replace(settings.parallel, **parallel))
    return workload(settings, parallel.get("sp", 1), VOCABULARY, "fp32")


def test_flops_of_a_small_model_are_those_reckoned_by_hand():
    work = split(decode(Settings, SMALL))
    tokens, seen = 12, 2 * (1 + 2 + 3 + 4 + 5 + 6)
    linear = tokens * 2 * (4 * 8 * 8) + tokens * 4 * 2 * 4 * 4
    softmax = tokens * 2 * (2 * 8 * 8 + 2 * 8 * 4) + 4 * 2 * 4 * seen
    mlp = 2 * tokens * 2 * (3 * 8 * 5)
    head = tokens * 2 * 8 * VOCABULARY
    expected = {"linear": linear, "softmax": softmax, "mlp": mlp, "head": head}
    assert flops_of(work, 0) == pytest.approx(expected)
    by_letter = layer_flops(work, 0)
    assert by_letter["L"].mlp == by_letter["-"].core == by_letter["-"].projections == 0
    assert by_letter["S"].core == pytest.approx(4 * 2 * 4 * seen)


@pytest.mark.parametrize("name", NAMES)
def test_flops_of_all_ranks_are_those_of_the_model(name):
    settings = load_settings(name)
    train = replace(settings.train, seq_len=96, batch_size=2)
    settings = replace(settings, model=shrunk(settings.model), train=train)
    with torch.device("meta"):
        whole = Decoder(settings.model, VOCABULARY)
    expected = whole.flops(torch.arange(1, 97).repeat(2))
    shown = 0
    for parallel in SPLITS:
        try:
            work = split(settings, **parallel)
        except InputError:
            continue
        every = [flops_of(work, rank) for rank in range(work.split.sp)]
        total = {kind: sum(flops[kind] for flops in every) for kind in every[0]}
        assert total == pytest.approx(expected)
        shown += 1
    assert shown >= 2


def test_a_contiguous_split_leaves_the_last_rank_twice_the_mean_and_others_none():
    settings = decode(Settings, SMALL | {"train": {"seq_len": 64, "batch_size": 1}})
    last, first = (
        layer_flops(split(settings, sp=4, placement="contiguous"), rank)["S"].core
        for rank in (3, 0)
    )
    every = [
        layer_flops(split(settings, sp=4, placement="zigzag"), rank)["S"].core for rank in range(4)
    ]
    assert first == 4 * 2 * 4 * (16 * 17 // 2)
    assert last == 4 * 2 * 4 * (16 * (49 + 64) // 2)
    assert every == pytest.approx([sum(every) / 4] * 4)


def test_documents_end_what_tokens_see():
    work = split(decode(Settings, SMALL), sp=2, placement="contiguous")
    work = replace(work, documents=((0, 2), (0,)))
    assert contexts_of(work, 0) == ((Contexts(1, 2), Contexts(1, 1), Contexts(1, 3)), 1.0)
    assert contexts_of(work, 1) == ((Contexts(2, 4), Contexts(4, 6)), 1.0)
    assert layer_flops(work, 1)["S"].core == 4 * 2 * 4 * (2 + 3 + 4 + 4 + 5 + 6)


def test_few_tokens_are_asked_of_the_longest_sequence():
    asked = []

    def count(contexts_M: torch.Tensor) -> int:
        asked.append(contexts_M.numel())
        return int(contexts_M.sum())

    length = 1 << 24
    assert summed(count, [Contexts(1, length)]) == pytest.approx(length * (length + 1) / 2)
    assert sum(asked) == EXACT + STRATA * SAMPLE


@pytest.mark.parametrize(
    "config", [c for _, c in all_variants()], ids=[name for name, _ in all_variants()]
)
def test_samples_are_close_to_asking_every_token(config, monkeypatch):
    for name, size in {"EXACT": 512, "SAMPLE": 96, "STRATA": 8, "TABLE": 4096}.items():
        monkeypatch.setattr(f"longctx.plan.flops.{name}", size)
    with torch.device("meta"):
        mixer = config.build(PLACE)
    every = mixer.core_flops(torch.arange(100, 20001))
    block = Block((torch.nn.Identity(), mixer), None, 0.0, None)
    assert _summed(block, (Contexts(100, 20000),), True) == pytest.approx(every, rel=2e-2)
