"""Prints the factors of the polynomials in src/lm/src/kernels.rs, and how far they are from what they stand for.

    python tests/golden/kernels.py        # numpy 2.4

The largest error is made as small as it gets by weighing the points of a least-squares fit by their errors, again and
again (Lawson's algorithm; for a quotient, with the divisor of the round before: Loeb's).
"""

from math import erf, log

import numpy as np

ROUNDS = 2500


def chebyshev(count: int) -> np.ndarray:
    """Points between -1 and 1, closest at the ends."""
    return np.cos(np.pi * (np.arange(count) + 0.5) / count)


def least_squares(columns: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    size = np.abs(columns).max(0)
    return np.linalg.lstsq(columns / size * weights[:, None], values * weights, rcond=None)[0] / size


def exponential(terms: int = 4) -> tuple[np.ndarray, float]:
    """c of exp(x) = 1 + x + x² Σ cᵢxⁱ where |x| ≤ ln(2) / 2, and the largest relative error."""
    x = chebyshev(4001) * log(2) / 2 * 1.0001
    inverse = np.exp(-x)
    columns = np.stack([x ** (2 + place) * inverse for place in range(terms)], 1)
    values = 1 - (1 + x) * inverse
    weights = np.ones_like(x)
    for _ in range(ROUNDS):
        factors = least_squares(columns, values, np.sqrt(weights))
        errors = np.abs(columns @ factors - values)
        weights *= errors / errors.mean() + 1e-9
        weights /= weights.sum()
    return factors, errors.max()


def normal(end: float = 5.2, above: int = 5, below: int = 6) -> tuple[np.ndarray, np.ndarray, float]:
    """a and b of P(standard normal < x) − ½ = x Σ aᵢx²ⁱ / Σ bᵢx²ⁱ, with b₀ = 1, where 0 ≤ x ≤ `end`, and the largest error.

    At `end` it shall be ½: nothing is left of what is far below.
    """
    x = np.sort((chebyshev(4001) + 1) / 2 * end)
    x = np.append(x[x > 1e-6], end)
    values = np.array([erf(point / 2**0.5) / 2 for point in x])
    values[-1] = 0.5
    powers = np.stack([x ** (2 * place) for place in range(below)], 1)
    columns = np.concatenate([x[:, None] * powers[:, :above], -values[:, None] * powers[:, 1:]], 1)
    weights, divisor, best = np.ones_like(x), np.ones_like(x), None
    for round_ in range(ROUNDS):
        scale = np.sqrt(weights) / divisor
        scale[-1] = scale.max() * (20 if round_ > 300 else 1)
        factors = least_squares(columns, values, scale)
        a, b = factors[:above], np.append(1.0, factors[above:])
        divisor = powers @ b
        if (divisor <= 0).any():
            divisor, weights = np.maximum(np.abs(divisor), 0.3), weights / 2 + 0.5 / len(x)
            continue
        errors = np.abs(x * (powers[:, :above] @ a) / divisor - values)
        if best is None or errors.max() < best[2]:
            best = a, b, errors.max()
        weights *= np.sqrt(errors / errors.mean()) + 1e-6
        weights /= weights.sum()
    return best


if __name__ == "__main__":
    factors, error = exponential()
    print("EXP", [float(np.float32(factor)) for factor in factors], f"{error:.2g}")
    a, b, error = normal()
    print("NORMAL_ABOVE", [float(np.float32(factor)) for factor in a])
    print("NORMAL_BELOW", [float(np.float32(factor)) for factor in b], f"{error:.2g}")
