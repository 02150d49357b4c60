# Targets create .venv and install the dependencies as needed. They require Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo tabletop ablation torture test clean

demo: .venv/demo
	$(BIN)/python -m worlds.demo

# takes about 75 minutes on two cores and 6 GB; after an interruption, run it again to continue
tabletop: .venv/tabletop
	$(BIN)/python -m worlds.tabletop_demo

# takes 20 to 40 minutes on two idle cores; after an interruption, run it again to continue
ablation: .venv/demo
	$(BIN)/python -m bench.ablation

# takes 5 minutes on two idle cores; `make test` runs the same trials with fewer repetitions
torture: .venv/test
	$(BIN)/python -m pytest -n0 -vv -m torture

test: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

.venv/demo: EXTRAS = viz
.venv/tabletop: EXTRAS = viz,tabletop
.venv/test: EXTRAS = viz,app,dev

# An older Python is refused first, because pip would search for versions that support it for minutes.
.venv/demo .venv/tabletop .venv/test: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is \
	needed, but $(PYTHON) is %d.%d; use another one with: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Installing PyTorch and other packages (up to 3 GB) into .venv"
	@$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf .venv data/toy data/ablation results/demo results/ablation_runs
	rm -rf data/tabletop data/pretrained results/tabletop results/tabletop_runs
