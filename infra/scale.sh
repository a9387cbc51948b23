#!/usr/bin/env bash
# Measures how doppel grows with the data: partition, tables on disk and on an S3 server, queries. Arguments go to
# tests/bench/scale.py, such as `--rows 500000`; the default takes 25 GB of disk below SCALE_FOLDER (default DOPPEL_CACHE).
# PROFILE=release measures what `make build` gives; the default is the profile of the demo, as in infra/bench.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-dev}
infra/setup.sh data s3
cargo build --workspace --bins --locked --profile "$profile"
scale=$(cargo build --workspace --benches --locked --profile "$profile" --message-format=json |
  python3 -c 'import json, sys
for line in sys.stdin:
    it = json.loads(line)
    if it.get("target", {}).get("name") == "scale":
        print(it["executable"])')
scratch=$(mktemp -d "${SCALE_FOLDER:-$DOPPEL_CACHE}/scale.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
python3 tests/bench/scale.py --tool "$scale" --binaries "$(dirname "$(dirname "$scale")")" --folder "$scratch" \
  --words "$DOPPEL_CACHE/data/sharegpt.json" "$@"
