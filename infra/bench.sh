#!/usr/bin/env bash
# Measures doppel beside its peers: builds the benchmarks in the profile of the demo, installs the peers by pinned version
# into DOPPEL_CACHE, and runs both in turn. Arguments go to tests/bench/compare.py, such as `--only train`.
# DEVICE=cuda measures on a GPU, with the CUDA libtorch on both sides and models of Llama's shapes (60 GB in DOPPEL_CACHE).
set -euo pipefail
cd "$(dirname "$0")/.."

device=${DEVICE:-cpu}
peers=$DOPPEL_CACHE/bench-$(sha256sum infra/downloads-bench.txt | cut -c1-12)
llama=$DOPPEL_CACHE/llama-$(sha256sum infra/downloads-llama.txt | cut -c1-12)
TORCH=cuda infra/setup.sh libtorch
infra/setup.sh models data bench
if [ "$device" = cuda ]; then
  export LIBTORCH=$DOPPEL_CACHE/libtorch-2.11.0-cuda
else
  infra/setup.sh llama
fi

built=$(cargo build --workspace --bins --benches --locked --message-format=json)

# Prints where the bench $2 of package $1 was built.
built() {
  python3 -c 'import json, sys
for line in sys.stdin:
    it = json.loads(line)
    if it.get("target", {}).get("name") == sys.argv[2] and it["manifest_path"].endswith(sys.argv[1]):
        print(it["executable"])' "src/$1/Cargo.toml" "$2" <<<"$built"
}

lm=$(built lm speed)
PYTHONPATH=$peers:$llama:$DOPPEL_CACHE/libtorch-2.11.0-cuda/site python3 tests/bench/compare.py --device "$device" \
  --cache "$DOPPEL_CACHE" --train "$(built train speed)" --lm "$lm" --vote "$(built vote speed)" --partition "$(built partition speed)" \
  --account "$(built privacy account)" --binaries "$(dirname "$(dirname "$lm")")" "$@"
