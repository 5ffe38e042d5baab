# On a machine with only Python: `make demo` runs the main job on real data, `make test` runs every check;
# `make thorough` also runs what takes long: further cases of a kind, longer searches for counterexamples.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
JOBS   ?= 2

.PHONY: demo test thorough lint docs clean

demo: $(READY)
	$(BIN)/python -m benchmarks.exploding_inverses.digits_classifier --preset cpu --out demo-report --reports demo-report
	@echo "The report lies at $(CURDIR)/demo-report/index.html"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

thorough: $(READY)
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n $(JOBS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site needs neither torch nor the package: docstrings are read, not imported
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

$(VENV)/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.26"
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[all]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps memcnn
	touch $@

clean:
	rm -rf $(VENV) site demo-report build *.egg-info
