# One command from a bare clone: each target makes the virtual environment that it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# pytest, pyright and friends read these; one thread keeps small models fast on small machines.
export OMP_NUM_THREADS ?= 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS ?= 1

.PHONY: help setup setup-dev demo demo-epic test test-ray test-lowest test-torchvision check format bench clean

help:            ## List the targets
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:[^#]*##/\t/'

setup: $(VENV)/.ready            ## Virtual environment with the tested versions

setup-dev: $(VENV)/.ready-dev    ## The same with the tools of test and check

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

$(VENV)/.ready-demo: $(VENV)/.ready
	$(BIN)/pip install -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-lowest/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install -c constraints-lowest.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.ready-demo        ## Teacher, cache, six students and a report in miniature: demo/report.html
	$(BIN)/emkd demo --out demo

demo-epic: $(VENV)/.ready-demo   ## EPIC in miniature, accuracy against tokens kept: demo-epic/report.html
	$(BIN)/emkd demo --epic --out demo-epic

test: setup-dev                  ## All tests: the fast ones, two files at a time, then those of Ray
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/python -m pytest -m ray -o faulthandler_timeout=600

test-ray: setup-dev              ## Only the tests that start Ray
	$(BIN)/python -m pytest -m ray -o faulthandler_timeout=600

test-lowest: $(VENV)-lowest/.ready  ## The fast tests with the oldest versions of constraints-lowest.txt
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile

# torchvision in an environment of its own that sees the packages of the other. Its wheel is built for
# CUDA: without its dependencies it is small, and a plugin of pytest lets the CPU build of torch load it.
$(VENV)-torchvision/.ready: $(VENV)/.ready-dev
	$(PYTHON) -m venv $(VENV)-torchvision
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
		$$($(VENV)-torchvision/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth
	$(VENV)-torchvision/bin/pip install --no-deps torchvision==0.28.0
	touch $@

test-torchvision: $(VENV)-torchvision/.ready  ## Every family with the library's own processors beside torchvision
	$(VENV)-torchvision/bin/python -m pytest -p tests.support.torchvision_shim -m torchvision

check: setup-dev                 ## Lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: setup-dev                ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:                           ## Remove what the demos wrote
	rm -rf demo demo-epic
