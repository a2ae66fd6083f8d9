# `make figures` and `make test` do everything on a machine that has Python and make; `make help` lists the rest.

PYTHON ?=
export PYTHON
RUN = .venv/bin/python -m

.PHONY: help figures ledger test lint environment lock clean accelerator

help:
	@echo "make figures   regenerate every figure in figures/quick (minutes), print the claims"
	@echo "make ledger    the same at the standard preset, in figures (longer)"
	@echo "make test      style, types, import contract and tests"
	@echo "make accelerator   what a GPU or TPU does: tests, benchmarks, paper presets; five minutes"
	@echo "make lint      style, types and import contract alone"
	@echo "make lock      resolve requirements.lock anew, keeping versions; LOCK=--upgrade takes the latest"
	@echo "make clean     remove all that was made here, .venv and figures/quick included"
	@echo "The first run makes .venv. PYTHON=... chooses its interpreter (default: the newest that is tested)."

figures: environment
	@$(RUN) sims run all --preset quick --out figures/quick

ledger: environment
	@$(RUN) sims run all --preset standard --out figures
	@.venv/bin/python .ci/readme.py

test: lint
	@$(RUN) pytest -n auto --dist worksteal

lint: environment
	@$(RUN) ruff check --output-format concise
	@$(RUN) ruff format --check
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) pyright
	@.venv/bin/lint-imports --no-logo

# An interpreter that is named has all that is needed: nothing is installed.
accelerator: $(if $(PYTHON),,environment)
	@$(or $(PYTHON),.venv/bin/python) -m tests.benchmarks.accelerator

environment:
	@sh .ci/environment

# Names, versions and markers alone: neither a machine nor a package index shows in the lock.
lock:
	@command -v uv >/dev/null || { echo "error: make lock needs uv (pip install uv)" >&2; exit 1; }
	@uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate $(LOCK) \
		--output-file requirements.lock pyproject.toml

clean:
	@rm -rf accelerator.json .venv build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis figures/quick
	@find dynamics models sims tests -name __pycache__ -prune -exec rm -rf {} +
