"""Makes discrete_gaussian.jsonl: draws of OpenDP's discrete Gaussian, that src/privacy/tests/opendp.rs compares ours with.

    python -m venv venv && venv/bin/pip install opendp==0.16.0
    venv/bin/python discrete_gaussian.py > discrete_gaussian.jsonl

One JSON object per line after the first, which names the version: `sigma`, and how often each value came out. OpenDP
cannot be seeded, so that another run gives other counts of the same distribution.
"""

import collections
import importlib.metadata
import json

import opendp.prelude as dp

DRAWS = 100_000


def draw(sigma):
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64"), size=DRAWS), dp.l2_distance(T=float)
    return dp.m.make_gaussian(*space, scale=sigma)([0] * DRAWS)


def main():
    print(json.dumps({"opendp": importlib.metadata.version("opendp")}))
    for sigma in (0.3, 1.0, 10.0):
        counts = collections.Counter(draw(sigma))
        print(json.dumps({"sigma": sigma, "counts": sorted(counts.items())}))


if __name__ == "__main__":
    main()
