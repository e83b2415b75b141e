# `make demo` and `make test` need only Python 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow test-golden test-gpu bench format clean

demo: $(VENV)/.installed
	$(RUN) training/demo_digits.py

test: $(VENV)/.installed
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(RUN) -m pytest -m "not slow"

test-slow: $(VENV)/.installed
	$(RUN) -m pytest -m slow

# The vectors of the folder GOLDEN, in place of tests/golden/data.
test-golden: $(VENV)/.installed
	HF_DIFFUSION_GOLDEN=$(GOLDEN) $(RUN) -m pytest tests/golden

# What needs a CUDA device; the rest of the suite stays on the CPU there, too.
test-gpu: $(VENV)/.installed
	$(RUN) -m pytest -m gpu

bench: $(VENV)/.installed
	$(RUN) -m tests.benchmarks

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

$(VENV)/.installed: setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
