# `make demo` and `make test` each work alone on a fresh clone: they create .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin
# The versions that lbdet is tested with; `make CONSTRAINTS= test` takes what pip finds.
CONSTRAINTS ?= -c constraints.txt

# The tests of a file stay together: they share what is slow to make.
PYTEST := $(BIN)/pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all lint data clean

demo: .venv/installed
	$(BIN)/lbdet demo --output runs/demo

test: .venv/installed
	$(PYTEST) -m "not slow"

test-slow: .venv/installed
	$(PYTEST) -m slow

test-all: .venv/installed
	$(PYTEST)

lint: .venv/installed
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

data:
	$(PYTHON) tools/link_data.py

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(CONSTRAINTS) -e '.[dev,deploy,tensorboard]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs
