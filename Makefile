# make train    two ranks train the default job          make train ARGS="duration=1ep" NPROC=4
# make test     lint, types, and every quick test        make test JOBS=0 in one process; make test-all adds the slow ones
# make mutants  whether the tests notice mistakes       make mutants ARGS="--only nn/" some of them
# make test-versions  the layer on older and newer torch, gigabytes each   make test-versions ARGS="--only 2.9"
# make docs     the API reference, as HTML in build/docs
PYTHON ?= python3
NPROC ?= 2
# Test processes; each starts ranks of its own, and two of them keep two cores busy.
JOBS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# One thread per rank: two ranks on two cores otherwise fight over them.
export OMP_NUM_THREADS ?= 1
# Tests start hundreds of processes, each of which would compile the 260 modules of this project anew.
unexport PYTHONDONTWRITEBYTECODE

# `make train duration=1ep` would set a variable that nobody reads. (A blank in the value of another is escaped.)
UNREAD = $(filter-out PYTHON=% NPROC=% JOBS=% ARGS=% OMP_NUM_THREADS=%,$(subst \ ,_,$(MAKEOVERRIDES)))
ifneq ($(filter train,$(or $(MAKECMDGOALS),train)),)
ifneq ($(UNREAD),)
$(error write make train ARGS="$(UNREAD)")
endif
endif

.PHONY: train test test-all test-versions mutants lint docs clean

train: $(VENV)/.train
	$(BIN)/python -m syncbn.training.launch.loopback --nproc-per-node $(NPROC) train.py $(ARGS)

test: lint
	$(BIN)/python -m pytest -m "not slow and not root" -n $(JOBS) --dist worksteal $(ARGS)

test-all: lint
	$(BIN)/python -m pytest $(ARGS)

test-versions: $(VENV)/.train
	$(BIN)/python -m tests.versions $(ARGS)

mutants: $(VENV)/.test
	$(BIN)/python -m tests.mutants $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pymarkdown scan *.md docs benchmarks

docs: $(VENV)/.test
	$(BIN)/python docs/reference.py build/docs

$(VENV)/.train: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name it with make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,test,docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
