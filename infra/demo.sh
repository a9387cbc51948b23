#!/usr/bin/env bash
# The demo: runs workflows/demo.yaml on this machine, then shows the budget, the private comparison and three analyses.
set -euo pipefail

lake=$(realpath "$1")
here=$(cd "$(dirname "$0")/.." && pwd)
export DOPPEL_PRIVATE="$lake/private" DOPPEL_RELEASE="$lake/release"

doppel run "$here/workflows/demo.yaml" \
  -p input="$DOPPEL_CACHE/data/sharegpt.json" \
  -p model="$DOPPEL_CACHE/models/smollm2-135m-instruct" \
  -p encoder="$DOPPEL_CACHE/models/all-minilm-l6-v2" \
  -p private="$DOPPEL_PRIVATE" \
  -p release="$DOPPEL_RELEASE"

show() {
  printf '\n$ %s\n' "$*"
  "$@"
}
show doppel budget sharegpt
show doppel compare demo
for analysis in length_distribution cluster_sizes token_totals; do
  printf '\n$ doppel query --run demo --file sql/%s.sql\n' "$analysis"
  doppel query --run demo --file "$here/sql/$analysis.sql"
done
