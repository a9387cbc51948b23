#!/usr/bin/env bash
# Measures doppel beside its peers: builds the benchmarks in the profile of the demo, installs the peers by pinned version
# into DOPPEL_CACHE, and runs both in turn. Arguments go to tests/bench/compare.py, such as `--only train`.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=cuda infra/setup.sh libtorch
infra/setup.sh models data bench
peers=$DOPPEL_CACHE/bench-$(sha256sum infra/downloads-bench.txt | cut -c1-12)

# Prints where the bench `speed` of package $1 was built.
built() {
  cargo build --workspace --benches --locked --message-format=json 2>/dev/null |
    python3 -c 'import json, sys
for line in sys.stdin:
    it = json.loads(line)
    if it.get("target", {}).get("name") == "speed" and it["manifest_path"].endswith(sys.argv[1]):
        print(it["executable"])' "$1/Cargo.toml"
}

PYTHONPATH=$peers:$DOPPEL_CACHE/libtorch-2.11.0-cuda/site python3 tests/bench/compare.py \
  --cache "$DOPPEL_CACHE" --lm "$(built src/lm)" --vote "$(built src/vote)" "$@"
