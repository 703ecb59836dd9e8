# `make` lists the targets. To use another Python: make train PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
INSTALL := $(if $(shell command -v uv),uv pip install --python $(RUN),$(RUN) -m pip install --disable-pip-version-check)
# On Linux, torch from PyPI brings gigabytes of CUDA. Without an NVIDIA driver, its CPU wheel is installed first.
ifeq ($(shell uname -s) $(shell command -v nvidia-smi),Linux )
CPU_TORCH := --no-deps --index-url https://download.pytorch.org/whl/cpu torch
endif
EXECUTE := $(RUN) -m nbconvert --to notebook --inplace --execute --log-level WARN \
	--ExecutePreprocessor.record_timing=False

.DEFAULT_GOAL := help
.PHONY: help train test lint bench notebooks clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -e 's/:.*## /#/' | awk -F'#' '{printf "make %-10s %s\n", $$1, $$2}'

train: $(VENV)/installed  ## train a model with the defaults of train.py, in a few minutes
	$(RUN) train.py

test: $(VENV)/installed-dev  ## run every test, and every notebook at a small size
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/installed-dev  ## run ruff
	$(RUN) -m ruff check

bench: $(VENV)/installed-dev  ## run short versions of the benchmarks
	$(RUN) benchmarks/train_speed.py --short
	$(RUN) benchmarks/time_to_loss.py --minutes 1 --seeds 0 --data auto --longest_story 1000

# Two of the notebooks train runs that are not for git: BASEGPT_RUNS puts them elsewhere. Outputs with the tag
# local_link, which lead to files that git ignores, are not saved.
notebooks: $(VENV)/installed-dev  ## run the notebooks and save their outputs, as they are read on the web
	BASEGPT_RUNS=$(abspath $(VENV))/notebook_runs $(EXECUTE) train.ipynb experiments/example/example.ipynb
	$(EXECUTE) $(filter-out train.ipynb,$(wildcard *.ipynb))
	$(RUN) -m nbconvert --coalesce-streams --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_single_output_tags=local_link --log-level WARN *.ipynb experiments/example/example.ipynb
	$(RUN) -m pytest tests/test_notebooks.py -k committed

clean:  ## remove the virtual environment
	rm -rf $(VENV)

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "baseGPT needs Python 3.11 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# A stamp file is newer than the requirements that were installed; when these change, pip runs again.
$(VENV)/installed: requirements.txt constraints.txt | $(VENV)/bin/pip
	$(if $(CPU_TORCH),$(INSTALL) $(CPU_TORCH) -c constraints.txt || echo "no CPU wheel of torch there: taking the one with CUDA from PyPI")
	$(INSTALL) -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(INSTALL) -r requirements-dev.txt -c constraints.txt
	touch $@
