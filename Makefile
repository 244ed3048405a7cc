# The commands of this checkout. `make demo` and `make test` do all their set-up on a machine with Python 3.11.

PYTHON ?= python3.11
VENV ?= .venv
# Which torch: any arguments of `pip install`. The plain default gives a CUDA build on Linux machines.
PIP_TORCH_ARGS ?= torch==2.13.0
PY = $(VENV)/bin/python
DEMO_ARGS ?=

.PHONY: help venv demo test test-full check format clean

help:
	@echo "make demo       convert, verify, picture, train, kill, resume and score on synthetic data (a few minutes)"
	@echo "make test       lint, types, import rules and the tests"
	@echo "make test-full  the same with the heavy matrices"
	@echo "make venv       only the environment, in $(VENV); PIP_TORCH_ARGS='...' chooses the torch build"

venv: $(VENV)/.ready

# torch first and alone: what is installed after it then finds its requirement met and pulls no other build.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(PIP_TORCH_ARGS)
	$(PY) -m pip install --quiet -e ".[dev]"
	touch $@

demo: venv
	$(PY) tools/demo.py $(DEMO_ARGS)

check: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

test: check
	$(PY) -m pytest -n 2 --dist loadfile -m "not full"

test-full: check
	$(PY) -m pytest -n 2 --dist loadfile

format: venv
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV) demo-out
