# Commands that do everything on a fresh machine, in environments of their own:
#   make demo   train, evaluate and look at a small SViT on real images
#   make test   lint and all tests
# On a machine with an NVIDIA GPU:
#   make gpu-check   the fused ops: tests, sanitizer, benchmarks, into docs/benchmarks
PYTHON ?= python3
TIMM := $(shell sed -n 's/^timm==//p' constraints.txt)
SDIST := .venv-test/timm-$(TIMM)
PROJECT := setup.cfg pyproject.toml constraints.txt

# PyTorch's threads wait for each other without burning the processor: on a busy machine the other way is many times slower.
export OMP_WAIT_POLICY ?= passive

PARTS ?= tests sanitizer ops inference training compiled

.PHONY: demo test gpu-check lint format clean

demo: .venv-demo/installed
	.venv-demo/bin/python tools/demo.py

test: lint $(SDIST)
	SVIT_TIMM_SDIST=$(abspath $(SDIST)) .venv-test/bin/python -m pytest

gpu-check: .venv-test/installed
	.venv-test/bin/python tools/gpu_check.py --parts $(PARTS)

lint: .venv-test/installed
	.venv-test/bin/ruff check
	.venv-test/bin/ruff format --check

format: .venv-test/installed
	.venv-test/bin/ruff check --fix
	.venv-test/bin/ruff format

clean:
	rm -rf .venv-demo .venv-test outputs build dist *.egg-info

.venv-demo/installed: $(PROJECT)
	@echo "Installing the demo's environment into .venv-demo; PyTorch is a large download."
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --constraint constraints.txt --editable ".[demo]"
	touch $@

.venv-test/installed: $(PROJECT)
	@echo "Installing the tests' environment into .venv-test; PyTorch is a large download."
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

# timm's own tests come only with its source distribution.
$(SDIST): .venv-test/installed
	.venv-test/bin/pip download "timm==$(TIMM)" --no-deps --no-binary timm --dest .venv-test/sdist
	tar -xzf .venv-test/sdist/timm-$(TIMM).tar.gz -C .venv-test
	touch $@
