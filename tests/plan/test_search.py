"""The search proposes what is legal, fits and is fast, and says why others are not."""

import time
from dataclasses import replace

import pytest

from longctx.config import apply_overrides
from longctx.mixers.moba import MoBAConfig
from longctx.plan.choices import changed, divisors, meshes
from longctx.plan.clusters import GIB, load_cluster
from longctx.plan.longest import longest
from longctx.plan.reasons import choice_of, runners_up
from longctx.plan.search import Candidate, Room, choose_memory, largest_memory, room_of, search
from longctx.plan.units import duration, gib, short, told
from longctx.plan.workload import workload
from longctx.train.settings import load_settings

CLUSTER = load_cluster("8xh100")
SETTINGS = apply_overrides(
    load_settings("340m"), ["--train.seq_len", "262144", "--train.batch_size", "4"], "test"
)
VOCABULARY = 32768


@pytest.fixture(scope="module")
def candidates():
    return search(SETTINGS, CLUSTER, 8, VOCABULARY, "bf16")


def options_of(candidate):
    return [word for pair in candidate.overrides.items() for word in (f"--{pair[0]}", str(pair[1]))]


def test_the_best_fits_and_is_the_fastest_that_does(candidates):
    best, fitting = candidates[0], [each for each in candidates if each.fits]
    assert best.fits
    assert best.time.total <= 1.003 * min(each.time.total for each in fitting)
    assert [each.fits for each in candidates] == sorted((e.fits for e in candidates), reverse=True)


def test_what_is_proposed_can_be_typed_and_is_legal(candidates):
    for candidate in candidates[:: max(1, len(candidates) // 40)]:
        settings = apply_overrides(SETTINGS, options_of(candidate), "longctx train")
        assert workload(settings, 8, VOCABULARY, "bf16") == candidate.work


def test_choices_are_covered(candidates):
    seen = {}
    for candidate in candidates:
        for name, value in choice_of(candidate.work).items():
            seen.setdefault(name, set()).add(value)
    assert seen["sp"] == {1, 2, 4, 8}
    assert seen["dp"] == {1, 2, 4}
    assert seen["placement"] == {"contiguous", "zigzag", "mirror"}
    assert seen["prefix"] >= {"allgather", "scan"}
    assert seen["stream"] == {"allgather", "ring"}
    assert seen["engine"] == {"fsdp2", "none"}
    assert seen["weights"] == {"fp32", "bf16"}
    assert seen["checkpointing"] == {"none", "keep", "full"}
    assert seen["activations"] == {"device", "cpu"}
    assert len(seen["heads"]) > 1


def test_a_batch_that_replicas_do_not_divide_leaves_them_out():
    assert {8 // (m["parallel.sp"] * m["parallel.tp"]) for m in meshes(8, 8, 6)} == {1, 2}
    assert {m["parallel.tp"] for m in meshes(16, 2, 1)} == {1, 2}
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_each_runner_up_has_its_reason(candidates):
    runners = runners_up(candidates)
    assert len(runners) > 5
    for runner in runners:
        assert runner.differs
        assert runner.why.startswith("needs ") != runner.candidate.fits
    slow = [r for r in runners if r.candidate.fits and r.why != "as fast"]
    assert all(r.candidate.time.total > candidates[0].time.total for r in slow)
    assert any("contiguous" in r.differs.values() and "unequal" in r.why for r in slow)


def test_the_fastest_policy_that_fits_is_chosen():
    settings = changed(SETTINGS, {"parallel.sp": 8})

    def chosen(room):
        return choose_memory(settings, 8, VOCABULARY, "bf16", room)

    order = ["none", "keep", "full"]
    policies = [chosen(Room(size * GIB, 1e15)) for size in (1000, 40, 30, 20, 12, 8, 6, 4, 1)]
    ranks = [order.index(policy.checkpointing) for policy in policies]
    assert ranks == sorted(ranks)
    assert policies[0].checkpointing == "none"
    assert policies[-1].checkpointing == "full"
    assert policies[-1].activations == "cpu"
    on_cpu = chosen(Room(1.0, 1.0, is_apart=False))
    assert on_cpu.activations == "device"


def test_a_chosen_policy_fits_where_one_does():
    settings = changed(SETTINGS, {"parallel.sp": 8})
    for size in (40, 20, 12):
        room = Room(size * GIB, 1e15)
        memory = choose_memory(settings, 8, VOCABULARY, "bf16", room)
        work = workload(replace(settings, memory=memory), 8, VOCABULARY, "bf16")
        assert not room.lacks(largest_memory(work, True))


def test_the_longest_sequence_fits_and_a_longer_one_does_not():
    settings = changed(SETTINGS, {"parallel.sp": 8})
    work, room = workload(settings, 8, VOCABULARY, "bf16"), room_of(CLUSTER)
    tokens, found = longest([work], room)
    assert found is not None
    assert tokens == found.settings.train.seq_len
    assert not room.lacks(largest_memory(found, True))
    assert room.lacks(largest_memory(work.with_length(int(tokens * 1.04)), True))
    assert longest([work], Room(1.0, 1.0)) == (0, None)
    half, _ = longest([work], room._replace(device=room.device / 2))
    assert 0 < half < tokens


def test_memory_that_host_and_device_share_is_counted_together():
    on_host = {"memory.checkpointing": "keep", "memory.activations": "cpu"}
    work = workload(changed(SETTINGS, on_host), 1, VOCABULARY, "bf16")
    memory = Candidate(work, CLUSTER, {}).memory
    assert memory.host > 5
    room = Room(memory.device + memory.host - 5, 0.0, is_apart=False)
    assert room.lacks(memory) == 5
    assert Room(memory.device, memory.host).lacks(memory) == 0


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("node", "processes", "preset", "train", "way"),
    [
        (8, 64, "7b", (1 << 24, 2, 1), {"sp": 64, "stream": "ring", "checkpointing": "keep",
                                        "mlp_tokens": 4096, "activations": "cpu"}),
        (16, 16, "7b", (1 << 17, 32, 1), {"sp": 16, "heads": 2, "gather_heads": 1,
                                          "weights": "bf16"}),
        (8, 32, "kimi-linear", (1 << 18, 16, 1), {"sp": 32, "heads": 8, "stream": "ring",
                                                  "weights": "bf16"}),
    ],
)  # fmt: skip
def test_memory_that_another_way_for_keys_saves_is_used(node, processes, preset, train, way):
    """Ways that only fit, or are only faster, with several choices made together."""
    cluster = replace(CLUSTER, processes_per_node=node)
    memory = ("checkpointing", "mlp_tokens", "activations")
    sizes = dict(zip(("seq_len", "batch_size", "micro_batch"), train))
    settings = changed(load_settings(preset), {f"train.{n}": size for n, size in sizes.items()})
    best = search(settings, cluster, processes, 128256, "bf16")[0]
    changes = {f"{'memory' if n in memory else 'parallel'}.{n}": v for n, v in way.items()}
    other = Candidate(
        workload(changed(settings, changes), processes, 128256, "bf16"), cluster, changes
    )
    assert best.fits
    assert other.fits
    assert best.time.total < 1.004 * other.time.total


def test_sequences_of_a_pass_are_counted_when_memory_is_chosen():
    """Short ones, so many that tiles pay."""
    sizes = {"train.seq_len": 4096, "train.batch_size": 64, "train.micro_batch": 0}
    chosen = choose_memory(
        changed(SETTINGS, sizes), 1, VOCABULARY, "bf16", Room(1.0, 1.0, is_apart=False)
    )
    assert chosen.mlp_tokens == 4096


def test_no_more_processes_share_a_vocabulary_than_it_has_tokens():
    found = search(changed(SETTINGS, {"train.seq_len": 4096}), CLUSTER, 4, 2, "bf16")
    assert max(each.work.split.tp for each in found) == 2


@pytest.mark.cluster
def test_a_giant_on_4096_processes_is_planned_in_seconds():
    giant = {"model.width": 16384, "model.depth": 126, "model.mlp_hidden": 53248}
    mixers = {
        letter: replace(mixer, num_heads=128)
        for letter, mixer in load_settings("7b").model.mixers.items()
    }
    sizes = {"train.seq_len": 1 << 20, "train.batch_size": 16, "train.micro_batch": 0}
    settings = changed(load_settings("7b"), giant | {"model.mixers": mixers} | sizes)
    started = time.process_time()
    candidates = search(settings, CLUSTER, 4096, 128256, "bf16")
    assert time.process_time() - started < 8
    assert candidates[0].fits


@pytest.mark.cluster
def test_layers_that_are_run_are_exact_at_the_end():
    settings = changed(load_settings("tiny"), {"train.seq_len": 65536, "train.batch_size": 4})
    mixers = settings.model.mixers | {"S": MoBAConfig(num_heads=4)}
    settings = changed(settings, {"model.mixers": mixers})
    candidates = search(settings, CLUSTER, 2, 512, "bf16")
    assert candidates[0].stand_in is None
    assert candidates[0].fits
    other = next(each for each in candidates[1:] if each.work.split.sp == 2)
    assert other.stand_in is not None
    own = largest_memory(other.work, True)
    assert other.memory.device == pytest.approx(own.device, rel=0.3)


def test_numbers_are_written_for_people():
    assert [duration(s) for s in (0, 2e-6, 0.0123, 4.2, 156.1, 700, 8000, 300000)] == [
        "0 us", "2 us", "12.3 ms", "4.2 s", "156.1 s", "11.7 min", "2.22 h", "3.47 days",
    ]  # fmt: skip
    assert [gib(n) for n in (100, 5e6, 92.1 * GIB)] == ["0.1 KiB", "4.8 MiB", "92.1 GiB"]
    assert [short(n) for n in (0, 12, 7.25e9, 3.36e12)] == ["0", "12", "7.25 G", "3.36 T"]
    assert told({"parallel.sp": 4, "train.micro_batch": 1}) == (
        "--parallel.sp 4 --train.micro_batch 1"
    )
