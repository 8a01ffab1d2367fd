# Everything a newcomer needs: `make demo` and `make test`. Both install first when .venv is absent or out of date.

VENV ?= .venv
WORKERS ?= 2# test processes
BIN := $(VENV)/bin
CUDA := $(abspath $(VENV))/aot-cuda
CUDA_PACKAGES := jax-cuda12-pjrt jax-cuda12-plugin nvidia-cuda-nvcc-cu12# the extra aot-cuda, with what it needs
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install test test-all lint format demo ablations clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install the library with its development tools

# Any Python from 3.11 on will do; PYTHON=/path/to/python chooses one. The interpreter is run, not only looked up: a version
# manager may leave launchers on the path that start nothing.
$(STAMP): pyproject.toml constraints.txt
	@for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -x "$(BIN)/python" ]; then :; \
	elif [ -z "$$python" ]; then \
	  echo "monovl_jax needs Python 3.11 or newer, and none of python3.11, python3.12, python3.13, python3, python is that." >&2; \
	  echo "Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; \
	else \
	  echo "Creating $(VENV) with $$python ($$("$$python" --version))"; \
	  "$$python" -m venv "$(VENV)" || { rm -rf "$(VENV)"; echo "Python could not create $(VENV): see the line above." >&2; exit 1; }; \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

test: install  ## run the tests (a few minutes; no accelerator, no torch)
	$(PYTEST)

# The CUDA plugin lies apart: where it is and no driver, JAX says a line more whenever it starts, which tests would find.
test-all: install  ## run the tests and the slow ones, with the compilers for TPUs and GPUs that are not here
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev,aot]' -c constraints.txt
	$(PYTEST) --slow
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(CUDA) -c constraints.txt $(CUDA_PACKAGES)
	PYTHONPATH=$(CUDA) $(BIN)/python -m pytest --slow tests/pallas_kernels/test_gpu.py -k compiled

lint: install  ## style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: install  ## let ruff mend style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: install  ## watch a vision-language model learn to see; ends in runs/demo/report.html
	$(BIN)/monovl demo

ablations: install  ## reproduce the papers' ablations, small (hours; run it again to continue); ends in experiments/results/ablations/
	$(BIN)/python -m experiments.ablations
	$(BIN)/python -m experiments.readme

clean:  ## remove .venv and caches (runs/ stays)
	rm -rf "$(VENV)" .pytest_cache .ruff_cache .hypothesis
