#!/usr/bin/env bash
# Checks that need Python packages: the workflows against hera's models of Argo Workflows, and against Argo's own schema
# where its path is given.
#
#   infra/check.sh [SCHEMA.json]
set -euo pipefail
cd "$(dirname "$0")/.."

infra/setup.sh python
cache=${DOPPEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/doppel}
packages=$cache/python-$(sha256sum infra/downloads-python.txt | cut -c1-12)
PYTHONPATH=$packages python3 infra/check_workflows.py ${1:+--schema "$1"} workflows/*.yaml
