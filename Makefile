# Both jobs start on a bare machine: they need python3 (3.10 or later), make and a package index, nothing else.
#
#   make bench    time the fused losses against what people use today, on this machine
#   make test     lint, types and tests
#
# Variables (environment or command line):
#   PYTHON           the interpreter that .venv is made with (python3)
#   TORCH_INDEX_URL  the package index that torch comes from, as pytorch.org names it for your platform; empty:
#                    pip's own. On an ordinary Linux machine pip's own has the CUDA build, several GB even where
#                    there is no GPU; the index of CPU builds has a small one.
#   GPU              nvidia, amd or none: overrides what was detected
#   BENCH_ARGS       the benchmark's arguments (speed --quick)
#   EVIDENCE_ARGS    further arguments to `hpo-fused-bench all`, such as --budget 900
#   TRITON_VERSIONS  what `make versions` tries (3.4.0 3.6.0 3.7.1 3.9.0)
#   PYTEST_BENCHMARK_ARGS   further arguments to `make pytest-benchmark`, such as --bench-shape qwen3-8b
#   PYTEST_WORKERS   test processes (one for each core)
#   PYTEST_ARGS      further arguments to pytest

PYTHON ?= python3
TORCH_INDEX_URL ?=
BENCH_ARGS ?= speed --quick
EVIDENCE_ARGS ?=
PYTEST_ARGS ?=
PYTEST_BENCHMARK_ARGS ?=
TRITON_VERSIONS ?= 3.4.0 3.6.0 3.7.1 3.9.0

ifndef PYTEST_WORKERS
PYTEST_WORKERS := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
endif

# A driver's tools can be installed where there is no GPU, so nvidia-smi has to list one.
ifndef GPU
GPU := $(shell \
	if nvidia-smi -L 2>/dev/null | grep -q '^GPU' || ls /dev/nvidia[0-9]* >/dev/null 2>&1; then echo nvidia; \
	elif [ -e /dev/kfd ] || command -v rocm-smi >/dev/null 2>&1; then echo amd; \
	else echo none; fi)
endif

SYSTEM := $(shell uname -s)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS_STAMP := $(VENV)/.installed-peers
VERL := $(VENV)/verl
OLDEST_TRL := $(VENV)/trl-1.15.0
VERL_STAMP := $(VERL)/.installed
CONSTRAINTS := $(VENV)/constraints.txt
TYPED := $(VENV)/typed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Without a GPU, numbers are only comparable between machines that run the same PyTorch, and the kernels run
# under the interpreter of the Triton that this PyTorch is tested with.
ifeq ($(GPU),none)
TORCH := torch==2.13.0
TRITON := triton==3.7.1
else
TORCH := torch
TRITON := triton
endif

# The PyTorch that .venv has, as a constraint; fails on a half-installed one too, which can be imported.
TORCH_PIN := $(BIN)/python -c 'import importlib.metadata as m, torch; torch.Tensor; print("torch==" + m.version("torch"))'

ifeq ($(GPU)$(TORCH_INDEX_URL),amd)
AMD_NOTICE := \
	echo "AMD GPU found. pip's own PyTorch, which is installed now, cannot use it. For the ROCm build:"; \
	echo "  make distclean, then make again with TORCH_INDEX_URL=<the ROCm index that pytorch.org names>,"; \
	echo "or install it into $(VENV) by hand before running make.";
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bench evidence gpu links pytest-benchmark test verl trainers lint types versions sanitize clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

bench: $(STAMP) ## time the fused losses against today's alternatives, quick settings
	$(BIN)/hpo-fused-bench $(BENCH_ARGS)

evidence: $(PEERS_STAMP) ## the whole evidence for this machine: a report with pictures in evidence/
	$(BIN)/hpo-fused-bench all --output evidence $(EVIDENCE_ARGS)

pytest-benchmark: $(STAMP) ## the benchmark's cases and providers under pytest-benchmark, small by default
	$(BIN)/pytest bench/suite $(PYTEST_BENCHMARK_ARGS)

# One thread in each test process: workers that each take every core slow each other down. loadfile keeps tests
# that share an expensive fixture in one process.
test: lint $(PEERS_STAMP) $(VERL_STAMP) ## lint, types and tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)
	@[ ! -e $(VERL_STAMP) ] || $(MAKE) --no-print-directory verl

# verl pins other versions of what TRL needs: the suite skips its tests, and they have a process of their own.
verl: $(VERL_STAMP) ## the tests that need verl alone
	PYTHONPATH="$(CURDIR)/$(VERL)" OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) \
		--dist loadfile -k verl tests/test_integrations_verl.py tests/test_trainers.py

OF_TRL := $(wildcard tests/test_integrations_trl*.py)
trainers: $(PEERS_STAMP) ## what the suite leaves out: TRL's options in every combination, its oldest version
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) -m slow_trainers $(OF_TRL)
	[ -d $(OLDEST_TRL) ] || $(PIP) install -q --no-deps --target $(OLDEST_TRL) trl==1.15.0
	PYTHONPATH="$(CURDIR)/$(OLDEST_TRL)" OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) \
		$(OF_TRL)

lint: $(STAMP) ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy does not follow setuptools' editable finder, so it is shown the package as it is installed: a tree of links
# in which kernels/ and bench/ lie inside hpo_fused/.
types: $(STAMP) links ## types alone
	cd $(TYPED) && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p hpo_fused

links:
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/hpo_fused
	@ln -s "$(CURDIR)"/hpo_fused/* "$(CURDIR)/kernels" "$(CURDIR)/bench" $(TYPED)/hpo_fused/

# For a GPU at hand for minutes: nothing is installed (BIN=DIR names another environment's programs, and PYTHONPATH what
# it lacks), most telling first, each step under a limit of its own, at which it is interrupted as by Ctrl-C and still
# says what it has: 8 minutes in all, and 8 files. Run from the tree of links: Python looks where it is started first,
# and hpo_fused/ without kernels/ and bench/ in it is no package.
UNDER_TEST := $(foreach topic,kernels_launch kernels_rows equivalence shards,../../tests/test_$(topic).py)
PYTEST := -m pytest -q -p no:cacheprovider
# SECONDS, NAME of the log, command
on_gpu = -cd $(TYPED) && timeout --signal INT --kill-after 15 $(1) env --default-signal=INT \
	PYTHONPATH="$(CURDIR)/$(TYPED)$${PYTHONPATH:+:$$PYTHONPATH}" PYTHONUNBUFFERED=1 $(3) >>$(CURDIR)/evidence/$(2).log 2>&1; \
	tail -n 3 $(CURDIR)/evidence/$(2).log
sanitized = env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(1) --target-processes all \
	$(abspath $(BIN))/python $(PYTEST) -p no:xdist ../../tests/test_kernels_rows.py
BENCH = $(abspath $(BIN))/python -c 'from hpo_fused.bench.cli import main; exit(main())'
CHAINED := hpo_fused.bench.chained_rows
gpu: links ## what a GPU alone can tell, in 8 minutes, into evidence/: kernels' tests, timings, suite, accesses and races
	@mkdir -p evidence && rm -f evidence/*.log
	$(call on_gpu,50,kernels,$(abspath $(BIN))/python $(PYTEST) -n $(PYTEST_WORKERS) --dist worksteal $(UNDER_TEST))
	$(call on_gpu,45,kernels,$(BENCH) speed --op policy_loss --shape qwen3-8b --tokens 8192 --provider hpo_fused \
		--repeats 15 $(foreach variant,Deferred Deferred512x8 Chained ChainedDeep,--provider $(CHAINED):$(variant)))
	$(call on_gpu,165,all,$(BENCH) all --output $(CURDIR)/evidence --budget 155)
	$(call on_gpu,160,suite,$(abspath $(BIN))/python $(PYTEST) -n $(PYTEST_WORKERS) --dist worksteal --durations 30 \
		../../tests)
	$(call on_gpu,30,sanitizer,$(call sanitized,memcheck))
	$(call on_gpu,30,sanitizer,$(call sanitized,racecheck))

# Each Triton in a folder of its own, found before the one that PyTorch brought. The sample has both paths of the
# kernels, the terms of a batch, float16 and rows that start anywhere. Before Triton 3.7 the interpreter does not know
# NumPy 2.4.
SAMPLE := tests/test_token_terms.py tests/test_equivalence.py tests/test_shards.py \
	-k 'test_token_terms or triton and (mhpo_ahpo or gspo or softcap or V17 or test_shards)'
versions: $(STAMP) ## machine code, and a sample of the suite in the interpreter, with other Tritons
	@failed=; for version in $(TRITON_VERSIONS); do \
		folder="$(CURDIR)/$(VENV)/triton-$$version"; log="$$folder.log"; verdict=passed; : >"$$log"; \
		case $$version in 3.[456].*) more='numpy<2.4';; *) more=;; esac; \
		{ [ -d "$$folder" ] || { rm -rf "$$folder.partial" && \
			$(PIP) install -q --no-deps --target "$$folder.partial" triton==$$version $$more && \
			mv "$$folder.partial" "$$folder"; }; } && export PYTHONPATH="$$folder" && \
		$(BIN)/hpo-fused-bench compile --check >"$$log" 2>&1 && \
		TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
			$(BIN)/pytest -q -n $(PYTEST_WORKERS) $(SAMPLE) >>"$$log" 2>&1 || { verdict=FAILED; failed=1; }; \
		unset PYTHONPATH; \
		if [ $$verdict = FAILED ]; then tail -n 60 "$$log"; else tail -n 1 "$$log"; fi; \
		echo "Triton $$version: $$verdict"; \
	done; [ -z "$$failed" ]

# Allocations of their own size, not PyTorch's pooled ones, so that memcheck sees what lies beside a tensor. racecheck
# looks at shared memory, which the reductions between the sweeps use.
SANITIZED := tests/test_kernels_rows.py tests/test_token_terms.py tests/test_logprob_loss.py
sanitize: $(STAMP) ## compute-sanitizer on the small-shape kernel tests (NVIDIA GPU and CUDA toolkit)
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2; exit 2; }
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --target-processes all --error-exitcode 1 \
			$(BIN)/python -m pytest -q -p no:xdist $(SANITIZED) || exit 1; done

clean: ## remove build products and caches, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find hpo_fused kernels bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# The stamp is written under another name when the installation starts and renamed when it has succeeded: an
# interrupted run leaves none, and a change to setup.py meanwhile is newer than it. A .venv made by hand, with a
# PyTorch of the user's choice in it, is completed and not replaced; the constraint holds pip to that PyTorch.
# What the benchmark compares with (TRL, Liger-Kernel), so that the suite can hold their adapters against them: half a
# gigabyte more, which `make bench` does without. Not on ROCm, where Liger-Kernel's requirement would replace Triton.
# Where they cannot be had their tests are skipped, and the next run tries again.
$(PEERS_STAMP): $(STAMP)
ifneq ($(GPU),amd)
	@$(PIP) install -c $(CONSTRAINTS) -e '.[ci]' && touch $@ || \
		echo "TRL and Liger-Kernel could not be installed: their adapters' tests will be skipped." >&2
endif

# verl's wheel has top-level folders named tests and scripts. Where verl cannot be had or cannot be imported its tests
# are skipped, and the next run tries again.
$(VERL_STAMP): tests/requirements-verl.txt | $(PEERS_STAMP)
ifneq ($(GPU),amd)
	@rm -rf $(VERL) $(VERL).partial; $(PIP) install -q --no-deps --target $(VERL).partial -r $< && \
		rm -rf $(VERL).partial/tests $(VERL).partial/scripts && \
		PYTHONPATH="$(CURDIR)/$(VERL).partial" $(BIN)/python -W ignore -c 'import verl.workers.engine.base' && \
		mv $(VERL).partial $(VERL) && touch $@ || \
		echo "verl could not be installed: its plug-in's tests will be skipped." >&2
endif

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "hpo_fused needs Python 3.10 or later; '$(PYTHON)' is not. Name one: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || { \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
			echo "'$(PYTHON)' has no venv module. Install it (Debian and Ubuntu: apt install python3-venv)." >&2; \
			exit 1; }; \
		$(PYTHON) -m venv --clear $(VENV); }
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@touch $@.partial
	@$(TORCH_PIN) >$(CONSTRAINTS) 2>/dev/null || { \
		$(AMD_NOTICE) \
		$(PIP) install $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') '$(TORCH)'; }
	@$(TORCH_PIN) >$(CONSTRAINTS)
ifeq ($(SYSTEM)-$(filter amd,$(GPU)),Linux-)
	@$(BIN)/python -c 'from triton import jit' 2>/dev/null || $(PIP) install -c $(CONSTRAINTS) '$(TRITON)'
endif
	@$(PIP) install -c $(CONSTRAINTS) numpy -e '.[dev]'
	@mv $@.partial $@
