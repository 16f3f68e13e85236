# Two commands do everything on a fresh machine: `make demo` and `make test`. `make tables` measures all tables (hours);
# TABLES holds switches of benchmarks/tables.py, such as TABLES="--data /data --only accuracy".
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TABLES ?=
READY = $(VENV)/.ready
DEMO = $(VENV)/.demo

.PHONY: demo test tables lint docs install clean

# installs what it needs alone: no documentation, test or browser tools
demo: $(if $(wildcard $(READY)),$(READY),$(DEMO))
	$(BIN)/python benchmarks/demo.py

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

tables: $(READY)
	$(BIN)/python benchmarks/tables.py $(TABLES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(READY)

# mypy and editors do not see the mapping of setup.cfg on the bare tree; two git-ignored links show them the package
$(READY): EXTRA = dev
$(DEMO): EXTRA = vision
$(READY) $(DEMO): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	ln -sfn ../passes repquant_fx/passes
	ln -sfn ../exporters repquant_fx/exporters
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRA)]"
	touch $@

clean:
	rm -rf $(VENV) repquant_fx/passes repquant_fx/exporters build site *.egg-info
