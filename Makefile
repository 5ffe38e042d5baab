# On a machine with only Python: `make demo` runs the main job on real data, `make test` runs every check.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/python -m benchmarks.exploding_inverses.digits_classifier --preset cpu --out demo-report --reports demo-report
	@echo "The report lies at $(CURDIR)/demo-report/index.html"

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[all]"
	touch $@

clean:
	rm -rf $(VENV) demo-report build *.egg-info
