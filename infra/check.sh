#!/usr/bin/env bash
# Checks that need Python packages, each pinned by version and SHA-256.
#
#   infra/check.sh [SCHEMA.json]   workflows against hera's models of Argo, and against Argo's own schema where its path is
#                                  given; tables by deltalake, polars, DuckDB and pyarrow
#   infra/check.sh models          adapters by peft and embeddings by sentence-transformers (fetches 4 GB of them)
set -euo pipefail
cd "$(dirname "$0")/.."

export DOPPEL_CACHE=${DOPPEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/doppel}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$DOPPEL_CACHE/target} LIBTORCH=${LIBTORCH:-$DOPPEL_CACHE/libtorch-2.11.0-cpu}
binaries=$CARGO_TARGET_DIR/debug
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# packages NAME: the folder where set-up put what infra/downloads-NAME.txt pins.
packages() {
  printf '%s/%s-%s' "$DOPPEL_CACHE" "$1" "$(sha256sum "infra/downloads-$1.txt" | cut -c1-12)"
}

# After `make test` there is nothing left to build.
cargo build --workspace --bins --examples --locked

if [ "${1:-}" = models ]; then
  TORCH=cuda infra/setup.sh libtorch
  infra/setup.sh models data bench
  PYTHONPATH=$(packages bench):$DOPPEL_CACHE/libtorch-2.11.0-cuda/site python3 infra/check_models.py \
    --cache "$DOPPEL_CACHE" --binaries "$binaries" --folder "$scratch"
else
  infra/setup.sh python
  PYTHONPATH=$(packages python)
  export PYTHONPATH
  python3 infra/check_workflows.py ${1:+--schema "$1"} workflows/*.yaml
  "$binaries/examples/tiny_lake" "$scratch"
  python3 infra/check_tables.py "$scratch"
fi
