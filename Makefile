# `make demo` and `make test` need Python >= 3.11, make and PyPI; everything else is fetched into .venv.
PYTHON ?= python3
UV := .venv/bin/uv
SYNC := .venv/.synced

# Groups of tests share workers; the slowest groups come first, so that no core idles at the end.
PYTEST := .venv/bin/pytest --ignore tests/cluster --ignore tests/kubernetes --dist loadgroup --no-loadscope-reorder

.PHONY: help demo test test-fast test-all cluster-test kubernetes-test bench check types lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

$(SYNC): pyproject.toml uv.lock $(UV) $(shell find src flows tasks blocks -name '*.py' -newer $(SYNC) 2>/dev/null | head -n 1)
	UV_PROJECT_ENVIRONMENT=.venv $(UV) sync --quiet --locked --inexact --compile-bytecode --reinstall-package prefect-rollout --python .venv/bin/python
	@touch $@

demo: $(SYNC) ## release the article's app on the simulated cloud
	@.venv/bin/prefect-rollout demo

test: $(SYNC) ## run the suite that proves docs/promises.md
	$(PYTEST) -n 3 -m "not complete and (promise or not server)"

test-fast: $(SYNC) ## run the tests without a Prefect server
	$(PYTEST) -n auto -m "not server and not complete"

test-all: $(SYNC) ## run every test, and the complete matrices
	$(PYTEST) -n 3 -m "not sample"

# PostgreSQL, Redis, two API replicas behind HAProxy, three workers; docker-registry. Debian packages that are
# missing are installed.
cluster-test: $(SYNC) ## run the suite of several machines and of registries
	@tests/cluster/needs.sh
	.venv/bin/pytest tests/cluster tests/test_real_registries.py tests/test_image_checks.py::test_a_release_checks_a_real_registry

# Needs Go 1.26. The control plane is built once per machine, in ten minutes.
kubernetes-test: $(SYNC) ## run the suite of Kubernetes on a real control plane
	@.venv/bin/python tests/go_programs.py
	.venv/bin/pytest tests/kubernetes tests/test_real_registries.py::test_hundreds_of_tags_are_listed

bench: $(SYNC) ## measure, and compare with bench/RESULTS.md: most of an hour
	.venv/bin/python bench $(BENCH)

check: types ## check lint, format and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: $(SYNC) ## check types alone
	.venv/bin/mypy -p prefect_rollout
	.venv/bin/mypy tests docs bench

lock: $(UV) ## renew uv.lock
	$(UV) lock --upgrade

clean: ## remove what make made
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
