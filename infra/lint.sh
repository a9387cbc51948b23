#!/usr/bin/env bash
# Lints shell scripts and the Dockerfile with the linters that infra/downloads-lint.txt pins.
set -euo pipefail
cd "$(dirname "$0")/.."

infra/setup.sh lint
cache=${DOPPEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/doppel}
tools=$cache/lint-$(sha256sum infra/downloads-lint.txt | cut -c1-12)/bin
"$tools/shellcheck" infra/*.sh .ci/run
"$tools/hadolint" infra/Dockerfile
