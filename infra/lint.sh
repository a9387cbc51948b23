#!/usr/bin/env bash
# Lints shell scripts and the Dockerfile with linters pinned in infra/downloads-lint.txt, kept in DOPPEL_CACHE.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${DOPPEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/doppel}
# Named by the pins, so that other pins are other tools.
tools=$cache/lint-$(sha256sum "$here/downloads-lint.txt" | cut -c 1-12)

if [ ! -e "$tools/bin/hadolint" ]; then
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/.lint.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  python3 -m pip install --quiet --root-user-action=ignore --no-deps --only-binary=:all: --require-hashes \
    --target "$work/tools" --requirement "$here/downloads-lint.txt"
  mv "$work/tools" "$tools"
fi

cd "$here/.."
"$tools/bin/shellcheck" infra/*.sh .ci/run
"$tools/bin/hadolint" infra/Dockerfile
