# One command each: see README.md. Every target that needs it makes the set-up first; nothing to do takes no time.

PYTHON ?= python3
CUDA   ?= auto
PY     := .venv/bin/python

CXX_ALL := $(shell find csrc kernels tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PY_ALL  := build_tools benchmarks negmine kernels tests setup.py
NATIVE  := $(filter-out tests/%,$(CXX_ALL)) $(wildcard build_tools/*.py) setup.py pyproject.toml

# oneDNN's AMX kernels trust a CPUID that virtual machines may contradict.
export ONEDNN_MAX_CPU_ISA = AVX512_CORE_BF16

.PHONY: venv demo test check bench plots gpu wheel clean

venv: .venv/built

.venv/installed: constraints.txt build_tools/make_venv.py
	$(PYTHON) -m build_tools.make_venv
	@touch $@

.venv/built: .venv/installed $(NATIVE)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

demo: venv
	$(PY) -m benchmarks.demo

test: venv
	$(PY) -m pytest tests -n 2
	@$(PY) -m build_tools.what_ran

check: venv
	$(PY) -m ruff check $(PY_ALL)
	$(PY) -m ruff format --check $(PY_ALL)
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(CXX_ALL)
	$(PY) -m mypy

bench: venv
	$(PY) -m benchmarks.run

plots: venv
	$(PY) -m benchmarks.plot

# With the machine's own Python and no network: torch, setuptools and pytest must be there already.
gpu:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || \
	  { echo 'make gpu needs a GPU that torch of $(PYTHON) can use, and there is none.'; exit 1; }
	@$(PYTHON) -m build_tools.what_ran --need pytest setuptools
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m build_tools.run_shards
	@$(PYTHON) -m build_tools.what_ran
	@if command -v compute-sanitizer; then \
	  for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	      $(PYTHON) -m pytest -m 'gpu and not slow' tests || exit 1; \
	  done; \
	else echo 'compute-sanitizer is not installed: memory and races were not checked.'; fi
	$(PYTHON) -m benchmarks.run

# A wheel reaches dist/ once its contents are right.
wheel: venv
	rm -rf build/wheel
	NEGMINE_CUDA=$(CUDA) $(PY) -m build --wheel --no-isolation --outdir build/wheel .
	$(PY) -m build_tools.check_wheel build/wheel/*.whl
	mkdir -p dist && mv build/wheel/*.whl dist/

clean:
	rm -rf build dist *.egg-info negmine/_*.so negmine/_build_info.py .venv/built
