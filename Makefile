# From a bare clone with only Python 3.10 to 3.14: `make demo`, `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo

.PHONY: demo demo-scratch test test-long test-versions check lint types imports docs coverage reference format wheel clean

# MFuser on two frozen towers, and beside it what a linear map gets from one of them.
demo: $(VENV)/.installed
	$(BIN)/mfuser train demo --out $(OUT) $(if $(wildcard $(OUT)/run.json),--resume)
	$(BIN)/mfuser train demo-probe --recipe demo --out $(OUT)-probe $(if $(wildcard $(OUT)-probe/run.json),--resume)

# The same model with towers from random numbers, trained whole on the source.
demo-scratch: $(VENV)/.installed
	$(BIN)/mfuser train demo-scratch --recipe demo --out $(OUT)-scratch $(if $(wildcard $(OUT)-scratch/run.json),--resume)

# With the coverage of lines and branches; pytest's closing line comes last.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=

# The few that wait for schedulers and clusters, over a minute: not part of `make test`.
test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long

# A short set of tests with the lowest allowed version of each core dependency and with the newest:
# two environments of about 6 GB each, kept for the next run. README says when it last passed.
VERSION_TESTS ?= tests/mfuser/model tests/mfuser/config tests/mfuser/test_specs.py \
	tests/mfuser/engine/test_checkpoints.py tests/plugins/backbones/test_weights.py \
	tests/plugins/backbones/test_wrapped_weights.py tests/plugins/backbones/test_timm.py \
	tests/plugins/backbones/test_dual_encoder.py tests/plugins/tuning tests/kernels/test_scan_values.py

test-versions: .venv-lowest/.installed .venv-newest/.installed
	.venv-lowest/bin/python -m pytest -p no:cacheprovider $(VERSION_TESTS)
	.venv-newest/bin/python -m pytest -p no:cacheprovider $(VERSION_TESTS)

.venv-lowest/.installed .venv-newest/.installed: .venv-%/.installed: pyproject.toml tests/versions.py
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet packaging tomli
	.venv-$*/bin/python tests/versions.py $* > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --upgrade -r .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# Lines and branches that the last `make test` did not reach, the least covered modules first.
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
	$(BIN)/python docs/draw_architecture.py

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
	rm -rf $(VENV) .venv-lowest .venv-newest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
