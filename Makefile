# Commands for people and for CI. Python environments lie in $(VENV); nothing outside the checkout
# is touched.

VENV ?= .venv
# PyTorch is installed first and by itself. On a machine without a GPU, set TORCH_INDEX to
# PyTorch's package index of CPU builds: the ordinary build brings gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTHON ?= $(shell for name in python3.12 python3.11 python3; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
TORCH_INSTALL = $(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'

# A file in STAMPS says that a step of the installation is done.
STAMPS := $(VENV)/stamps
TORCH_STAMP := $(STAMPS)/$(subst =,-,$(TORCH))

.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test cluster chaos conformance check fix bench gpu ahead package golden clean

help: ## print this list
	@echo 'make TARGET [PYTHON=python3.12] [TORCH=torch==2.13.0] [TORCH_INDEX=...] [VENV=.venv]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

setup: $(STAMPS)/dev ## install everything that development needs
	@echo 'Ready. Next: make test, or activate the environment: . $(BIN)/activate'

demo: $(STAMPS)/longctx ## train a small hybrid model into runs/demo and sample from it
	@if [ -e runs/demo/summary.json ]; then \
		echo 'runs/demo is finished; it moves to runs/demo-previous'; \
		rm -rf runs/demo-previous && mv runs/demo runs/demo-previous; \
	fi
	@echo 'Training into runs/demo, each sequence shared by two processes: up to 3 minutes on'
	@echo '2 cores. Ctrl-C saves; make demo resumes.'
	@PATH="$$(cd $(BIN) && pwd):$$PATH" launch/local.sh -n 2 tiny --parallel.sp 2 --run.dir runs/demo
	@echo 'A sample:'
	@$(BIN)/longctx generate runs/demo --prompt 'def ' --output runs/demo/sample.txt
	@echo 'Results:'
	@echo '  every step   runs/demo/metrics.jsonl'
	@echo '  picture      runs/demo/loss.png'
	@echo "  checkpoint   $$(ls -d runs/demo/checkpoints/step-* | sort -V | tail -n 1)"
	@echo '  sample       runs/demo/sample.txt'
	@$(BIN)/python -c "import json; s = json.load(open('runs/demo/summary.json')); \
	print(f'  validation loss {s[\"val_loss\"]:.4f} nats a token;', \
	f'byte-unigram entropy of the same text {s[\"unigram_entropy\"]:.4f}')"

test: $(STAMPS)/dev ## run the tests
	@echo 'Testing: up to 12 minutes on 2 cores. The last line is the result.'
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not alone and not cluster'
	@echo 'Testing what needs the machine for itself'
	@$(BIN)/python -m pytest -m 'alone and not cluster'
	@echo 'Testing the Triton kernels in the interpreter'
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/interpreted

cluster: $(STAMPS)/dev ## tests of engines, kills and two hosts (network namespaces; root, iproute2)
	@echo 'Testing engines, launchers and restarts: up to 15 minutes on 2 cores.'
	@$(BIN)/python -m pytest -rs tests/cluster
	@$(BIN)/python -m pytest -m cluster

chaos: $(STAMPS)/dev ## kill trainings at random moments 200 times and resume them; up to 25 minutes
	$(BIN)/python -m tests.chaos --kills 200 --real 30 --out docs/results/chaos.md

conformance: $(STAMPS)/dev ## every mixer x placement x transport on simulated ranks; up to 15 minutes
	$(BIN)/python -m tests.conformance

check: $(STAMPS)/dev ## lint, formatting, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMPS)/dev ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMPS)/bench ## time the training step and every mixer on this CPU
	$(BIN)/python kernels/bench/cpu.py

# Where nothing but torch, triton and numpy is installed: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python

gpu: ## check every kernel on this machine's GPU, then time it beside its peers; under 8 minutes
	$(GPU_PYTHON) kernels/bench/gpu.py

ahead: $(STAMPS)/dev ## compile every kernel for GPUs that are not here; about 6 minutes
	PYTHONPATH=kernels $(BIN)/python -m longctx_kernels.ahead --out docs/results/kernels-ahead.md

golden: $(STAMPS)/dev ## regenerate tests/golden; review what it changes
	$(BIN)/python -m tests.goldens

clean: ## remove build products and caches; keeps .venv and runs
	rm -rf build dist longctx.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find longctx kernels tests -name __pycache__ -prune -exec rm -rf {} +

# One wheel from the checkout and one from the sdist must be the same; both distributions train.
EMPTY := build/empty-venv
SAME_WHEEL := import sys, zipfile; \
	a, b = ({i.filename: i.CRC for i in zipfile.ZipFile(f).infolist()} for f in sys.argv[1:]); \
	sys.exit(f"the wheels differ: {sorted({n for n, _ in a.items() ^ b.items()})}" if a != b else 0)
TINIEST := --train.steps 3 --train.seq_len 64 --eval.sequences 2

package: $(STAMPS)/dev ## build wheel and sdist and try both in an empty environment
	@echo 'Building wheel and sdist into dist, then trying them: a few minutes.'
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --sdist --wheel . > /dev/null
	rm -rf build
	$(BIN)/python $(subst install,wheel,$(PIP_INSTALL)) --no-deps --no-build-isolation \
		--wheel-dir build/from-sdist dist/*.tar.gz
	@$(BIN)/python -c '$(SAME_WHEEL)' dist/*.whl build/from-sdist/*.whl
	$(BIN)/python -m venv $(EMPTY)
	@$(EMPTY)/bin/python $(TORCH_INSTALL)
	$(call train_installed,dist/*.whl)
	$(EMPTY)/bin/python -m pip uninstall --quiet --yes longctx
	$(call train_installed,dist/*.tar.gz)
	rm -rf build
	@ls -l dist

define train_installed
	$(EMPTY)/bin/python $(PIP_INSTALL) $(1)
	rm -rf build/run
	cd / && '$(CURDIR)/$(EMPTY)/bin/longctx' train tiny $(TINIEST) --run.dir '$(CURDIR)/build/run'
	test -s build/run/summary.json
	cd / && '$(CURDIR)/$(EMPTY)/bin/longctx' report '$(CURDIR)/build/run' \
		--output '$(CURDIR)/build/run/report.html'
	cd / && '$(CURDIR)/$(EMPTY)/bin/longctx' launch slurm tiny --gpus-per-node 2 --dry-run > /dev/null
endef

$(STAMPS)/python:
	@test -n '$(PYTHON)' || { echo 'longctx needs Python 3.11 or 3.12: install one, or name it' \
		'with make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@'$(PYTHON)' -c '$(SUPPORTED)' || { echo '$(PYTHON) is not Python 3.11 or 3.12' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) lacks the venv' \
		'module: install it (Debian: apt install python3-venv)' >&2; exit 1; }
	@echo 'Creating the environment $(VENV) with $(PYTHON)'
	@'$(PYTHON)' -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(TORCH_STAMP): $(STAMPS)/python
	@echo 'Installing $(TORCH): one to ten minutes, once'
	@$(BIN)/python $(TORCH_INSTALL)
	@touch $@

$(STAMPS)/longctx: $(TORCH_STAMP) pyproject.toml
	@echo 'Installing longctx and what it needs: one to three minutes, once'
	@$(BIN)/python $(PIP_INSTALL) -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/longctx
	@echo 'Installing the tools for tests and checks: about a minute, once'
	@$(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(STAMPS)/bench: $(STAMPS)/longctx
	@echo 'Installing the peers of the benchmark: about a minute, once'
	@$(BIN)/python $(PIP_INSTALL) -e '.[bench]'
	@touch $@
