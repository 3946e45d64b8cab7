"""Laws of loss: how it falls with compute, or with weights and tokens, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longctx.study.least import Fits, best_fit, has_floor, minimize, predict

RESAMPLES, SEED = 300, 0
COVERED = 0.9
"""Share of the truth that bands and ranges are meant to hold."""
NORMAL = 1.6449
"""The normal distribution's quantile of that share, both ends."""
FEWEST, FEWEST_TO_BEND, FEWEST_FOR_FLOOR = 3, 5, 7
"""Runs of a law, of a band that allows for a floor, and of a law with a floor: fewer that happen to
lie well seem to tell one."""
SPARE = 2
"""Runs beyond the constants of a law that a band needs."""
SURE = 0.9
"""Share of resamples that must find a floor for it to be believed."""
TINY = 0.01
"""A floor below this share of the least loss is none."""
STEEPEST, FLATTEST = 5.0, 1e-3
"""Exponents outside of these are not believed."""


@dataclass(frozen=True)
class Refusal:
    """No fit, and why."""

    reason: str


@dataclass(frozen=True)
class Draws:
    """Laws of one family: the best one, and those that fit resampled runs."""

    best_P: np.ndarray
    found_BP: np.ndarray
    made: int
    failed: int
    """Resamples that no law was found for."""


@dataclass(frozen=True)
class Law:
    """L = floor + sum over terms of factor * variable ** -exponent."""

    floor: float
    factors: tuple[float, ...]
    exponents: tuple[float, ...]
    points: int
    r2: float
    """Of logarithms of losses."""
    largest: float
    """The largest residual, as a share of the loss."""
    ranges: dict[str, tuple[float, float]]
    """Of `floor` and of `exponent`, or `exponent 1` and on, in COVERED of the resamples."""
    note: str
    """Why it has no floor or no band."""
    draws: Draws
    """Of the family that the band allows for, which may have a floor where the law has none."""
    centre_K: np.ndarray
    best_P: np.ndarray

    def at(self, *variables: Sequence[float] | np.ndarray) -> np.ndarray:
        """Losses there."""
        return np.exp(predict(self.best_P[None], self._centred(variables))[0])

    def band(self, *variables: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Limits of the law there, not of single runs; needs `has_band`."""
        x_NK = self._centred(variables)
        middle_N = predict(self.draws.best_P[None], x_NK)[0]
        ends = np.quantile(predict(self.draws.found_BP, x_NK), _ends(), axis=0)
        widening = student(self.points - len(self.draws.best_P)) / NORMAL
        low_N, high_N = middle_N + (ends - middle_N) * widening
        line_N = np.log(self.at(*variables))
        return np.exp(np.minimum(low_N, line_N)), np.exp(np.maximum(high_N, line_N))

    @property
    def has_band(self) -> bool:
        """Whether there were runs enough to know how sure it is."""
        return len(self.draws.found_BP) > 0

    def _centred(self, variables: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
        logs = [np.log(np.asarray(values, float)) for values in variables]
        return np.stack(logs, 1) - self.centre_K


def fit_compute(compute: Sequence[float], loss: Sequence[float]) -> Law | Refusal:
    """L = E + A C^-alpha through runs; without E where the runs cannot tell it, but then the band
    allows for one."""
    x_NK, y_N = _points([compute], loss)
    kinds = len(np.unique(x_NK[:, 0].round(3)))
    if kinds < FEWEST:
        return Refusal(f"needs runs at {FEWEST} amounts of compute, has {kinds}")
    plain = _fit(x_NK, y_N, floor=False)
    if not plain.converged_B[0] or not _are_sound(plain.parameters_BP, y_N)[0]:
        return Refusal("the loss does not fall with compute")
    own = _draws(x_NK, y_N, plain)
    note = f"no floor E: it needs {FEWEST_FOR_FLOOR} runs at {FEWEST + 1} amounts of compute"
    if len(y_N) < FEWEST_TO_BEND or kinds <= FEWEST:
        return _law(x_NK, y_N, plain, own, note)
    full = _fit(x_NK, y_N, floor=True)
    draws = _draws(x_NK, y_N, full)
    share = float(_are_sound(draws.found_BP, y_N).sum()) / draws.made if draws.made else 1.0
    if len(y_N) < FEWEST_FOR_FLOOR:
        pass
    elif not full.converged_B[0] or not _are_sound(full.parameters_BP, y_N)[0]:
        note = "no floor E: the best fit with it has none above 0"
    elif _criterion(full, len(y_N)) >= _criterion(plain, len(y_N)):
        note = "no floor E: the runs are described as well without"
    elif share < SURE:
        note = f"no floor E: only {100 * share:.0f} % of resamples find one"
    else:
        return _law(x_NK, y_N, full, draws, "")
    return _law(x_NK, y_N, plain, draws if len(draws.found_BP) else own, note, own)


def fit_size_and_tokens(
    size: Sequence[float], tokens: Sequence[float], loss: Sequence[float]
) -> Law | Refusal:
    """L = E + A N^-alpha + B D^-beta through runs of at least three sizes and three lengths."""
    x_NK, y_N = _points([size, tokens], loss)
    kinds = [len(np.unique(x_NK[:, k].round(3))) for k in range(2)]
    if min(kinds) < FEWEST or len(y_N) < 7:
        return Refusal(
            "needs 7 runs of 3 sizes and 3 numbers of tokens, has "
            f"{len(y_N)} of {kinds[0]} and {kinds[1]}"
        )
    fit = _fit(x_NK, y_N, floor=True)
    if not fit.converged_B[0] or not _are_sound(fit.parameters_BP, y_N)[0]:
        return Refusal("no law with a floor above 0 that falls with both size and tokens")
    return _law(x_NK, y_N, fit, _draws(x_NK, y_N, fit), "")


def student(freedom: int) -> float:
    """Student's quantile for COVERED, from the expansion around the normal one."""
    z, n = NORMAL, max(freedom, 1)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def resampled(middle_N: np.ndarray, y_N: np.ndarray, constants: int) -> np.ndarray:
    """Other values as these could have been, `[resamples, points]`: residuals in other places."""
    spread = np.sqrt(len(y_N) / (len(y_N) - constants))
    residual_N = spread * (y_N - middle_N - np.mean(y_N - middle_N))
    chosen_BN = np.random.default_rng(SEED).integers(len(y_N), size=(RESAMPLES, len(y_N)))
    return middle_N + residual_N[chosen_BN]


def determined(y_N: np.ndarray, middle_N: np.ndarray) -> float:
    """R squared; 1 where all values are the same and met."""
    total = float(((y_N - y_N.mean()) ** 2).sum())
    return 1.0 - float(((y_N - middle_N) ** 2).sum()) / total if total else 1.0


def _points(
    variables: Sequence[Sequence[float]], loss: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of what is a positive number."""
    all_NJ = np.stack([np.asarray(values, float) for values in (*variables, loss)], 1)
    kept_NJ = np.log(all_NJ[(np.isfinite(all_NJ) & (all_NJ > 0)).all(1)])
    return kept_NJ[:, :-1], kept_NJ[:, -1]


def _fit(x_NK: np.ndarray, y_N: np.ndarray, floor: bool) -> Fits:
    return best_fit(y_N, x_NK - x_NK.mean(0), floor)


def _criterion(fit: Fits, points: int) -> float:
    """Akaike's, corrected for few points: the lower, the better described."""
    constants = fit.parameters_BP.shape[1] + 1
    spare = max(points - constants - 1, 0.5)
    error = max(2 * float(fit.cost_B[0]) / points, 1e-16)
    return points * np.log(error) + 2 * constants + 2 * constants * (constants + 1) / spare


def _are_sound(parameters_BP: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """Whether exponents are such as losses have, and the floor, if there may be one, above 0."""
    exponents_BK = parameters_BP[:, -(parameters_BP.shape[1] // 2) :]
    sound_B = ((exponents_BK > FLATTEST) & (exponents_BK < STEEPEST)).all(1)
    if has_floor(parameters_BP):
        sound_B &= _floors(parameters_BP) > TINY * float(np.exp(y_N.min()))
    return sound_B


def _floors(parameters_BP: np.ndarray) -> np.ndarray:
    return parameters_BP[:, 0] - _factors(parameters_BP).sum(1)


def _factors(parameters_BP: np.ndarray) -> np.ndarray:
    """Of powers of the variables divided by their centres."""
    if not has_floor(parameters_BP):
        return np.exp(parameters_BP[:, :1])
    terms = parameters_BP.shape[1] // 2
    bends_BK = parameters_BP[:, terms + 1 :]
    return parameters_BP[:, 1 : terms + 1] / np.where(bends_BK == 0, np.nan, bends_BK)


def _draws(x_NK: np.ndarray, y_N: np.ndarray, fit: Fits) -> Draws:
    """Fits to resampled points, where there are enough of them."""
    best_P = fit.parameters_BP[0]
    if len(y_N) - len(best_P) < SPARE:
        return Draws(best_P, np.zeros((0, len(best_P))), 0, 0)
    x_NK = x_NK - x_NK.mean(0)
    values_BN = resampled(predict(fit.parameters_BP, x_NK)[0], y_N, len(best_P))
    found = minimize(values_BN, x_NK, np.repeat(best_P[None], len(values_BN), 0))
    kept_BP = found.parameters_BP[found.converged_B]
    return Draws(best_P, kept_BP, len(values_BN), int((~found.converged_B).sum()))


def _law(
    x_NK: np.ndarray,
    y_N: np.ndarray,
    fit: Fits,
    draws: Draws,
    note: str,
    own: Draws | None = None,
) -> Law:
    """A law from its best fit; `own` are draws of its family if `draws` are of another."""
    best_P, centre_K, terms = fit.parameters_BP[0], x_NK.mean(0), x_NK.shape[1]
    middle_N = predict(fit.parameters_BP, x_NK - centre_K)[0]
    if not len(draws.found_BP):
        note += f"{'; ' if note else ''}no band: it needs {len(best_P) + SPARE} runs"
    factors_K = _factors(fit.parameters_BP)[0] * np.exp(best_P[-terms:] * centre_K)
    return Law(
        floor=float(_floors(fit.parameters_BP)[0]) if has_floor(best_P) else 0.0,
        factors=tuple(float(x) for x in factors_K),
        exponents=tuple(float(x) for x in best_P[-terms:]),
        points=len(y_N),
        r2=determined(y_N, middle_N),
        largest=float(np.abs(np.expm1(y_N - middle_N)).max()),
        ranges=_ranges((own or draws).found_BP, terms),
        note=note,
        draws=draws,
        centre_K=centre_K,
        best_P=best_P,
    )


def _ends() -> tuple[float, float]:
    return (1 - COVERED) / 2, (1 + COVERED) / 2


def _ranges(draws_BP: np.ndarray, terms: int) -> dict[str, tuple[float, float]]:
    if not len(draws_BP):
        return {}
    names = ["exponent"] if terms == 1 else [f"exponent {k + 1}" for k in range(terms)]
    columns = dict(zip(names, draws_BP[:, -terms:].T))
    if has_floor(draws_BP):
        columns["floor"] = np.nan_to_num(np.maximum(_floors(draws_BP), 0.0))
    return {name: tuple(map(float, np.quantile(x, _ends()))) for name, x in columns.items()}
