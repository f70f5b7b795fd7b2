# One command each: see README.md. Every target that needs it makes the set-up first; nothing to do takes no time.

PYTHON ?= python3
CUDA   ?= auto
PY     := .venv/bin/python

CXX_ALL := $(shell find csrc kernels tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PY_ALL  := build_tools benchmarks examples negmine kernels tests setup.py
NATIVE  := $(filter-out tests/%,$(CXX_ALL)) $(wildcard build_tools/*.py) setup.py pyproject.toml

SECONDS ?= 60
SEED    ?= 0
ROUNDS  ?= 5
STEPS   ?= 10000
PYTHONS ?=
SANITIZED := build/sanitize

.PHONY: venv demo smoke test test-gpu-sim test-examples check fuzz sanitize threads test-arm soak docs bench bench-isa plots gpu wheel check-wheel clean

venv: .venv/built

.venv/installed: constraints.txt build_tools/make_venv.py
	$(PYTHON) -m build_tools.make_venv
	@touch $@

.venv/built: .venv/installed $(NATIVE)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

demo: venv
	$(PY) -m benchmarks.demo

# What to run while editing: under a minute.
smoke: venv
	$(PY) -m pytest tests -n 2 --dist worksteal -m smoke

# Every test that says whether the package is right here.
test: venv
	$(PY) -m pytest tests -n 2 --dist worksteal -m "not gpu_sim"
	@$(PY) -m build_tools.what_ran

# The GPU kernels without a GPU: compiled ahead of time, interpreted at length, and run on the CPU as CUDA source (the emulator) and
# as the PTX that Triton and nvcc make for two GPUs. SIM=full adds every Triton test as PTX, which takes an hour.
SIM ?=
test-gpu-sim: venv
	$(PY) -m pytest tests -n 2 --dist worksteal -m gpu_sim
	$(if $(SIM),$(PY) -m tests.ptx 80 tests/test_kernels.py tests/test_rules.py tests/test_columns.py -k triton)
	$(if $(SIM),$(PY) -m tests.ptx 90 tests/test_kernels.py tests/test_rules.py tests/test_columns.py -k triton)

# Every script of examples/ with --quick; one that needs a package that is missing is skipped, with the reason.
test-examples: venv
	$(PY) -m pytest examples -n 2 -rs

check: venv
	$(PY) -m ruff check $(PY_ALL)
	$(PY) -m ruff format --check $(PY_ALL)
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(CXX_ALL)
	$(PY) -m mypy

# Random calls of every public op on the CPU, judged by the reference, and damaged files of every form: make fuzz SECONDS=600 SEED=7
fuzz: venv
	$(PY) -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)
	$(PY) -m tests.fuzz_files --seconds $(SECONDS) --seed $(SEED)

# The tests and the fuzzer on CPU kernels built with gcc's address and undefined sanitizers, AMX's tiles emulated, in a copy of
# the package; and the CUDA kernels under the emulator, built likewise. Python is not instrumented: libasan is loaded first, and
# libstdc++ with it, whose exceptions it wraps. Races are for `make threads`.
sanitize: venv
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	CXX="g++ -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	  NEGMINE_CUDA=cpu NEGMINE_EMULATED_TILES=1 \
	  $(PY) setup.py --quiet build_py --build-lib $(SANITIZED) build_ext --build-lib $(SANITIZED)
	cp -r tests build_tools pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && \
	  export LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" && \
	  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 && \
	  ../../$(PY) -m pytest -p no:cacheprovider -k "cpu or bf16 or test_parts" \
	    tests/test_kernels.py tests/test_rules.py tests/test_isa.py tests/test_parts.py && \
	  ../../$(PY) -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	  NEGMINE_EMULATOR_SANITIZERS=address,undefined \
	  $(PY) -m pytest -p no:cacheprovider -k "emulated or products" tests/test_cuda_mine_hardest.py tests/test_cuda_products.py \
	  tests/test_cuda_logsumexp.py tests/test_cuda_logsumexp_grad_keys.py tests/test_cuda_mixing.py \
	  tests/test_cuda_rank_thresholds.py tests/test_cuda_count_negatives.py

# The CPU kernels on std::threads under gcc's thread sanitizer, which torch's OpenMP would swamp: make threads ROUNDS=20
threads: venv
	$(PY) -m build_tools.thread_sanitizer $(ROUNDS)

# The CPU kernels for ARM, compiled by a cross compiler and run by an emulator, against the portable ones. Debian's packages
# g++-aarch64-linux-gnu and qemu-user.
test-arm: venv
	$(PY) -m build_tools.arm

# Training steps in processes that must not grow; ranks keep one queue: make soak STEPS=100000; make soak STEPS=5000 RANKS=2
RANKS ?= 1
soak: venv
	$(PY) -m tests.soak --steps $(STEPS) --ranks $(RANKS)

# The pages of docs/ and a reference from the docstrings, into out/docs/index.html; a broken link fails.
docs: venv
	$(PY) -m build_tools.make_docs

# Every named shape, the instruction sets forced, then one letter varied at a time; BENCH="--quick" for three minutes' worth.
bench: venv
	$(PY) -m benchmarks.run $(BENCH)
	$(if $(BENCH),,$(PY) -m benchmarks.run --no-tests --case moco --op info_nce mine_hardest --isa avx2 portable --compile)
	$(if $(BENCH),,$(PY) -m benchmarks.run --no-tests --sweep K B D --threads 1 2 --seconds 3)

# Every op and storage on every instruction set of this CPU; fails where the automatic choice is more than 10 % behind the best.
bench-isa: venv
	$(PY) -m benchmarks.isa

plots: venv
	$(PY) -m benchmarks.plot
	$(PY) -m benchmarks.plan
	$(PY) -m benchmarks.mining --table

# With the machine's own Python and no network: torch, setuptools and pytest must be there already.
# One phase alone: make gpu PHASE=test (build, smoke, pairs, test, bench, profile, sanitize). Logs and rows go to OUT.
PHASE ?=
OUT   ?= build/gpu
gpu:
	@$(PYTHON) -m build_tools.what_ran --need torch pytest setuptools
	$(PYTHON) -m build_tools.gpu $(PHASE) --out $(OUT)

# A wheel reaches dist/ once its contents are right.
wheel: venv
	rm -rf build/wheel
	NEGMINE_CUDA=$(CUDA) $(PY) -m build --wheel --no-isolation --outdir build/wheel .
	$(PY) -m build_tools.check_wheel build/wheel/*.whl
	mkdir -p dist && mv build/wheel/*.whl dist/

# An sdist, a wheel from it, its audits, and a fresh environment that runs it; for other Pythons: make check-wheel PYTHONS="..."
check-wheel: venv
	NEGMINE_CUDA=$(CUDA) $(PY) -m build_tools.check_install $(PYTHONS)

clean:
	rm -rf build dist *.egg-info negmine/_*.so negmine/_build_info.py .venv/built
