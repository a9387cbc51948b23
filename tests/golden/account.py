"""Makes account.jsonl: epsilon by the peers, for configurations that src/privacy/tests/golden.rs checks.

    python -m venv venv && venv/bin/pip install dp-accounting==0.6.0 prv-accountant==0.2.0
    venv/bin/python account.py > account.jsonl

One JSON object per line: `events` (kind, parameters), `delta`, and per peer its answer, or null where the peer failed
or took more than a minute. `dp_pld`, `dp_rdp`: dp_accounting, add-or-remove-one. `prv_lower`, `prv_upper`:
prv_accountant's rigorous bounds. A PLD bound that dp_accounting's own discretisation dominates is redone finer; the
line keeps the smaller, and `interval` tells which discretisation gave it.
"""

import importlib.metadata
import json
import math
import os
import random
import signal
import sys
import warnings

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

warnings.filterwarnings("ignore")
SECONDS = int(os.environ.get("SECONDS_PER_ANSWER", "60"))


class TooSlow(Exception):
    pass


def limited(function, *arguments):
    def stop(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        value = function(*arguments)
    except (Exception, TooSlow) as error:  # A peer may fail in any way; the line then says null.
        print(f"{function.__name__}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
        return None
    finally:
        signal.alarm(0)
    return value


def dp_event(event):
    gaussian = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
    if event["kind"] == "gaussian":
        return gaussian
    sampled = dp_accounting.PoissonSampledDpEvent(event["sampling_probability"], gaussian)
    return dp_accounting.SelfComposedDpEvent(sampled, event["steps"])


def compose(accountant, events):
    for event in events:
        accountant.compose(dp_event(event))
    return accountant


def finite(value):
    return value if value is not None and math.isfinite(value) else None


def dp_pld(events, delta, interval):
    accountant = PLDAccountant(value_discretization_interval=interval)
    return finite(float(compose(accountant, events).get_epsilon(delta)))


def dp_rdp(events, delta):
    return finite(float(compose(RdpAccountant(), events).get_epsilon(delta)))


def prv(events, delta, error):
    from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant

    mechanisms, counts = [], []
    for event in events:
        if event["kind"] == "gaussian":
            mechanisms.append(GaussianMechanism(noise_multiplier=event["noise_multiplier"]))
        else:
            mechanisms.append(
                PoissonSubsampledGaussianMechanism(
                    noise_multiplier=event["noise_multiplier"],
                    sampling_probability=event["sampling_probability"],
                )
            )
        counts.append(event.get("steps", 1))
    accountant = PRVAccountant(
        prvs=mechanisms, max_self_compositions=counts, eps_error=error, delta_error=delta / 1000
    )
    lower, _, upper = accountant.compute_epsilon(delta=delta, num_self_compositions=counts)
    if not (math.isfinite(lower) and math.isfinite(upper) and lower <= upper):
        return None
    return [float(lower), float(upper)]


def sampled(q, sigma, steps):
    return {
        "kind": "poisson_sampled_gaussian",
        "sampling_probability": q,
        "noise_multiplier": sigma,
        "steps": steps,
    }


def gaussian(sigma):
    return {"kind": "gaussian", "noise_multiplier": sigma}


def configurations():
    arena = 4096 / 180_000
    yield [sampled(arena, 1.1220, 439)], 5e-7
    yield [sampled(arena, 0.8072, 439)], 5e-7
    yield [sampled(arena, 1.1220, 439), gaussian(10.0)], 5e-7
    yield [sampled(arena, 0.8072, 439), gaussian(10.0)], 5e-7
    yield [gaussian(10.0)], 5e-7
    for sigma in (0.3, 1.0, 7.0, 50.0):
        for delta in (1e-12, 1e-6, 1e-3):
            yield [gaussian(sigma)], delta
            yield [sampled(1.0, sigma, 10)], delta
            yield [sampled(0.01, sigma, 1)], delta
    for q in (1e-5, 1e-3, 0.3):
        for steps in (1, 1000, 100_000):
            yield [sampled(q, 0.7 if q < 1e-4 else 2.0, steps)], 1e-8
    dice = random.Random(4)

    def log_uniform(low, high):
        return float(f"{math.exp(dice.uniform(math.log(low), math.log(high))):.4g}")

    def draw(parts):
        events = []
        for _ in range(parts):
            if parts > 1 and dice.random() < 0.4:
                events.append(gaussian(log_uniform(0.5, 50)))
            else:
                steps = int(log_uniform(1, 100_000))
                events.append(sampled(log_uniform(1e-5, 1), log_uniform(0.3, 50), steps))
        return events, log_uniform(1e-12, 1e-3)

    wild = plain = mixed = 0
    while wild + plain + mixed < 195:
        events, delta = draw(1 if mixed >= 50 or dice.random() < 0.7 else dice.choice((2, 2, 3)))
        rdp = limited(dp_rdp, events, delta)
        ordinary = rdp is not None and 0.02 < rdp < 60
        if not ordinary:
            if wild >= 25:
                continue
            wild += 1
        elif len(events) == 1:
            if plain >= 120:
                continue
            plain += 1
        else:
            mixed += 1
        yield events, delta


def main():
    versions = {name: importlib.metadata.version(name) for name in ("dp-accounting", "prv-accountant")}
    print(json.dumps(versions))
    for events, delta in configurations():
        rdp = limited(dp_rdp, events, delta)
        scale = rdp if rdp else 1.0
        best, used = None, None
        for interval in {min(1e-2, max(1e-6, scale / 20_000)), min(1e-2, max(1e-6, scale / 200_000))}:
            answer = limited(dp_pld, events, delta, interval)
            if answer is not None and (best is None or answer < best):
                best, used = answer, interval
        bounds = limited(prv, events, delta, min(0.05, max(1e-3, scale * 2e-3))) or [None, None]
        line = {
            "events": events, "delta": delta, "dp_pld": best, "interval": used, "dp_rdp": rdp,
            "prv_lower": bounds[0], "prv_upper": bounds[1],
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
