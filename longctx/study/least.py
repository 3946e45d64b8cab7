"""Robust fits of laws to losses, many at a time.

A law has a term `b (e^(-s x) - 1) / s` for each variable, x being its logarithm, above a loss m
where all x are 0. That is floor + factor e^(-s x) with factor b / s and floor m - sum of b / s, but
tells curves that are nearly straight, or bend the other way, as well. Without a floor, it is the
straight line c - s x of the logarithm of the loss.
"""

import itertools
from dataclasses import dataclass

import numpy as np

DELTA = 0.01
"""Residuals of the logarithm of a loss beyond this count linearly and not squared (Huber)."""
ROUNDS = 60
LEAST_LOSS = 1e-9
STRAIGHT = 1e-4
"""Bends below this are taken from a series."""
STARTS = (0.05, 0.2, 0.6)
"""Exponents that a fit starts from."""


@dataclass(frozen=True)
class Fits:
    """Parameters m, b and s of each term, or c and s without a floor; and how good each is."""

    parameters_BP: np.ndarray
    cost_B: np.ndarray
    converged_B: np.ndarray


def has_floor(parameters_BP: np.ndarray) -> bool:
    """Whether these are parameters of a law that may have a floor."""
    return parameters_BP.shape[-1] % 2 == 1


def predict(parameters_BP: np.ndarray, x_NK: np.ndarray) -> np.ndarray:
    """Logarithms of losses `[fits, points]`."""
    return _model(parameters_BP, x_NK)[0]


def best_fit(y_N: np.ndarray, x_NK: np.ndarray, floor: bool) -> Fits:
    """The best of the fits from some starts, as fits of one row."""
    start_BP = _starts(y_N, x_NK, floor)
    found = minimize(np.broadcast_to(y_N, (len(start_BP), len(y_N))), x_NK, start_BP)
    best = int(np.where(found.converged_B, found.cost_B, found.cost_B + 1e3).argmin())
    own = slice(best, best + 1)
    return Fits(found.parameters_BP[own], found.cost_B[own], found.converged_B[own])


def minimize(y_BN: np.ndarray, x_NK: np.ndarray, start_BP: np.ndarray) -> Fits:
    """Levenberg and Marquardt's steps on Huber's cost, for every row by itself."""
    at_BP, damping_B = start_BP.copy(), np.full(len(start_BP), 1e-3)
    cost_B, ended_B = _cost(at_BP, y_BN, x_NK), np.zeros(len(start_BP), bool)
    for _ in range(ROUNDS):
        rows = np.flatnonzero(~ended_B)
        if not len(rows):
            break
        move_RP, gain_R = _move(at_BP[rows], y_BN[rows], x_NK, damping_B[rows])
        ended_B[rows] = gain_R <= 1e-5 * cost_B[rows] + 1e-14
        moved_RP = at_BP[rows] + move_RP
        moved_R = _cost(moved_RP, y_BN[rows], x_NK)
        better_R = moved_R < cost_B[rows]
        at_BP[rows[better_R]] = moved_RP[better_R]
        cost_B[rows[better_R]] = moved_R[better_R]
        damping_R = damping_B[rows] * np.where(better_R, 0.25, 4.0)
        damping_B[rows] = np.clip(damping_R, 1e-9, 1e9)
    return Fits(at_BP, cost_B, ended_B & np.isfinite(cost_B))


def _move(
    at_BP: np.ndarray, y_BN: np.ndarray, x_NK: np.ndarray, damping_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A step for each row, and how much cheaper that would be if costs were parabolas."""
    log_BN, slopes_BNP = _model(at_BP, x_NK)
    residual_BN, own = y_BN - log_BN, np.eye(at_BP.shape[1])
    weighted_BNP = slopes_BNP * (DELTA / np.maximum(np.abs(residual_BN), DELTA))[:, :, None]
    normal_BPP = weighted_BNP.transpose(0, 2, 1) @ slopes_BNP
    pull_BP1 = weighted_BNP.transpose(0, 2, 1) @ residual_BN[:, :, None]
    ridge_BPP = (damping_B[:, None, None] * (normal_BPP + 1e-9) + 1e-12) * own
    move_BP = np.linalg.solve(normal_BPP + ridge_BPP, pull_BP1)[:, :, 0]
    return move_BP, (move_BP * pull_BP1[:, :, 0]).sum(1)


def _model(parameters_BP: np.ndarray, x_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of losses, and their slopes by each parameter."""
    terms = x_NK.shape[1]
    if not has_floor(parameters_BP):
        ones_BN1 = np.ones((len(parameters_BP), len(x_NK), 1))
        slopes_BNP = np.concatenate((ones_BN1, -x_NK * ones_BN1), 2)
        return (slopes_BNP @ parameters_BP[:, :, None])[:, :, 0], slopes_BNP
    fall_B1K, bend_B1K = parameters_BP[:, None, 1 : terms + 1], parameters_BP[:, None, terms + 1 :]
    reach_BNK = np.clip(-bend_B1K * x_NK, -50.0, 50.0)
    safe_B1K = np.where(np.abs(bend_B1K) < STRAIGHT, STRAIGHT, bend_B1K)
    is_bent = np.abs(bend_B1K) >= STRAIGHT
    shape_BNK = np.where(is_bent, np.expm1(reach_BNK) / safe_B1K, -x_NK + bend_B1K * x_NK**2 / 2)
    bending_BNK = (-x_NK * np.exp(reach_BNK) - shape_BNK) / safe_B1K
    bending_BNK = np.where(is_bent, bending_BNK, x_NK**2 / 2 - bend_B1K * x_NK**3 / 3)
    loss_BN = parameters_BP[:, :1] + (fall_B1K * shape_BNK).sum(2)
    loss_BN = np.maximum(loss_BN, LEAST_LOSS)
    ones_BN1 = np.ones((*loss_BN.shape, 1))
    slopes_BNP = np.concatenate((ones_BN1, shape_BNK, fall_B1K * bending_BNK), 2)
    return np.log(loss_BN), slopes_BNP / loss_BN[:, :, None]


def _cost(parameters_BP: np.ndarray, y_BN: np.ndarray, x_NK: np.ndarray) -> np.ndarray:
    off_BN = np.abs(y_BN - _model(parameters_BP, x_NK)[0])
    inside_BN = np.minimum(off_BN, DELTA)
    return (inside_BN * (off_BN - 0.5 * inside_BN)).sum(1)


def _starts(y_N: np.ndarray, x_NK: np.ndarray, floor: bool) -> np.ndarray:
    values_N = np.exp(y_N) if floor else y_N
    columns_NJ = np.concatenate((np.ones((len(y_N), 1)), -x_NK), 1)
    line_J = np.linalg.lstsq(columns_NJ, values_N, rcond=None)[0]
    bends = itertools.product(STARTS, repeat=x_NK.shape[1]) if floor else [()]
    return np.array([[*line_J, *bend] for bend in bends])
