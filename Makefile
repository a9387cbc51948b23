# doppel: `make demo` runs the whole method on real input, `make test` passes the tests. Both do their own set-up.

SHELL := /bin/bash
.DEFAULT_GOAL := help

DOPPEL_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/doppel
TORCH ?= cpu
LAKE ?= lake
# A libtorch of your own wins over the one that set-up fetches.
LIBTORCH ?= $(DOPPEL_CACHE)/libtorch-2.11.0-$(TORCH)
# Compiled dependencies are shared between checkouts.
CARGO_TARGET_DIR ?= $(DOPPEL_CACHE)/target
# Cargo runs build scripts in other folders.
absolute = $(if $(filter /%,$(1)),$(1),$(CURDIR)/$(1))
override DOPPEL_CACHE := $(call absolute,$(DOPPEL_CACHE))
override LIBTORCH := $(call absolute,$(LIBTORCH))
override CARGO_TARGET_DIR := $(call absolute,$(CARGO_TARGET_DIR))
export DOPPEL_CACHE TORCH LIBTORCH CARGO_TARGET_DIR

SETUP_LIBTORCH := $(if $(filter $(DOPPEL_CACHE)/%,$(LIBTORCH)),libtorch,)
BIN := $(CARGO_TARGET_DIR)/debug

.PHONY: help setup build binaries demo test lint bench bench-scale clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 21

setup: ## Fetch libtorch, models, data and the S3 server into DOPPEL_CACHE (TORCH=cuda for CUDA).
	@infra/setup.sh $(SETUP_LIBTORCH) models data s3

build: setup ## Build the release binaries.
	cargo build --workspace --release --locked

# The demo and the tests share one profile, so that a fresh machine compiles the dependencies once; it optimises what
# numbers and text run through as the release profile does.
binaries: setup
	cargo build --workspace --bins --locked

demo: binaries ## Run the main job on real conversations, with LAKE (default ./lake) as the lake.
	@mkdir -p "$(LAKE)/private" "$(LAKE)/release"
	@PATH="$(BIN):$$PATH" infra/demo.sh "$(LAKE)"

test: binaries ## Pass the tests.
	cargo test --workspace --locked
	infra/check.sh $(SCHEMA)

lint: setup ## Formatting and lints.
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	infra/lint.sh

bench: setup ## Measure speed beside the peers (fetches 4 GB of them; BENCH='--only train --pairs 1').
	infra/bench.sh $(BENCH)

bench-scale: setup ## Measure growth with the data (takes 25 GB of disk; SCALE='--rows 500000' for a tenth).
	infra/scale.sh $(SCALE)

clean: ## Forget what was compiled; downloads stay.
	cargo clean
