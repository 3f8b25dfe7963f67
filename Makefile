# `make` without PYTHON= works in .venv, which it sets up. PYTHON=python3 uses that interpreter's
# environment as it is: it installs nothing there and builds in place.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0
ARGS ?=
WORKERS ?= 2

ifdef PYTHON
PY := $(shell command -v $(PYTHON))
ENV :=
export PYTHONPATH := $(CURDIR):$(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(CURDIR)/.venv/bin/python
ENV := .venv/.installed
endif
CLANG_FORMAT ?= $(or $(wildcard $(dir $(PY))clang-format),clang-format)

.PHONY: help env build demo test bench lint format sanitize kernels wheel clean

help:  ## list the targets (ARGS= goes to the command that a target runs)
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' Makefile | expand -t 18

env: $(ENV)  ## set up .venv: torch, the tools, and this package, editable

.venv/.installed: requirements-dev.txt pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q '$(TORCH)'
	$(PY) -m pip install -q -r requirements-dev.txt
	$(PY) -m pip install -q --no-deps open_clip_torch==3.3.0  # a peer of the benchmarks: its loss.py
	VLM_SKIP_EXT=1 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

build: $(ENV)  ## build the extension in place (ninja compiles what has changed)
	$(PY) setup.py -q build_ext --inplace

demo: build  ## train a small CLIP on handwritten digits
	$(PY) examples/train_digits.py $(ARGS)

test: build  ## run the tests
	env -u OMP_NUM_THREADS $(PY) -m pytest -q -n $(WORKERS) $(ARGS)

bench: build  ## measure every op against its peers, and plot
	$(PY) -m benchmarks run --op all --peers all --plot $(ARGS)

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: $(ENV)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(ENV)  ## rewrite the sources in the project's style
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

# libstdc++ is preloaded as well: the address sanitizer wants to see __cxa_throw when it starts.
sanitize: $(ENV)  ## run the tests of the ops on a build with the address and UB sanitizers
	VLM_SANITIZE=address,undefined VLM_CUDA=OFF $(PY) setup.py -q build --build-lib build/sanitize
	cd build/sanitize && env \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  PYTHONMALLOC=malloc PYTHONPATH=$(CURDIR)/build/sanitize \
	  $(PY) -m pytest -q --capture=sys -c $(CURDIR)/pyproject.toml \
	  --rootdir $(CURDIR) $(CURDIR)/tests/ops $(ARGS)

kernels: $(ENV)  ## compile every GPU kernel without a GPU: registers, spills, tensor-core use
	$(PY) -m tests.compile_only $(ARGS)

wheel: $(ENV)  ## build a wheel into dist/ for this Python and this torch
	rm -rf build/lib build/lib.*
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:  ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info vlm_kernels/_C.*.so vlm_kernels/_build.json
