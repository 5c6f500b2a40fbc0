# `make` alone lists what can be done.
#
# PYTHON=python3.12 chooses the interpreter that .venv is made with; WORKERS=8 runs tests in as many
# processes.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# pyright comes whole with its package; it need not ask whether there is a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# What mkdocs-material says of mkdocs' future is no concern of a build.
export NO_MKDOCS_2_WARNING := 1
# Without a home, tools look the user up; with an empty one they would write to the root folder.
ifeq ($(HOME),)
unexport HOME
endif

# -qq: errors are shown, warnings about mirrors are not.
PIP_INSTALL := $(BIN)/python -m pip install -qq

# The variables given on the command line, as options: MODEL=facebook/opt-125m -> --model facebook/opt-125m.
GIVEN := $(foreach name,$(filter-out PYTHON WORKERS VENV BIN READY,$(.VARIABLES)),$(if $(filter command,$(origin $(name))),$(name)))
OPTIONS = $(foreach name,$(GIVEN),--$(shell echo '$(name)' | tr A-Z_ a-z-) '$($(name))')

# What disturbs a part alone; `python -m faults` disturbs whole commands, many times.
FAULTS := tests/faults tests/journal/test_journal_faults.py tests/offload/test_nvme_faults.py \
  tests/offload/test_nvme_kills.py tests/offload/test_nvme_power.py tests/cli/test_cli_kills.py \
  tests/cli/test_cli_faults.py tests/distributed/test_lost_ranks.py

.PHONY: help venv new-venv launchers quickstart test faults thorough errors doctest site lint format clean distclean
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

venv: $(READY)  ## create .venv with every package at its locked version, and this project

quickstart: $(READY)  ## tune a model; MODEL=, TASK= and others become --model, --task, ...
	$(BIN)/python launcher/quickstart.py $(OPTIONS)

test: $(READY) launchers  ## run the test suite; ARGS="-k codec" goes to pytest
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not thorough" $(ARGS)

faults: $(READY)  ## kill, tear, fill, corrupt and fuzz, within an hour; ARGS="--kill-points 50"
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(FAULTS)
	cd tests && ../$(BIN)/python -m faults --workers $(WORKERS) $(ARGS)

thorough: $(READY) launchers  ## test the ways to start ranks, and the combinations, that make test leaves out
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m thorough $(ARGS)

NOTES = .pytest_cache/errors.jsonl

errors: $(READY) launchers  ## run the tests, then list the errors that none of them makes
	@mkdir -p $(dir $(NOTES)) && rm -f $(NOTES)
	ZO_ERROR_SITES=$(abspath $(NOTES)) PYTHONPATH=$(abspath tests/error_sites/hook)$${PYTHONPATH:+:$$PYTHONPATH} \
	  $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not thorough" $(ARGS)
	$(BIN)/python tests/error_sites/unreached.py $(NOTES)

doctest: $(READY)  ## run the examples in the docstrings only
	$(BIN)/pytest tests/test_doctests.py $(ARGS)

site: $(READY)  ## write the documentation to build/site; warnings are errors
	@$(BIN)/python -m mkdocs build --quiet
	@echo "build/site/index.html"

lint: $(READY)  ## check style, format, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

format: $(READY)  ## format the code and mend what can be mended
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## remove what builds and tests leave behind; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)

# torch comes first and by itself: which of its wheels fits, and what that wheel needs, is the
# platform's business. All else is in the lock, so nothing is resolved and `pip check` proves it.
# DeepSpeed exists as source only; it is built here without its native ops, so without a compiler.
# This checkout is installed as a path: a finder comes too late for scripts beside a clone, which
# would take its folder for the package.
$(READY): requirements.lock setup.py pyproject.toml $(wildcard zo_offload/ops/csrc/*)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory new-venv
	@echo "$(VENV): installing torch (the largest download)"
	@$(PIP_INSTALL) -c requirements.lock torch setuptools
	@echo "$(VENV): installing the packages in requirements.lock"
	@DS_BUILD_OPS=0 $(PIP_INSTALL) --no-deps --no-build-isolation --use-pep517 -r requirements.lock
	@echo "$(VENV): installing zo_offload from this checkout"
	@$(PIP_INSTALL) --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	@$(BIN)/python -m pip check
	@touch $@

# What tests start ranks with, as program:package. Where it cannot be installed they are skipped, and
# say so. Daemons are installed only where nothing would start them: tests start their own.
LAUNCHERS := mpirun:openmpi-bin mpirun.mpich:mpich pdsh:pdsh numactl:numactl ip:iproute2 shellcheck:shellcheck
DAEMONS := sshd:openssh-server munged:munge slurmctld:slurmctld slurmd:slurmd srun:slurm-client

launchers:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  wanted="$(LAUNCHERS)"; [ -d /run/systemd/system ] || wanted="$$wanted $(DAEMONS)"; missing=""; \
	  for each in $$wanted; do command -v $${each%%:*} >/dev/null || missing="$$missing $${each#*:}"; done; \
	  if [ -n "$$missing" ]; then \
	    echo "installing Debian's$$missing, for the tests that start ranks"; \
	    apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $$missing >/dev/null \
	    || echo "could not be installed:$$missing" >&2; fi; fi

new-venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "zo_offload needs Python 3.11 or 3.12, '$(PYTHON)' is not: make venv PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "'$(PYTHON)' cannot make virtual environments: sudo apt-get install python3-venv" >&2; exit 1; fi; \
	  echo "$(VENV): installing Debian's python3-venv"; \
	  apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install python3-venv >/dev/null; }
	@echo "$(VENV): creating it with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
