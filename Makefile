# `make demo` and `make test` need only Python 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# A file's tests share what they train.
PARALLEL := -n 2 --dist loadfile
# Beside the other one, since gradio wants an older Pillow than the pinned one.
BROWSER := .venv-browser

.PHONY: demo test test-slow test-browser test-golden test-gpu bench docs format clean

demo: $(VENV)/.installed
	$(RUN) training/demo_digits.py

test: $(VENV)/.installed
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(RUN) -m pytest $(PARALLEL) -m "not slow and not browser"

test-slow: $(VENV)/.installed
	$(RUN) -m pytest $(PARALLEL) -m slow

# The pages, without and with a browser, which is Debian's: apt-get install chromium chromium-driver.
test-browser: $(BROWSER)/.installed
	$(BROWSER)/bin/python -m pytest tests/space --ignore tests/space/test_folder.py

# The vectors of the folder GOLDEN, in place of tests/golden/data.
test-golden: $(VENV)/.installed
	HF_DIFFUSION_GOLDEN=$(GOLDEN) $(RUN) -m pytest tests/golden

# What needs a CUDA device; the rest of the suite stays on the CPU there, too.
test-gpu: $(VENV)/.installed
	$(RUN) -m pytest -m gpu

bench: $(VENV)/.installed
	$(RUN) -m tests.benchmarks

# The reference of all classes and functions.
docs: $(VENV)/.installed
	$(RUN) docs/make_reference.py build/api

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

$(VENV)/.installed: setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[docs,test]"
	touch $@

$(BROWSER)/.installed: $(VENV)/.installed
	$(RUN) -m venv $(BROWSER)
	$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(BROWSER)/beside.pth
	mv $(BROWSER)/beside.pth $$($(BROWSER)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	sed 's/^pillow==.*/pillow<13/' constraints.txt > $(BROWSER)/constraints.txt
	$(BROWSER)/bin/python -m pip install --quiet --constraint $(BROWSER)/constraints.txt "gradio>=6.1" "selenium>=4.25"
	touch $@

clean:
	rm -rf $(VENV) $(BROWSER) build *.egg-info
