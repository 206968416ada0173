# Everything is made inside .venv; CONSTRAINTS pins what this project is tested with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
export OMP_NUM_THREADS ?= 1
# Tests start some hundreds of processes: byte code is kept, also where the environment says not to.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: try test setup fmt check check-types check-style test-unit test-plan test-plan-grid test-moe test-preference test-dist test-faults test-cluster test-resume test-all test-oldest test-gpu gpu-first bench-gpu golden architectures budgets schema peft-types importing clean

# What a newcomer types first: the environment, then the main job on the embedded task, start to table.
try: setup
	$(BIN)/python -m distft.demo.tour

# The fast part on all cores, then the parts that start processes of their own.
test: test-unit test-plan test-dist test-cluster

setup: $(VENV)/.done

# DeepSpeed is a source package that looks for torch while it builds: after the rest, without isolation, no ops.
# Byte code is made of what is imported, and kept then: half of what is installed never is.
$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "distft needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c $(CONSTRAINTS) setuptools wheel ninja torch
	$(BIN)/python -m pip install -q --no-compile -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-compile -c $(CONSTRAINTS) --no-build-isolation deepspeed || echo "DeepSpeed could not be installed: engines zero1, zero2 and zero3 are not available, fsdp2 is"
	@touch $@

fmt: setup
	$(BIN)/ruff format distft tests benchmarks
	$(BIN)/ruff check --fix distft tests benchmarks

# Types beside the rest: pyright takes most of the time, on one core.
check: setup
	$(MAKE) -j2 --no-print-directory check-types check-style

check-types: setup
	$(BIN)/pyright

check-style: setup
	$(BIN)/ruff format --check distft tests benchmarks
	$(BIN)/ruff check distft tests benchmarks
	$(BIN)/lint-imports
	$(BIN)/codespell distft tests benchmarks docs recipes launch cluster README.md CHANGELOG.md CONTRIBUTING.md

test-unit: setup
	$(BIN)/python -m pytest tests/unit tests/contract tests/recipes -n auto -m "not slow and not gpu"

# The planner on real models: each case traces a forward and a backward pass of 8 or 70 billion parameters.
test-plan: setup
	$(BIN)/python -m pytest tests/plan -n auto -m "not slow and not gpu"

# State bytes of every engine, method, optimizer and type, planned against counted (make test alternates the types).
test-plan-grid: setup
	DISTFT_WHOLE_GRIDS=1 $(BIN)/python -m pytest tests/dist/test_plan_exact.py

# Mixtures of experts: every model, method and engine (make test has a covering part of them).
test-moe: setup
	DISTFT_WHOLE_GRIDS=1 $(BIN)/python -m pytest tests/dist/test_moe.py

# Preference objectives and reward models: every objective, method and engine (make test has a covering part).
test-preference: setup
	DISTFT_WHOLE_GRIDS=1 $(BIN)/python -m pytest tests/dist/test_preference.py

# Two files at a time: a launch waits for its imports and for its peers as much as it computes. In the order of their
# names: by number of tests, the longest single ones would come last, with one process idle.
test-dist: setup
	$(BIN)/python -m pytest tests/dist tests/faults tests/golden tests/peers -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder

# Every row of the fault matrix, the slow ones too (about half an hour), and a table of what became of them.
FAULT_TABLE ?= docs/results/2026-11-30-fault-matrix.md
test-faults: setup
	$(BIN)/python -m pytest tests -m "row and not gpu" --fault-table $(FAULT_TABLE)

# Against a real Slurm of some nodes on this machine; skipped, with the reason, where it is not installed. The tests wait
# more than they compute, so several run at a time, each process with a Slurm of its own.
test-cluster: setup
	$(BIN)/python -m pytest tests/cluster -n 4 -m "not slow"

# Every engine's checkpoint on 1 to 4 processes under every engine on 1 to 4: the difference of losses per cell.
test-resume: setup
	DISTFT_RESUME_GRID=docs/results/2026-11-29-resume-grid.md $(BIN)/python -m pytest tests/dist/test_resume.py

# The slower suites too: run before a release.
test-all: setup
	DISTFT_WHOLE_GRIDS=1 $(BIN)/python -m pytest tests -m "not gpu"

# The oldest versions that pyproject.toml allows, in an environment of their own (15 minutes; docs/results has the last one).
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.done
	$(OLDEST)/bin/python -m pytest tests/unit tests/contract -m "not slow and not gpu"
	$(OLDEST)/bin/python -m pytest tests/dist/test_same_loss.py -m "not slow and not gpu"

$(OLDEST)/.done: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt setuptools wheel ninja torch numpy
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt --no-build-isolation -e '.[dev]'
	DS_BUILD_OPS=0 $(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt --no-build-isolation deepspeed
	@touch $@

test-gpu: setup
	$(BIN)/python -m pytest tests/gpu

# What only a GPU can tell, phase by phase within MINUTES, from random weights; the same command goes on where it was.
# Without a GPU the same phases run at toy size.
MINUTES ?= 25
OUT ?= runs/first-hour
gpu-first: setup
	$(BIN)/python -m benchmarks.first_hour --minutes $(MINUTES) --out $(OUT)

# Tokens per second of the real configs on one GPU against the goals: CONFIGS is a folder of config.json files.
CONFIGS ?= .configs
bench-gpu: setup
	$(BIN)/python benchmarks/goals.py --configs $(CONFIGS)

# Rewrites the golden losses; the change is explained in CHANGELOG.md.
golden: setup
	$(BIN)/python -m pytest tests/golden --rewrite

# Operators and bytes of a block and the head of an 8B model, counted without a GPU.
BUDGETS ?= docs/results/2026-11-28-budgets.md
budgets: setup
	PYTHONPATH=tests/helpers $(BIN)/python tests/helpers/budgets.py $(BUDGETS)

# Proves every causal language model of the installed transformers and writes docs/architectures.md (some minutes).
architectures: setup
	PYTHONPATH=tests/helpers $(BIN)/python tests/helpers/architectures.py docs/architectures.md

schema: setup
	$(BIN)/python -c 'from distft.catalog import REGISTRIES; from distft.recipe import schema_text; open("recipes/schema.json", "w", encoding="utf-8").write(schema_text(REGISTRIES))'

# Tries every type of PEFT on every engine and writes docs/peft-types.md (a quarter of an hour).
peft-types: setup
	rm -rf /tmp/distft-peft-types && mkdir /tmp/distft-peft-types
	PYTHONPATH=.:tests/helpers $(BIN)/python tests/helpers/peft_page.py /tmp/distft-peft-types > docs/peft-types.md

# The tables of docs/importing.md, from those of distft/importers.
importing: setup
	PYTHONPATH=tests/helpers $(BIN)/python tests/helpers/importing_page.py docs/importing.md

clean:
	rm -rf $(VENV) $(OLDEST) runs
