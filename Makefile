PYTHON ?= python3.11
BIN := .venv/bin

# Threads that wait give way: spinning ones slow a shared machine down many times over.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test check clean

help:  ## Say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/installed  ## Make .venv with everything, at the tested versions

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## Pre-train a tiny backbone on photographs, judge and serve it, let devices go on (about eight minutes on two cores)
	$(BIN)/lowssl demo --out demo

test: setup  ## Run the tests, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: setup  ## Check format, lint, types, the direction of imports, and deploy/
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/shellcheck deploy/*.sh deploy/slurm.sbatch
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml

clean:  ## Remove .venv and what the demo made
	rm -rf .venv demo
