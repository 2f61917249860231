# `make demo` and `make test` are all a fresh machine needs; each makes .venv first.
PYTHON ?= $(firstword $(foreach v,python3.12 python3.11 python3,$(shell $(v) -c 'import sys; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor

.PHONY: demo test test-all test-floor check docs format clean

demo: $(VENV)/.installed
	$(BIN)/engine demo --out demo-output

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-floor: $(FLOOR)/.installed  # the oldest versions that pyproject.toml allows
	$(FLOOR)/bin/python -m pytest -n 2 --dist loadscope -m "not slow"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/links
	$(BIN)/mypy
	PYTHONPATH=.links $(BIN)/lint-imports
	$(MAKE) docs

docs: $(VENV)/.installed-dev  # docs/_build/html/index.html
	$(BIN)/sphinx-build --quiet --builder html --fail-on-warning --keep-going docs docs/_build/html

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(if $(PYTHON),,$(error needs Python 3.11 or newer: make PYTHON=/path/to/python3.12))
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --editable ".[bench,hf,onnx,oracle,pandas,polars,ray,serve,timm]" --group dev --group docs
	touch $@

$(FLOOR)/.installed: pyproject.toml .ci/floors
	$(if $(PYTHON),,$(error needs Python 3.11 or newer: make PYTHON=/path/to/python3.12))
	$(PYTHON) -m venv --clear $(FLOOR)
	$(FLOOR)/bin/python -m pip install --upgrade "pip>=25.1"
	$(FLOOR)/bin/python .ci/floors > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python -m pip install --constraint $(FLOOR)/constraints.txt --editable ".[bench,hf,onnx,oracle,pandas,polars,ray,serve,timm]" --group dev
	touch $@

clean:
	rm -rf $(VENV) $(FLOOR) demo-output docs/_build .mypy_cache .pytest_cache .ruff_cache
