# What a person needs: make install demo test test-slow test-all fuzz coverage lint format docs package release
# cuda-check gpu-check bench clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt
# What a target needs is installed when it is first asked for. A stamp says that it is there as these two files have it.
RUNTIME := $(VENV)/runtime.stamp
TEST := $(VENV)/test.stamp
LINT := $(VENV)/lint.stamp
DOCS := $(VENV)/docs.stamp
EXTRAS_runtime := cuda12,mining,report
EXTRAS_test := cuda12,test
EXTRAS_lint := cuda12,lint
EXTRAS_docs := docs
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),python3),$(PYTHON))
DEMO ?= demo
WORKERS ?= 2
# Byte code is kept whatever the environment says: without it each process of the tests takes seconds more to start.
export PYTHONDONTWRITEBYTECODE =
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
CUDA := $(wildcard kernels/*.cuh kernels/*/*.cuh kernels/*/*.cu $(foreach end,cpp hpp,tests/helpers/*.$(end) tests/helpers/*/*.$(end)))

.PHONY: install demo test test-slow test-all fuzz coverage lint format docs package release cuda-check gpu-check bench clean
.PHONY: lint-ruff lint-format lint-clang lint-imports lint-deptry lint-mypy lint-spelling

# Two of pip at a time would spoil what they install into.
.NOTPARALLEL:

install: $(RUNTIME) $(TEST) $(LINT) $(DOCS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing nemo-dali[$(EXTRAS_$*)] into $(VENV); gigabytes, where they are not there yet"
	$(PIP) -e '.[$(EXTRAS_$*)]'
	@touch $@

demo: $(RUNTIME)
	@echo "Installed in $(VENV): nemo-dali[$(EXTRAS_runtime)]"
	$(BIN)/nemo-dali demo --out $(DEMO)

# The fast lane: minutes, for everyday work.
test: $(TEST)
	$(PYTEST)

# The rest: whole runs, kills at many places, every GPU architecture, sanitizers.
test-slow: $(TEST)
	$(PYTEST) -m slow

test-all: $(TEST)
	$(PYTEST)
	$(PYTEST) -m slow

# Properties on all their examples; the lanes above try a fifth of them.
fuzz: $(TEST)
	NEMO_DALI_FUZZ=1 $(PYTEST) -m fuzz

# Line coverage of the fast lane, then of both. Compiled code is not counted. Left out is what limits the size of the
# files that a program may write, for coverage writes one itself; a failure does not keep the report back.
coverage: $(TEST)
	$(BIN)/coverage erase
	-$(PYTEST) -m "not slow" -k "not full_disk" --cov --cov-report=
	$(BIN)/coverage report | tail -n 1
	-$(PYTEST) -m slow -k "not full_disk" --cov --cov-append --cov-report=
	$(BIN)/coverage report | tail -n 1

lint: lint-ruff lint-format lint-clang lint-imports lint-deptry lint-mypy lint-spelling

lint-ruff: $(LINT)
	$(BIN)/ruff check .

lint-format: $(LINT)
	$(BIN)/ruff format --check .

lint-clang: $(LINT)
	$(BIN)/clang-format --dry-run --Werror $(CUDA)

lint-imports: $(LINT)
	$(BIN)/lint-imports

lint-deptry: $(LINT)
	$(BIN)/deptry .

lint-mypy: $(LINT)
	$(BIN)/mypy

lint-spelling: $(LINT)
	$(BIN)/codespell

# The site, in site/, to be opened from there or served. It is built without a network.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The source distribution and the wheel, in dist/, each of them imported where nothing else is installed.
package:
	rm -rf dist build/tools build/bare
	$(PYTHON) -m venv build/tools
	build/tools/bin/pip install --disable-pip-version-check -c constraints.txt build
	build/tools/bin/pyproject-build
	for archive in dist/*.tar.gz dist/*.whl; do \
		rm -rf build/bare && $(PYTHON) -m venv build/bare && \
		build/bare/bin/pip install --disable-pip-version-check --no-deps "$$archive" && \
		build/bare/bin/python -I -c 'import nemo_dali, nemo_dali.kernels as k; print(nemo_dali.__version__, k.__file__)' \
		|| exit 1; \
	done

# What would be published: checked, then each installed with all that it needs, some 9 GB, and a batch loaded there.
release: package
	build/tools/bin/pip install --disable-pip-version-check -c constraints.txt twine
	build/tools/bin/twine check --strict dist/*
	for archive in dist/*.tar.gz dist/*.whl; do \
		rm -rf build/bare && $(PYTHON) -m venv build/bare && \
		build/bare/bin/pip install --disable-pip-version-check -c constraints.txt "$$archive[cuda12,mining]" && \
		build/bare/bin/python -I examples/first_batch.py || exit 1; \
	done
	rm -rf build/bare

# Part of the tests; here with the registers of every kernel on every architecture.
cuda-check: $(TEST)
	$(BIN)/python -m pytest -s -q -m "" tests/kernels/*/test_gpu.py

# One command for anybody with a GPU, about eight minutes at most; it needs no `make install`, but takes the Python that is
# there. GPU_CHECK="--pretend" rehearses it without a GPU.
gpu-check:
	$(GPU_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(GPU_PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

format: $(LINT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA)

bench: $(TEST)
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/peers.py --quick

clean:
	rm -rf $(VENV) $(DEMO) build site *.egg-info
