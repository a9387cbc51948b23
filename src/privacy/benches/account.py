"""dp_accounting's side of account.rs: the same event, δ and discretisation; one JSON line."""

import importlib.metadata
import json
import statistics
import time

import dp_accounting
from dp_accounting.pld import PLDAccountant

event = dp_accounting.SelfComposedDpEvent(
    dp_accounting.PoissonSampledDpEvent(4096 / 180_000, dp_accounting.GaussianDpEvent(1.1220)), 439
)


def answer():
    return PLDAccountant(value_discretization_interval=1e-4).compose(event).get_epsilon(5e-7)


seconds = []
for _ in range(7):
    start = time.perf_counter()
    epsilon = answer()
    seconds.append(time.perf_counter() - start)
version = importlib.metadata.version("dp-accounting")
print(json.dumps({"seconds": statistics.median(seconds), "epsilon": float(epsilon), "version": version}))
