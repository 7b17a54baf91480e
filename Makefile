# Two commands on a fresh machine: `make demo` (set up, then the whole pipeline on the demo model) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Not compiled: that takes about a minute, most of it for modules that nothing here imports.
INSTALL := python -m pip install --quiet --disable-pip-version-check --no-compile
WORKERS ?= 2

help:
	@echo "make setup   .venv with relfv in it (.venv/bin/relfv)"
	@echo "make demo    all relations of datasets/relation/relationA_ex.csv on the embedded demo model"
	@echo "make test    the tests; make test-quick: those without slow, for every edit; WORKERS=8 for more processes than 2"
	@echo "make test-cpus  the tests of sums, as other processors add them"
	@echo "make lint    ruff: rules and format; make types: pyright; make check: all of it"
	@echo "make docs    the docs site, in site/index.html"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "relfv needs Python 3.10 or newer; say PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --requirement requirements.lock
	$(BIN)/$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/relfv run --model demo
	@$(BIN)/relfv status
	@echo "open results_fv/relation_qwise/relationA_ex/report/index.html"

# A file's tests share models and runs, so they share a process; the longest file, of crash tests, does not come last.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

test-quick: setup
	$(PYTEST) -m "not slow"

# Other processors add in another order. These settings make this one do so, as far as it can: as one without AVX-512,
# as any at all, and with two threads; `make test` is the default with one.
CPU_TESTS ?= tests/engine tests/stages
CPUS := test-as-avx2 test-as-any-cpu test-with-two-threads
test-as-avx2: export ATEN_CPU_CAPABILITY := avx2
test-as-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
test-as-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
test-as-any-cpu: export ATEN_CPU_CAPABILITY := default
test-as-any-cpu: export MKL_CBWR := COMPATIBLE
test-with-two-threads: export OMP_NUM_THREADS := 2
test-with-two-threads: export OMP_WAIT_POLICY := PASSIVE
# What CI leaves out of the two that add nearly as the default does; any-cpu, the farthest from it, runs all.
test-as-avx2 test-with-two-threads: export PYTEST_ADDOPTS = $(CPU_FEWER)

$(CPUS): setup
	$(PYTEST) -q $(CPU_TESTS)

test-cpus: $(CPUS)

# What README and the pages of docs/ say, each page in a copy of the tree; the wheel in an empty folder.
PAGES := $(patsubst %,page/%,$(shell grep -rlE '^```(bash|python)$$' README.md docs --include='*.md'))

$(PAGES): page/%: setup
	.ci/page $*

pages: $(PAGES)

package: setup
	.ci/package

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test

# The site has an environment of its own: it reads relfv's sources and does not import them.
DOCS_READY := .venv-docs/.ready

$(DOCS_READY): docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/$(INSTALL) --requirement docs/requirements.txt
	@touch $@

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf $(VENV) .venv-docs site .pytest_cache .ruff_cache .hypothesis

.PHONY: help setup demo test test-quick test-cpus $(CPUS) pages $(PAGES) package lint format types check docs clean
