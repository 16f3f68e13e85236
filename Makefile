# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test lint install clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(READY)

# mypy and editors do not see the mapping of setup.cfg on the bare tree; two git-ignored links show them the package
$(READY): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	ln -sfn ../passes repquant_fx/passes
	ln -sfn ../exporters repquant_fx/exporters
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) repquant_fx/passes repquant_fx/exporters build *.egg-info
