# make setup   an own environment in .venv, with the versions of constraints.txt (skipped while it is current)
# make test    checks style and types and runs the tests on 2 cores; SLOW=1 also runs those marked slow, as CI does
# make coverage   the same tests, and which lines they run: at least 90 % of them
# make demo    the demo, about 10 minutes on 2 cores; OUT=FOLDER for another folder, OVERWRITE=1 to replace a finished one
# make study   the study of training options, about an hour on 2 cores; OUT and OVERWRITE as for the demo
# make real    the study of a real model, hours on 2 cores; BASE=FOLDER_OR_HUB_NAME, OUT as for the demo, and more
#              options in ARGS='--minutes 60 --targets 300000'; the same command continues
# make clean   removes the environment and what tools leave behind; demos stay
# PROCESSES=  tests in one process instead of two
# PYTHON=...   the Python that the environment is made with, 3.11 or newer

PYTHON ?= python3
VENV := .venv
OUT ?= $(if $(filter study real,$(MAKECMDGOALS)),$(MAKECMDGOALS),demo)
PROCESSES ?= -n 2 --dist loadfile
MARKS := $(if $(SLOW),,-m 'not slow')
STAMP := $(VENV)/.l2d-setup
TORCH := $(shell grep '^torch==' constraints.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup test coverage demo study real clean

setup: $(STAMP)

# Some systems' Python comes without ensurepip; then its own pip puts a pip into the environment.
$(STAMP): constraints.txt pyproject.toml $(wildcard lm_eval_ext/*.pth)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "PYTHON=$(PYTHON) must be Python 3.11 or newer: make ... PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; }
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest $(PROCESSES) $(MARKS)

# Where the disk is full, coverage cannot write either.
coverage: setup
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest $(PROCESSES) --ignore tests/faults/test_disk_faults.py
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report --fail-under 90

demo: setup
	$(VENV)/bin/python -m training.demo --out '$(OUT)' $(if $(OVERWRITE),--overwrite)

study: setup
	$(VENV)/bin/python -m training.studies.compute --out '$(OUT)' $(if $(OVERWRITE),--overwrite)

real: setup
	$(VENV)/bin/python -m training.studies.real --out '$(OUT)' $(if $(BASE),--base '$(BASE)') $(if $(OVERWRITE),--overwrite) $(ARGS)

clean:
	rm -rf $(VENV) build dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -exec rm -rf {} +
