# From a bare clone with only Python 3.10 to 3.14: `make demo`, `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo

.PHONY: demo test check lint types imports docs coverage reference format wheel clean

demo: $(VENV)/.installed
	$(BIN)/mfuser train demo --out $(OUT) $(if $(wildcard $(OUT)/run.json),--resume)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --cov --cov-report=

# What the last `make test` did not reach, least covered first.
coverage: $(VENV)/.installed-dev
	$(BIN)/coverage report --skip-covered --sort=cover

check: lint types imports docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

# The docs site, in build/site; strict, and nothing is fetched.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

reference: $(VENV)/.installed-dev
	$(BIN)/python -m mfuser.cli.reference > docs/reference.md

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Source distribution and wheel, in dist; the wheel is then installed and run from an empty folder.
wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m pytest tests/mfuser/test_wheel.py

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.2"
	touch $@

# Installing prints what pip has to say; packages come from wherever pip is set up to find them.
$(VENV)/.installed: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[cpu]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
