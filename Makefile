# Every target sets up .venv by itself and reuses it while pyproject.toml and constraints.txt stay as they are.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types clean

demo: $(STAMP)
	$(BIN)/fledge demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types
	$(BIN)/pytest

lint: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Type checkers do not follow an editable install whose package is the repository root: they get a folder of links.
types: $(STAMP)
	@mkdir -p .typing/fledge
	@for entry in __init__.py conf data_synthesis eval models slurm train; do ln -sfn ../../$$entry .typing/fledge/$$entry; done
	MYPYPATH=.typing $(BIN)/mypy -p fledge

clean:
	rm -rf $(VENV) .typing build *.egg-info

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "fledge needs Python 3.10 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
