# Everything a person types here; `make` alone lists it. What each target needs is installed by
# scripts/setup, once. One build profile, release, serves all of them.

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-full lint parity bench chaos docs dist fuzz
export PATH := $(CURDIR)/.local/bin:$(PATH)

help: # List the targets
	@awk -F ':.*# ' '/^[a-z-]+:.*# / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

setup: # Install what building needs
	@scripts/setup

build: setup # Build phalanx and phalanx-rank into target/release
	cargo build --release --workspace --bins

demo: # Train a small GPT on two ranks on real English, and let it write
	@scripts/setup --demo
	@$(MAKE) --no-print-directory build
	@scripts/demo

# The test runner builds both binaries before the first test; another build of them would be one more of
# everything, for what tests depend on asks more of some dependencies.
test: # Run every test, each with a time limit
	@scripts/setup --test
	cargo test --release --workspace --doc
	cargo nextest run --release --workspace

test-full: parity test # Run every test, whole tables too, and the comparison with PyTorch
	cargo nextest run --release --workspace --profile full

lint: # Check formatting, and all that clippy has to say
	cargo fmt --all --check
	@scripts/setup
	cargo clippy --release --workspace --all-targets -- -D warnings

parity: build # Compare golden files, models there and back, and scores, with PyTorch, transformers and lm-eval (installs them, 5 GB)
	@scripts/setup --reference
	@for script in tests/reference/*_golden.py; do .local/reference/bin/python $$script --check || exit; done
	@.local/reference/bin/python tests/reference/exchange_live.py target/release/phalanx-rank
	@.local/reference/bin/python tests/reference/eval_live.py target/release/phalanx

chaos: build # Let faults happen to a run on three nodes, from PHALANX_CHAOS_SEED (needs root)
	cargo nextest run --release -p trainer --profile full --no-capture -E 'test(chaos::whole_table)'

fuzz: # Try every reader with hostile files, ten minutes each (needs nightly Rust and cargo-fuzz)
	@scripts/fuzz

bench: build # Measure steps beside PyTorch's and their parts beside a reference: tables, and target/bench/*.json
	@scripts/bench
	@scripts/setup --reference
	@scripts/bench-train

docs: build # Write manual pages, shell completions and the documentation of the code into target/docs
	@scripts/manual target/docs
	cargo doc --release --workspace --no-deps --target-dir target/docs/code

dist: build # Pack what other hosts need: both binaries, libtorch, presets, manual pages
	@scripts/dist
