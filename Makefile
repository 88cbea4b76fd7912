# Two commands do everything on a machine with Python 3.11 and make:
#   make quickstart   trains on real images with two CPU ranks and leaves runs/quickstart/report.html
#   make test         runs the whole test suite
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)))")
# Tests run side by side, one thread each; those with several ranks stay together.
PARALLEL := --numprocesses=$(CORES) --maxprocesses=4 --dist=loadgroup

.PHONY: quickstart test test-quick lint clean

# Each rank gets its share of the cores (torchrun alone would give it one thread).
quickstart: $(VENV)/.installed
	OMP_NUM_THREADS=$$(( $(CORES) > 1 ? $(CORES) / 2 : 1 )) TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
	$(BIN)/torchrun --standalone --nproc-per-node=2 -m locsgd_dist.train --config configs/quickstart.yaml --run.resume=never
	@echo "Report: runs/quickstart/report.html"

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) --durations=25

# Without the tests that start several processes.
test-quick: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not distributed and not e2e"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
