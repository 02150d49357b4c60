# The two commands of the README. Both need Python 3.11 or newer, and nothing else of ours.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean

demo: .venv/demo
	$(BIN)/python demo.py

test: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[viz]'
	touch $@

.venv/test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[viz,dev]'
	touch $@

clean:
	rm -rf .venv data/toy results/demo
