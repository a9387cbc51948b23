"""Makes audit.jsonl: lower bounds on epsilon that src/audit/src/bound.rs checks itself against.

    python3 audit.py > audit.jsonl

Needs nothing but Python. Binomial coefficients are whole numbers and chances have 60 decimal digits; each tail is the
plain sum of its terms. One JSON object per line: the counts, and `epsilon`, the bound.
`one_run`: Steinke, Nasr, Jagielski 2023, Theorem 5.2. `one_step`: Clopper-Pearson limits of two rates.
"""

import json
import math
from decimal import Decimal, getcontext

getcontext().prec = 60
HALVINGS = 90


def probability(n, k, p):
    """Chance of k successes in n; 0 ** 0 is 1 for us."""
    power = lambda base, exponent: base**exponent if exponent else Decimal(1)
    return Decimal(math.comb(n, k)) * power(p, k) * power(1 - p, n - k)


def at_least(n, k, p):
    if 2 * k > n:
        return sum((probability(n, j, p) for j in range(k, n + 1)), Decimal(0))
    return 1 - sum((probability(n, j, p) for j in range(k)), Decimal(0))


def largest(low, high, holds):
    low, high = Decimal(low), Decimal(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def one_run(canaries, guesses, right, delta, confidence):
    error = 1 - Decimal(str(confidence))

    def refuted(epsilon):
        p = epsilon.exp() / (epsilon.exp() + 1)
        tails = [at_least(guesses, right, p)]
        for k in range(right - 1, -1, -1):
            tails.append(tails[-1] + probability(guesses, k, p))
        worst = max(((tails[i] - tails[0]) / i for i in range(1, right + 1)), default=Decimal(0))
        return tails[0] + 2 * canaries * Decimal(str(delta)) * worst < error

    return largest(0, 50, refuted) if refuted(Decimal(0)) else Decimal(0)


def lower_limit(passed, trials, error):
    return largest(0, 1, lambda p: at_least(trials, passed, p) < error) if passed else Decimal(0)


def one_step(often, seldom, delta, confidence):
    error = (1 - Decimal(str(confidence))) / 2
    low = lower_limit(*often, error) - Decimal(str(delta))
    high = 1 - lower_limit(seldom[1] - seldom[0], seldom[1], error)
    return (low / high).ln() if low > high else Decimal(0)


def main():
    for canaries, guesses, rights in [
        (100, 100, (50, 60, 75, 99, 100)),
        (1000, 128, (64, 70, 90, 120, 128)),
        (4000, 252, (120, 150, 200, 240, 252)),
    ]:
        for right in rights:
            for delta, confidence in [(0, 0.95), (1e-5, 0.95), (1e-3, 0.99)]:
                case = {"canaries": canaries, "guesses": guesses, "right": right, "delta": delta, "confidence": confidence}
                print(json.dumps({"kind": "one_run", **case, "epsilon": float(one_run(**case))}))
    for often, seldom in [
        ((100, 100), (0, 100)),
        ((60, 100), (40, 100)),
        ((3, 200), (0, 150)),
        ((90, 1000), (10, 900)),
        ((300, 500), (100, 700)),
        ((1, 64), (0, 64)),
        ((850, 1000), (200, 1000)),
    ]:
        for delta, confidence in [(0, 0.95), (1e-5, 0.95), (1e-3, 0.99)]:
            case = {"often": often, "seldom": seldom, "delta": delta, "confidence": confidence}
            print(json.dumps({"kind": "one_step", **case, "epsilon": float(one_step(**case))}))


if __name__ == "__main__":
    main()
