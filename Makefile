# On a machine with only Python: `make demo` runs the main job on real data, `make test` runs every
# check, `make thorough` also what takes long: further cases of a kind, longer searches.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
JOBS   ?= 2
SELECT ?=
PROFILE ?= thorough
SHARE  ?= 1/1
COVERAGE ?=

.PHONY: demo test shapes thorough lint docs clean

# its own environment: the core, two libraries and the report; nflows without tensorboard, which its layers do not use
demo: $(VENV)/.demo
	@echo "Trains 9 classifiers of handwritten digits, 3 of them without a regularizer, and audits each: about 2.5 minutes on two cores."
	$(VENV)/demo/bin/python -m benchmarks.exploding_inverses.digits_classifier --preset cpu --out demo-report --reports demo-report
	@echo "The report: $(CURDIR)/demo-report/index.html"

$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "Installs torch, nflows, FrEIA and what the report needs into $(VENV)/demo: about 300 MB with a CPU build of torch."
	$(PYTHON) -m venv $(VENV)/demo
	$(VENV)/demo/bin/pip install --quiet -c constraints.txt -e ".[freia,models,report]"
	$(VENV)/demo/bin/pip install --quiet -c constraints.txt --no-deps nflows UMNN
	touch $@

# COVERAGE=--cov: which lines of inn_guard run, half as long again. What is left: tests/README.md
test: $(READY)
	@echo "Linters, types, doctests and every feature once: about 3 minutes on two cores."
	@$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(COVERAGE)

# the tests of `make test` with the shapes and dtypes of every annotation checked at every call: four times the work
shapes: $(READY)
	@echo "Every feature once, with shapes and dtypes checked at every call: about 7 minutes on two cores."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --share $(SHARE) --jaxtyping-packages=inn_guard,beartype.beartype

# SELECT=thorough: only what `make test` leaves out; SHARE=1/3: the first of three equal parts of it;
# PROFILE=search: other random examples at every run
thorough: $(READY)
	@echo "Every test on every case, longer searches for counterexamples: about 15 minutes on two cores."
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=$(PROFILE) $(BIN)/python -m pytest -n $(JOBS) -m "$(SELECT)" --share $(SHARE)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site needs neither torch nor the package: docstrings are read, not imported
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

$(VENV)/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.26" "nbconvert>=7.16" "ruff>=0.12"  # the extra docs
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[all,dev]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps memcnn
	touch $@

clean:
	rm -rf $(VENV) site demo-report build *.egg-info
