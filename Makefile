# What a person needs: make install demo test lint cuda-check bench

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEMO ?= demo
CUDA := $(wildcard kernels/*.cuh kernels/*/*.cu tests/kernels/*.cpp tests/kernels/*.hpp)

.PHONY: install demo test lint cuda-check format bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda12,dev]'
	touch $@

demo: install
	$(BIN)/nemo-dali demo --out $(DEMO)

# Two processes, each with whole files of tests, for those share what is costly to make.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CUDA)
	$(BIN)/mypy

# Part of `make test`; here with the registers of every kernel on every architecture.
cuda-check: install
	$(BIN)/python -m pytest -s -q tests/kernels/test_mosaic_cuda.py tests/kernels/test_gather_cuda.py tests/kernels/test_mask_cuda.py tests/kernels/test_letterbox_cuda.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA)

bench: install
	$(BIN)/python benchmarks/loader.py

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
