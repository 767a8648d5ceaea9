# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= demo-$(shell date +%Y%m%d-%H%M%S)
# Files of tests that run side by side.
JOBS   ?= 2
# Tests start many processes of one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo install check lint test test-fast matrix faults soak gpu-check bench clean

help:            ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

install: $(VENV)/.installed      ## the virtual environment, once

demo: install    ## train a small model under ZeRO-3 on two processes, let it write, export it
	env -u OMP_NUM_THREADS $(BIN)/python -m dtrain launch +strategy=zero3 launcher.procs=2 run.name=$(RUN)
	@echo; echo "--- what it writes now:"
	@$(BIN)/python -m dtrain generate runs/$(RUN) --prompt 'import os' --max-new-tokens 48 --temperature 0.7
	@echo; echo "--- where things are, and what to type next:"
	@$(BIN)/python -m dtrain runs show runs/$(RUN)
	@echo; echo "  $(BIN)/dtrain generate runs/$(RUN) --prompt 'def main('"
	@echo "  $(BIN)/dtrain launch strategy=fsdp2 run.name=mine dataset.path=FILE"
	@echo "  $(BIN)/dtrain plan +strategy=zero3 model=qwen7b device=cuda launcher.procs=8"

lint: install    ## format, lint, types, layers
	$(BIN)/ruff format --check dtrain tests bench examples
	$(BIN)/ruff check dtrain tests bench examples
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is timed, stopped and killed runs by itself, or the clock would measure its neighbours.
ALONE := tests/ranks tests/faults tests/cluster tests/gpu
test: install    ## every test, multi-rank ones included
	@failed=0; \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ALONE:%=--ignore %) tests || failed=1; \
	$(BIN)/python -m pytest $(ALONE) || failed=1; \
	exit $$failed

test-fast: install  ## under two minutes: no processes but a few
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/unit -m 'not slow' -x

matrix: install  ## every strategy and tuning, on every number of ranks, gone on from under every other; over an hour
	DTRAIN_MATRIX=whole $(BIN)/python -m pytest tests/contract/test_resume.py tests/contract/test_cells.py

check: lint test ## all that a change must pass

faults: install  ## every fault, hangs, what a cluster does; writes the table of docs/reliability.md; a quarter of an hour
	$(BIN)/python -m tests.faults.table $(ROWS)

soak: install    ## runs that live through accidents drawn at random; SECONDS=600, SEED=..., TYPED='...'
	$(BIN)/python -m tests.faults.soak --seconds $(or $(SECONDS),600) $(SEED:%=--seed %) $(TYPED)

gpu-check: install ## every strategy on this machine's GPUs in bf16: tokens/s, MFU, peak memory, losses that agree
	env -u OMP_NUM_THREADS $(BIN)/python bench/gpu_check.py

bench: install   ## speed against bare loops, start-up, and checkpoints; writes docs/benchmarks.md
	$(BIN)/python bench/throughput.py
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/checkpoint.py
	$(BIN)/python bench/attention.py

clean:           ## runs and caches of this checkout
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
