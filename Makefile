# make quickstart   set up .venv and run the whole pipeline once, on real text, in minutes without a GPU
# make test         everything CI runs
# make test-slow    the long tests
# make gpu-check    on a GPU: parity, benchmarks and a run of 100 steps, into docs/results/gpu-NAME.json
# make format       format the code with ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# As root, let tests install Slurm and chromium with apt-get where they are missing; otherwise these are skipped.
APT := TOSTLM_TEST_INSTALL=1
# A file is one process's, and tests/conftest.py says which come first.
BY_FILE := --dist loadfile --no-loadscope-reorder

.PHONY: install quickstart test test-slow gpu-check format clean

install: $(VENV)/.installed-dev

# The quickstart needs less than the tests, and waits for no more.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/tostlm quickstart

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 $(BY_FILE) -m "not slow and not timed"
	$(APT) $(BIN)/pytest -n 2 $(BY_FILE) -m "timed and not slow"

test-slow: install
	$(APT) $(BIN)/pytest -m slow

gpu-check: install
	$(BIN)/python -m tests.gpu_check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
