# `make demo` and `make test` need git, make and Python >= 3.11 with venv, nothing else.
PYTHON ?= python3
BIN = .venv/bin
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo test check chaos

setup: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/mixer train --out $(RUN)
	$(BIN)/mixer evaluate $(RUN)/model.safetensors --data digits
	$(BIN)/mixer predict $(RUN)/model.safetensors $(RUN)/examples --top 3
	@echo "open $(RUN)/report.html in a browser"

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 10

# Half an hour and more: kills, stops and starves runs, and checks what docs/runs.md promises; SEED=1 for other instants.
chaos: setup
	$(BIN)/python -W ignore tests/chaos --seed $(or $(SEED),0)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
