# Every target does its own set-up: a fresh machine needs python3 (3.11 or newer, with venv) and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
# tests run side by side, as many as there are cores (at most 4: each worker holds torch and a model)
BESIDE := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-full test-gpu faults lint check lab docs bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# pip's warnings about unused index locations are of no use to a reader; its errors are
$(STAMP): setup.py settings.ini constraints.txt pyproject.toml
	@echo "installing into $(VENV) (once; some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]' 2>$(VENV)/pip.log \
	  || { grep -v '^WARNING: Location' $(VENV)/pip.log; exit 1; }
	@touch $@

demo: $(STAMP)  ## end-to-end against local SAEs on the embedded model, offline
	$(BIN)/e2e-sae demo $(ARGS)

bench: $(STAMP)  ## speed and memory against the reference's way of computing
	$(BIN)/e2e-sae bench $(ARGS)

lab: $(STAMP)  ## JupyterLab on the tutorial
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/tutorials/tutorial.ipynb $(ARGS)

docs: $(STAMP)  ## the site in _docs/: by quarto if it is on PATH, otherwise by the renderer from PyPI
	@if command -v quarto >/dev/null; then PATH="$(CURDIR)/$(BIN):$$PATH" quarto render; else $(BIN)/python -m e2e_sae_nb._docs; fi
	$(BIN)/python tools/check_site.py _docs

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check e2e_sae_nb tests tools benchmarks setup.py
	$(BIN)/pyright

check: $(STAMP)  ## notebooks clean, modules and README in step with them
	$(BIN)/python tools/check_clean.py
	$(BIN)/python tools/readme.py --check

test: lint check  ## what CI runs
	$(BIN)/python -m pytest $(BESIDE) -m "not full and not gpu" $(ARGS)

test-full: lint check  ## also what needs a browser, other packages or minutes
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

# installs nothing, since a machine with a device may have no network: from .venv or with the machine's own packages
test-gpu:  ## what needs a CUDA device; fails where there is none
	@for python in $(BIN)/python $(PYTHON); do \
	  if "$$python" -c 'import pytest, torch' >/dev/null 2>&1; then \
	    PYTHONPATH="$(CURDIR):$(PYTHONPATH)" "$$python" -m pytest -m gpu tests/test_gpu.py $(ARGS); exit $$?; \
	  fi; \
	done; \
	echo "no test ran: neither $(BIN)/python nor $(PYTHON) has torch and pytest, which the tests of a device need" >&2; exit 1

faults: $(STAMP)  ## 200 kills at random moments, resumed and compared bit for bit, and 20 of compiled runs (data/results/faults.json)
	OMP_NUM_THREADS=1 E2E_SAE_PROGRESS=0 $(BIN)/python tests/faults.py --compiled 20 $(ARGS)

clean:  ## remove builds and caches, keep the environment and out/
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
