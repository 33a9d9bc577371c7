# make train | test | check | slow | lock | bench | readme; each makes .venv first if need be.
# PY=python3.12 chooses the interpreter, RUN=runs/b the folder of `make train`.
PY ?= python3
RUN ?= runs/ddpm
BIN := .venv/bin
PYTHON := $(BIN)/python
TRAIN := .venv/.train-installed
TEST := .venv/.test-installed

# Without bytecode every start would compile hundreds of modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test check slow lock bench readme
.DELETE_ON_ERROR:

train: $(TRAIN)
	@BLOGJAX_COMMAND='make train$(if $(filter-out runs/ddpm,$(RUN)), RUN=$(RUN))' \
	  BLOGJAX_AFRESH='make train RUN={}' \
	  $(PYTHON) -m experiments.ddpm --config=configs/ddpm.py --workdir='$(RUN)'

test: $(TEST)
	$(PYTHON) -m pytest -n 2 -m 'not slow' tests

slow: $(TEST)
	$(PYTHON) -m pytest -n 2 --dist loadfile -m slow tests

check: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(PYTHON) -m pytest -q --doctest-modules blogjax experiments

readme: $(TEST)
	$(PYTHON) -m experiments.launch.publish

# Alone on the machine: other work on its cores is in every figure.
bench: $(TEST) .venv-bench/.installed
	$(PYTHON) -m benchmarks.start_time
	$(PYTHON) -m benchmarks.views
	$(PYTHON) -m benchmarks.loop_overhead
	$(PYTHON) -m benchmarks.cifar10_program
	$(PYTHON) -m benchmarks.majority_vote
	$(PYTHON) -m benchmarks.scaling
	.venv-bench/bin/python -m benchmarks.lion_update
	.venv-bench/bin/python -m benchmarks.gradient_ops
	.venv-bench/bin/python -m benchmarks.multitask
	.venv-bench/bin/python -m benchmarks.ddpm_step

# PyTorch and the peers, several GB, apart from what the tests use.
.venv-bench/.installed: setup.cfg requirements.txt
	$(PY) -m venv --clear .venv-bench
	.venv-bench/bin/pip install -q --disable-pip-version-check uv
	.venv-bench/bin/uv pip install -q --python .venv-bench/bin/python -c requirements.txt -e '.[train,bench]'
	@touch $@

lock: $(TEST)
	$(BIN)/uv pip compile -q --universal --upgrade --no-annotate --no-header \
	  --python-version 3.11 --extra train --extra test setup.cfg -o requirements.txt

comma := ,

# The versions of requirements.txt; uv where it can be had, else pip.
define install
	@test -x $(BIN)/pip || { \
	  $(PY) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v else \
	    "error: blogjax needs Python 3.11 or newer, this is %d.%d; try make PY=python3.11" % v[:2])' \
	  && $(PY) -m venv --clear .venv; }
	@echo 'installing blogjax[$(1)] into .venv: $(2)'
	@$(BIN)/pip install -q --disable-pip-version-check uv 2>/dev/null; \
	if $(BIN)/uv pip install -q --python $(PYTHON) -c requirements.txt -e '.[$(1)]' 2>.venv/.uv.log; then :; \
	elif $(BIN)/pip install -q --disable-pip-version-check -c requirements.txt -e '.[$(1)]' 2>.venv/.pip.log; then :; \
	else tail -n 5 .venv/.pip.log >&2; echo 'error: the packages could not be installed. If no package' \
	  'registry can be reached from here,' >&2; echo 'point pip at a mirror or a folder of wheels' \
	  '(PIP_INDEX_URL or PIP_FIND_LINKS) and run make again.' >&2; exit 1; fi
	@$(PYTHON) -c 'import importlib.metadata as m; print("installed:", ", ".join( \
	  f"{p} {m.version(p)}" for p in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")))'
	@touch $@
endef

$(TRAIN): setup.cfg pyproject.toml requirements.txt
	$(call install,train,jax with what trains and draws)

$(TEST): setup.cfg pyproject.toml requirements.txt
	$(call install,train$(comma)test,jax with what trains and draws and tests)
	@touch $(TRAIN)
