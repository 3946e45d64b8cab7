"""Fits find the constants that numbers were made with, and how sure they are, or say why not."""

import numpy as np
import pytest

from longctx.report.curves import Series
from longctx.study.laws import (
    FEWEST_TO_BEND,
    Law,
    Refusal,
    fit_compute,
    fit_size_and_tokens,
    student,
)
from longctx.study.minima import fit_minima
from longctx.study.times import BY_LENGTH, BY_PROCESSES, fit_time, shares

STUDIES = 100


def losses(compute: np.ndarray, floor: float, noise: float, seed: int = 0) -> np.ndarray:
    """What runs of these FLOPs come to."""
    off = noise * np.random.default_rng(seed).standard_normal(len(compute))
    return (floor + 40.0 * compute**-0.15) * np.exp(off)


def chinchilla(size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return 1.5 + 60.0 * size**-0.3 + 200.0 * tokens**-0.3


def test_a_law_without_noise_is_found_to_the_last_digits():
    compute = np.geomspace(1e10, 1e14, 9)
    law = fit_compute(compute, losses(compute, 1.5, 0.0))
    found = (law.floor, *law.factors, *law.exponents)
    assert found == pytest.approx((1.5, 40.0, 0.15), rel=2e-3)
    assert law.r2 > 0.999999
    assert law.largest < 1e-5
    assert law.note == ""
    assert law.draws.made == 300
    assert law.draws.failed == 0


def test_ranges_hold_the_constants_of_runs_with_noise_and_a_run_gone_wrong_does_not_move_them():
    compute = np.geomspace(1e10, 1e14, 16)
    noisy = losses(compute, 1.5, 0.002)
    law = fit_compute(compute, noisy)
    assert law.ranges["floor"][0] < 1.5 < law.ranges["floor"][1]
    assert law.ranges["exponent"][0] < 0.15 < law.ranges["exponent"][1]
    wrong = noisy.copy()
    wrong[7] *= 1.5
    robust = fit_compute(compute, wrong)
    assert robust.floor == pytest.approx(law.floor, rel=0.03)
    assert robust.largest == pytest.approx(0.5, rel=0.05)


def covered(floor: float, noise: float, points: int) -> tuple[float, float]:
    """The share of laws inside their bands at five places, and that of laws with a floor."""
    compute, places = np.geomspace(1e10, 1e13, points), np.geomspace(1e10, 1e13, 5)
    inside, floors = [], 0
    for seed in range(STUDIES):
        law = fit_compute(compute, losses(compute, floor, noise, seed))
        assert isinstance(law, Law)
        low, high = law.band(places)
        truth = losses(places, floor, 0.0)
        inside.append((low <= truth) & (truth <= high))
        floors += law.floor > 0
        assert (low <= law.at(places)).all()
        assert (law.at(places) <= high).all()
    return float(np.mean(inside)), floors / STUDIES


def test_bands_hold_the_law_of_nine_in_ten_studies():
    share, floors = covered(1.5, 0.003, 9)
    assert 0.84 < share < 0.96
    assert floors > 0.9


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("floor", "noise", "points"), [(0.0, 0.003, 6), (1.5, 0.003, 6), (1.5, 0.02, 12)]
)
def test_bands_hold_it_also_where_runs_cannot_tell_a_floor(floor, noise, points):
    share, floors = covered(floor, noise, points)
    assert 0.8 < share < 0.97
    assert floors < 0.5


def test_a_floor_that_runs_do_not_tell_is_left_out_and_the_band_allows_for_one():
    compute = np.geomspace(1e10, 1e11, 12)
    law = fit_compute(compute, losses(compute, 0.0, 0.004))
    assert law.floor == 0
    assert law.note.startswith("no floor E: ")
    assert len(law.draws.best_P) == 3
    assert "floor" not in law.ranges
    six = np.geomspace(1e10, 1e14, 6)
    law = fit_compute(six, losses(six, 1.5, 0.0001))
    assert law.floor == 0
    assert len(law.draws.best_P) == 3
    few = np.geomspace(1e10, 1e14, FEWEST_TO_BEND - 1)
    law = fit_compute(few, losses(few, 1.5, 0.001))
    assert law.floor == 0
    assert "it needs 7 runs" in law.note
    assert law.has_band
    law = fit_compute(few[:3], losses(few[:3], 1.5, 0.001))
    assert not law.has_band
    assert "no band: it needs 4 runs" in law.note


def test_the_same_runs_have_the_same_band_each_time():
    compute = np.geomspace(1e10, 1e14, 8)
    bands = [fit_compute(compute, losses(compute, 1.5, 0.003)).band(compute) for _ in range(2)]
    assert np.array_equal(bands[0], bands[1])


@pytest.mark.parametrize(
    ("compute", "loss", "reason"),
    [
        ([], [], "needs runs at 3 amounts of compute, has 0"),
        ([1e10, 1e10, 1e10], [2.0, 2.1, 2.2], "has 1"),
        ([1e10, 1e11, float("nan"), -1], [2.0, 1.9, 1.8, 1.7], "has 2"),
        ([1e10, 1e11, 1e12, 1e13], [2.0, 2.1, 2.2, 2.3], "does not fall"),
        ([1e10, 1e11, 1e12, 1e13], [2.0, 2.0, 2.0, 2.0], "does not fall"),
        ([1e10, 1e11, 1e12], [2.0, float("inf"), 1.9], "has 2"),
    ],
)
def test_points_that_make_no_law_are_refused_with_a_reason(compute, loss, reason):
    refused = fit_compute(compute, loss)
    assert isinstance(refused, Refusal)
    assert reason in refused.reason


def test_the_law_of_weights_and_tokens_is_found_or_refused():
    size, tokens = (x.ravel() for x in np.meshgrid([1e5, 4e5, 2e6, 8e6], [1e6, 1e7, 1e8]))
    noise = np.exp(0.0005 * np.random.default_rng(0).standard_normal(12))
    law = fit_size_and_tokens(size, tokens, chinchilla(size, tokens) * noise)
    assert law.floor == pytest.approx(1.5, abs=0.05)
    assert law.exponents == pytest.approx((0.3, 0.3), abs=0.03)
    assert law.at(size, tokens) == pytest.approx(chinchilla(size, tokens), rel=2e-3)
    for number in (1, 2):
        low, high = law.ranges[f"exponent {number}"]
        assert 0.25 < low < high < 0.35
    refused = fit_size_and_tokens(size[:8], tokens[:8], chinchilla(size[:8], tokens[:8]))
    assert refused.reason == "needs 7 runs of 3 sizes and 3 numbers of tokens, has 8 of 4 and 2"


def curves(sizes: list[float], noise: float = 0.0005) -> list[tuple[float, Series]]:
    generator, compute = np.random.default_rng(1), np.geomspace(1e12, 1e15, 30)
    return [
        (
            size,
            Series(
                compute,
                chinchilla(np.array(size), compute / 6 / size)
                * np.exp(noise * generator.standard_normal(30)),
            ),
        )
        for size in sizes
    ]


def test_the_best_size_grows_as_the_law_says():
    found = fit_minima(curves([5e4, 1e5, 2e5, 4e5, 8e5, 1.6e6, 3.2e6]))
    known = [minimum for minimum in found.minima if minimum.best]
    assert len(known) >= 4
    for minimum in known:
        # Of 60 N^-0.3 + 200 (C / 6 N)^-0.3 the least is where both terms are equal.
        truth = (60 / 200) ** (1 / 0.6) * (minimum.budget / 6) ** 0.5
        assert minimum.best == pytest.approx(truth, rel=0.25)
        low, high = minimum.range
        assert low < minimum.best < high
    assert found.exponent == pytest.approx(0.5, abs=0.06)
    assert found.range[0] < found.exponent < found.range[1]


def test_a_minimum_that_is_not_between_sizes_or_cannot_be_sure_is_told():
    small = fit_minima(curves([1e3, 2e3, 4e3]))
    assert {m.best for m in small.minima} == {None}
    assert all("larger ones would be better" in m.note for m in small.minima)
    assert small.exponent is None
    assert small.note.startswith("no growth: 0 of")
    three = fit_minima(curves([1e5, 4e5, 1.6e6]))
    known = [minimum for minimum in three.minima if minimum.best]
    assert known
    assert all(m.range is None and "three sizes" in m.note for m in known)


def test_of_several_curves_of_a_size_the_lowest_counts():
    own = curves([1e5, 2e5, 4e5, 8e5])
    worse = [(size, Series(series.x, 1.1 * series.y)) for size, series in own]
    once, twice = fit_minima(own), fit_minima([*worse, *own])
    assert [m.best for m in twice.minima] == [m.best for m in once.minima]


def test_sizes_of_which_the_middle_is_the_worst_have_no_best():
    x = np.geomspace(1e9, 1e12, 10)
    hill = [(size, Series(x, top + x**-0.1)) for size, top in ((1e5, 2.0), (2e5, 2.2), (4e5, 2.1))]
    assert {minimum.best for minimum in fit_minima(hill).minima} == {None}


def test_sizes_that_are_few_or_share_no_compute_have_no_minima():
    assert fit_minima(curves([1e5, 2e5])).reason == "needs 3 sizes, has 2"
    apart = [
        (size, Series(np.array([x, 2 * x]), np.array([2.0, 1.9])))
        for size, x in ((1e5, 1e9), (2e5, 1e11), (4e5, 1e13))
    ]
    assert "no amount of compute" in fit_minima(apart).reason
    assert (
        "no amount of compute"
        in fit_minima([(s, Series(c.x[:1], c.y[:1])) for s, c in apart]).reason
    )


def test_time_over_length_is_taken_apart():
    length = np.array([512, 1024, 2048, 4096, 8192, 16384.0])
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(6))
    fit = fit_time(length, (1e-4 + 2e-8 * length) * noise, BY_LENGTH)
    assert fit.terms["fixed"] == pytest.approx(1e-4, rel=0.03)
    assert fit.terms["n"] == pytest.approx(2e-8, rel=0.05)
    assert fit.largest < 0.03
    assert fit.r2 > 0.99
    flat = fit_time(length, 1e-4 * noise, BY_LENGTH)
    assert all(factor >= 0 for factor in flat.terms.values())
    assert shares(flat, 16384)["fixed"] > 0.95


def test_time_over_processes_is_taken_apart():
    processes = np.array([1, 2, 4, 8.0])
    fit = fit_time(processes, 0.1 + 2 / processes + 0.03 * (processes - 1), BY_PROCESSES)
    assert fit.terms == pytest.approx({"fixed": 0.1, "1/P": 2.0, "P-1": 0.03})
    assert fit.left_out == ()
    assert sum(shares(fit, 8.0).values()) == pytest.approx(1)
    few = fit_time(processes[:3], 0.2 + 0.8 / processes[:3], BY_PROCESSES)
    assert few.left_out == ("P-1",)
    refused = fit_time([1, 2, 2], [1.0, 0.6, 0.6], BY_PROCESSES)
    assert refused.reason == "needs 3 different values, has 2"
    assert isinstance(fit_time([1, 2, 4], [0.0, float("nan"), 1.0], BY_PROCESSES), Refusal)


def test_students_quantiles_are_those_of_the_tables():
    tables = {3: 2.353, 4: 2.132, 6: 1.943, 10: 1.812, 30: 1.697}
    for freedom, quantile in tables.items():
        assert student(freedom) == pytest.approx(quantile, rel=0.005)
