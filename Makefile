# The commands of the README. All need Python 3.11 or newer, and nothing else of ours.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo ablation torture test clean

demo: .venv/demo
	$(BIN)/python -m worlds.demo

# 40 minutes on two idle cores; stop it at any time, start it again and it goes on
ablation: .venv/demo
	$(BIN)/python -m bench.ablation

# 5 minutes on two idle cores; `make test` has the same trials with fewer repetitions
torture: .venv/test
	$(BIN)/python -m pytest -n0 -vv -m torture

test: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[viz]'
	touch $@

.venv/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[viz,app,dev]'
	touch $@

clean:
	rm -rf .venv data/toy data/ablation results/demo results/ablation_runs
