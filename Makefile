# make demo: optimise the default experiment.  make test: checks and tests.  Both create .venv when it is missing.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MIRROR := build/mirror

.PHONY: demo install test check mirror docs fast drill engines clean

demo: $(STAMP)
	$(BIN)/hasten

install: $(STAMP)

# torch first and alone: asked for together with the rest, some indices answer with a build that carries CUDA.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check 'torch>=2.11,<2.14'
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	touch $@

check: $(STAMP) mirror
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=$(MIRROR) $(BIN)/lint-imports

# The package as it is installed: setuptools mounts pipelines/ and conf/ into it, and tools that read files don't know that.
mirror:
	rm -rf $(MIRROR)
	mkdir -p $(MIRROR)
	cp -R components/hasten $(MIRROR)/hasten
	cp -R pipelines conf $(MIRROR)/hasten/

# The documentation, into build/site; the tests build it too.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: check
	$(BIN)/python -m pytest -m "not drill and not gpu"

fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not drill and not gpu"

drill: $(STAMP)
	$(BIN)/python -m pytest -m drill -o addopts="--import-mode=importlib --strict-markers --strict-config -rA"

# The engines that not everybody needs, really compiled and run.
engines: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev,executorch,hls,tvm,xla]'
	$(BIN)/python -m pytest -m "not drill and not gpu" tests/engines

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
