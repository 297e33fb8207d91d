# Every target but help sets up .venv by itself. On Linux without a GPU,
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
# takes PyTorch's CPU build instead of the much larger CUDA build.

VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=

# Run, not only found: a version manager's shim may stand for a Python that is not there.
supported := import ensurepip, sys, venv; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
candidates := python3.11 python3.12 python3.13 python3.10 python3
PYTHON ?= $(shell for p in $(candidates); do "$$p" -c '$(supported)' 2>/dev/null && echo "$$p" && break; done)

frameworks := $(notdir $(wildcard examples/frameworks/*))

# Python compiles what it imports, the fewest of twenty thousand files; and keeps it, for the next of the tests' processes.
unexport PYTHONDONTWRITEBYTECODE
pip_install := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test docs lint format bench wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    run the small experiment on real pictures"
	@echo "make test    run the tests"
	@echo "make docs    build this library's site into site/"
	@echo "make lint    ruff (check and format) and mypy"
	@echo "make format  let ruff mend and format the sources"
	@echo "make bench   print the tables of the benchmarks (a quarter of an hour; OUT=FOLDER: write them elsewhere)"
	@echo "make wheel   build wheel and sdist into dist/, and check them"
	@echo "make clean   remove .venv, caches and builds"
	@echo
	@echo "make example-NAME  train by a framework, in an environment of its own: $(frameworks)"
	@echo
	@echo "PYTHON=...       the Python to use, 3.10 to 3.13 (here: $(or $(PYTHON),none found))"
	@echo "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "                 take PyTorch's small CPU build on Linux (unset: the build that PyPI serves)"

# The build tools first, so that they are pinned too: pip does not apply constraints to an isolated build. With them a
# pip that resolves in a third of the time of the one that Python brings.
$(VENV)/.made: constraints.txt
	@"$(PYTHON)" -c '$(supported)' 2>/dev/null || { \
		echo "make: no working Python 3.10 to 3.13 with venv and ensurepip (tried: $(or $(PYTHON),$(candidates)))."; \
		echo "      Install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11"; \
		exit 1; } >&2
	"$(PYTHON)" -m venv $(VENV)
	$(pip_install) pip hatchling editables setuptools
	@touch $@

# What the demo alone needs takes half as long to install as what all tests need.
$(VENV)/.demo: $(VENV)/.made pyproject.toml
	$(pip_install) --no-build-isolation -e '.[mini]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	$(pip_install) --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(pip_install) --no-build-isolation -e '.[bench]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m reproductions mini demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html is the site; $(BIN)/mkdocs serve shows it while you write"

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A framework asks for other versions than the next one and than constraints.txt: each has an environment of its own.
.venv-%/.done: examples/frameworks/%/requirements.txt pyproject.toml
	"$(PYTHON)" -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $< -e . hypothesis pytest pytest-xdist
	@touch $@

example-%: .venv-%/.done
	PATH="$(CURDIR)/.venv-$*/bin:$$PATH" sh examples/frameworks/$*/run.sh
	.venv-$*/bin/python -m pytest tests/integrations/test_real_frameworks.py -k $*

# So that make keeps them.
.PRECIOUS: .venv-%/.done

# OUT=FOLDER writes elsewhere, as a second run does that is to be compared. The script for a GPU runs tiny, to see that it
# runs.
OUT := benchmarks/results
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --out $(OUT)
	$(BIN)/python -m benchmarks gpu --small --out .benchmarks
	$(BIN)/python -m benchmarks goals

wheel: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-* dist site .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
