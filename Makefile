# `make demo` and `make test` need only Python >= 3.11 and make; they build .venv from pinned requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest/.ready

.PHONY: demo study test lint docs bench gate gpu compat clean

demo: $(VENV)/.study
	$(BIN)/python -m demo $(ARGS)

study: $(VENV)/.study
	$(BIN)/python -m study $(ARGS)

# A process a core. The second run is of what depends on the last bits: in another instruction set, on two threads.
PARALLEL := -n logical --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
test: $(READY) $(OLDEST)
	$(BIN)/python -m pytest $(PARALLEL)
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE FUSED_LK_TEST_THREADS=2 $(BIN)/python -m pytest $(PARALLEL) \
		-k "not triton" tests/test_hard_rows.py tests/test_extremes.py tests/test_precision.py \
		tests/test_not_a_number.py tests/test_oracle.py

# On a machine with a GPU, PyTorch and Triton: its own Python (PYTHON=...), nothing installed or downloaded.
gpu:
	$(PYTHON) -m bench.gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The API page, of docstrings, and a check of every link.
docs: $(READY)
	$(BIN)/python docs/build.py

bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

gate: $(READY)
	$(BIN)/python -m bench.gate $(ARGS)

# The tests on other versions of PyTorch and Triton, each pair in an environment of its own: GBs and minutes for each.
compat: $(READY)
	$(BIN)/python -m bench.compat $(ARGS)

$(READY): requirements/dev.txt requirements/peers.txt requirements/peers-deps.txt requirements/examples.txt \
		setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed (PYTHON=... selects one)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/peers-deps.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements/peers.txt -r requirements/examples.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

$(VENV)/.study: $(READY) requirements/study.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements/study.txt
	touch $(VENV)/.study

# A second Triton, which only its own test sees. Its wheels end at Python 3.13.
$(OLDEST): $(READY) requirements/oldest.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target .venv-oldest/triton \
		-r requirements/oldest.txt || echo "No Triton of requirements/oldest.txt for this Python: its test will be skipped"
	touch $(OLDEST)

clean:
	rm -rf $(VENV) .venv-oldest .venv-compat build *.egg-info
