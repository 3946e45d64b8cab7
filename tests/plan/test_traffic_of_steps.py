"""All that c10d carries in a step of training is what `traffic_of` says, preset by preset."""

import importlib
import warnings

import pytest

from longctx.sequence.ledger import Traffic
from tests.dist import run_gloo
from tests.plan.stepping import Case, Step, counted_steps
from tests.presets import NAMES

pytestmark = [pytest.mark.cluster, pytest.mark.alone]

SECONDS = 120
KEEP, FULL = ({"memory.checkpointing": policy} for policy in ("keep", "full"))
SCAN = {"parallel.prefix": "scan", "parallel.stream": "ring"}
TRADE = {"parallel.prefix": "ulysses", "parallel.heads": 2}
TWO = {
    "340m": TRADE | KEEP,
    "7b": SCAN | FULL,
    "gdn-h1": TRADE | FULL,
    "gdn-h2": {"parallel.weights": "bf16"},
    "kimi-linear": SCAN | KEEP,
    "ladder-8k": {"parallel.engine": "none", "parallel.sp": 1, "train.micro_batch": 1},
    "ladder-128k": {"parallel.sp": 1, "train.batch_size": 6, "train.micro_batch": 1},
    "ladder-1m": {"train.precision": "fp64"},
    "lalte": KEEP,
    "lansa": FULL | {"parallel.weights": "bf16"},
    "olmo-hybrid-7b": {"parallel.sp": 1, "parallel.replicas": 2},
    "samba": {"optim.kind": "muon"},
    "tiny": {"train.precision": "bf16", "parallel.engine": "none", "optim.kind": "muon"},
    "titans-mag": {"parallel.prefix": "serial", "train.seq_len": 67},
}
"""What two ranks do beyond, or instead of, sharing a sequence, by preset."""
SHARED = {
    "repeated": Case("minimax", FULL | {"parallel.tp": 2, "model.dropout": 0.1}),
    "by tiles": Case("tiny", {"parallel.tp": 2, "memory.mlp_tokens": 50, "memory.loss_tokens": 40}),
}
"""Two ranks that share heads."""
COPIES = {
    "parallel.sp": 2,
    "parallel.replicas": 2,
    "train.batch_size": 6,
    "train.micro_batch": 2,
    "optim.kind": "muon",
}
FOUR = {
    "copies of shards": Case("tiny", KEEP | COPIES),
    "heads and sequence shared": Case(
        "tiny", KEEP | {"parallel.sp": 2, "parallel.tp": 2, "optim.kind": "muon"}
    ),
    "mirror": Case(
        "340m", SCAN | {"parallel.sp": 4, "parallel.heads": 2, "train.seq_len": 67}, True
    ),
}
SAME = {"ladder-8k", "ladder-128k", "ladder-1m"}
"""As 340m at a small size."""


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What every process would import for seconds, before they are forked."""
    warnings.simplefilter("ignore")
    importlib.import_module("megatron.core.parallel_state")


@pytest.fixture
def texts(tmp_path):
    """A folder of short texts, of which several make a sequence."""
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i} is the number of this text. " * 3)
    return tmp_path


def differences(step: Step) -> list[str]:
    """What was predicted and is not so."""
    calls, received = zip(*step.predicted.values())
    found = []
    if Traffic(sum(calls), sum(received)) != step.counted:
        found.append(f"counted {step.counted}, predicted {sum(calls)} and {sum(received)}")
    for label in {*step.predicted, *step.recorded}:
        predicted, recorded = step.predicted.get(label), step.recorded.get(label)
        if predicted != recorded:
            found.append(f"{label}: recorded {recorded}, predicted {predicted}")
    if step.messages != step.profiled:
        found.append(f"a profile saw {step.profiled} messages, not {step.messages}")
    return found


def check(ranks: int, cases: dict[str, Case]) -> None:
    for steps in run_gloo(ranks, counted_steps, ranks, cases, timeout=SECONDS):
        for name, step in steps.items():
            assert not differences(step), name
            assert step.counted.received, name


def test_two_processes_exchange_what_is_predicted_to_the_byte():
    presets = {name: Case(name, {"parallel.sp": 2} | TWO.get(name, {})) for name in NAMES}
    check(2, presets | SHARED)


def test_four_processes_exchange_what_is_predicted_to_the_byte(texts):
    sizes = {"parallel.sp": 4}
    presets = {name: Case(name, sizes, number=1) for name in NAMES if name not in SAME}
    packed = {"data.task": "", "data.path": texts, "parallel.sp": 4}
    check(4, presets | FOUR | {"packed documents": Case("lansa", packed, True)})


def test_one_process_exchanges_nothing():
    cases = {name: Case(name, number=1) for name in NAMES if name not in SAME}
    for name, step in counted_steps(0, 1, cases).items():
        assert (step.predicted, step.recorded, step.counted) == ({}, {}, Traffic(0, 0)), name
