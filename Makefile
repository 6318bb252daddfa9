# `make demo` and `make test` need Python >= 3.11, make and PyPI; everything else is fetched into .venv.
PYTHON ?= python3
UV := .venv/bin/uv
SYNC := .venv/.synced

.PHONY: help demo test cluster-test bench check types lock clean
.DEFAULT_GOAL := help

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

$(SYNC): pyproject.toml uv.lock $(UV) $(shell find src flows tasks blocks -name '*.py' -newer $(SYNC) 2>/dev/null | head -n 1)
	UV_PROJECT_ENVIRONMENT=.venv $(UV) sync --quiet --locked --inexact --compile-bytecode --python .venv/bin/python
	@touch $@

demo: $(SYNC) ## release the article's app on the simulated cloud
	@.venv/bin/prefect-rollout demo

test: $(SYNC) ## the suite
	.venv/bin/pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/cluster

# PostgreSQL, Redis and HAProxy from Debian packages, where they are missing.
cluster-test: $(SYNC) ## the suite of several machines: PostgreSQL, Redis, two API replicas, three workers
	@tests/cluster/needs.sh
	.venv/bin/pytest tests/cluster

bench: $(SYNC) ## measures, and compares with bench/RESULTS.md: the better part of an hour
	.venv/bin/python bench $(BENCH)

check: types ## lint, format and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: $(SYNC) ## types alone
	.venv/bin/mypy -p prefect_rollout
	.venv/bin/mypy tests docs bench

lock: $(UV) ## renew uv.lock
	$(UV) lock --upgrade

clean: ## remove what make made
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
