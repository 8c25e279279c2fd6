PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

DEMO_STEPS ?= 28000
DEMO = $(RUN) ne_td3_continuous.py --env-id HalfCheetah-v5 --total-timesteps $(DEMO_STEPS) --learning-starts 5000 \
	--eval-frequency 2000 --eval-episodes 3
POLICY ?= policies/HalfCheetah-v5.pt

.DEFAULT_GOAL := help
.PHONY: help venv pixels gl test test-slow demo enjoy lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

venv: $(VENV)/.requirements  ## create .venv with what the state scripts need (Python 3.11 to 3.13)

pixels: $(VENV)/.requirements-pixels gl  ## add what the pixel scripts need (Python 3.11 or 3.12)

# one stamp per requirement file: pip runs only when a file has changed
$(VENV)/.requirements: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || \
		{ echo "error: Python 3.11, 3.12 or 3.13 is needed; name one with: make PYTHON=/path/to/python"; exit 1; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "hint: on Debian and Ubuntu first: apt-get install python3-venv"; exit 1; }
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/.requirements-pixels: requirements-pixels.txt $(VENV)/.requirements
	@$(RUN) -c "import sys; sys.exit(sys.version_info >= (3, 13))" || \
		{ echo "error: the pixel scripts need Python 3.11 or 3.12 (labmaze has no wheel for 3.13)"; exit 1; }
	$(PIP) install -r requirements-pixels.txt
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt requirements-benchmark.txt $(VENV)/.requirements-pixels
	$(PIP) install -r requirements-dev.txt
	@touch $@

GL_PACKAGES := libegl1 libgl1 libosmesa6
GL_LOADS := $(PYTHON) -c "import ctypes; [ctypes.CDLL(lib) for lib in ('libEGL.so.1', 'libGL.so.1')]" 2>/dev/null

gl:  ## install the libraries that off-screen rendering needs (Debian, as root)
	@if [ "$$(uname)" != Linux ] || $(GL_LOADS); then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(GL_PACKAGES); \
	fi; \
	$(GL_LOADS) || echo "note: rendering needs libEGL and libGL (Debian: apt-get install $(GL_PACKAGES))"

test: $(VENV)/.requirements-dev gl  ## linter, format check and fast tests: 4 minutes on two cores
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.requirements-dev gl  ## the tests that take minutes each
	$(RUN) -m pytest -m slow

# NE in the foreground, its dense twin in the background; however this ends, the twin does not outlive it
demo: $(VENV)/.requirements  ## train NE-TD3 and dense TD3 on HalfCheetah: 5 minutes on two cores, draw the curves
	@rm -rf demo && mkdir demo
	@echo "NE-TD3 and dense TD3 train side by side; the dense one writes to demo/td3.log"
	@$(DEMO) --initial-density 1 --review-floor 1 --run-dir demo/td3 >demo/td3.log 2>&1 & dense=$$!; \
	trap 'kill $$dense 2>/dev/null; wait' EXIT; trap 'exit 130' INT TERM; \
	$(DEMO) --run-dir demo/ne_td3 || exit; \
	wait $$dense || { tail -n 3 demo/td3.log; exit 1; }
	@echo "dense TD3:"; tail -n 4 demo/td3.log
	@$(RUN) benchmark/plot.py curves "NE-TD3=demo/ne_td3" "TD3 (dense)=demo/td3" --out demo/curves.png --title HalfCheetah-v5 \
		--note "one seed, $(DEMO_STEPS) steps: shows that it runs, not which is better"
	@echo "curves:      demo/curves.png"
	@echo "TensorBoard: $(VENV)/bin/tensorboard --logdir demo"

enjoy: $(VENV)/.requirements  ## play a trained NE agent: returns of five episodes (POLICY=policies/NAME.pt)
	@$(RUN) benchmark/enjoy.py $(POLICY)

lint: $(VENV)/.requirements-dev  ## linter and format check
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.requirements-dev  ## fix what the linter can fix and reformat
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove .venv, demo and caches; runs stay
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
