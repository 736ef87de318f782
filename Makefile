# Commands that do everything on a fresh machine, in environments of their own:
#   make demo   train, evaluate and look at a small SViT on handwritten digits
#   make check  lint, types and the quick tests, in a minute and a half: for every change
#   make test   lint and all tests; MM=onedl: those of detection and segmentation, with the maintained forks
#   make test-newest   what compilers decide, with the newest PyTorch and its Triton; a release needs it
#   make matrix the quick tests with each Python and PyTorch that the package supports; a release needs it
#   make clients   the examples of docs/clients.md, with other libraries; a release needs it
#   make docs   the documentation as pages of a website, into site/; needs npm
#   make explorer   the same, then serves it and opens the explorer of super tokens
# On a machine with an NVIDIA GPU:
#   make gpu-check   checks and measures the fused ops, into docs/benchmarks; ARGS="--minutes 9" and other options
PYTHON ?= python3
TIMM := $(shell sed -n 's/^timm==//p' constraints.txt)
PROJECT := setup.cfg pyproject.toml constraints.txt

# PyTorch's threads wait for each other without burning the processor: on a busy machine the other way is many times slower.
export OMP_WAIT_POLICY ?= passive

# Which MMDetection and MMSegmentation: upstream's or the forks, each in an environment of its own.
MM ?= upstream
ifeq ($(MM),upstream)
TESTENV := .venv-test
EXTRA := mm
MMCV := mmcv==2.1.0
TESTS := tests
else ifeq ($(MM),onedl)
TESTENV := .venv-test-onedl
EXTRA := mm-onedl
MMCV := onedl-mmcv==2.3.6
TESTS := tests/adapters tests/cli/test_mm_tools.py tests/cli/test_flops.py tests/test_package.py
else
$(error MM: expected upstream or onedl, got $(MM))
endif
SDIST := $(TESTENV)/timm-$(TIMM)

# What `pip install torch` brings today, beside the versions of constraints.txt; Triton comes with it.
NEWEST := torch==2.14.1 torchvision==0.29.1
# The oldest that the package takes.
OLDEST := torch==2.10.0 torchvision==0.25.0

JOBS ?= 2

# `make check` and `make matrix` run all tests but these.
SLOW := tests/adapters tests/clients tests/cli tests/tools tests/ops/cuda tests/ops/triton tests/ops/test_registration.py \
	tests/models/test_deployment.py tests/models/test_fused.py tests/models/test_svit.py tests/test_explorer.py \
	tests/test_gpu.py tests/test_package.py tests/test_profiling.py
QUICK := -n $(JOBS) --dist load tests $(SLOW:%=--ignore=%)

# What docs/clients.md uses.
CLIENTS := anomalib captum fastai grad-cam lightning openvino peft segmentation-models-pytorch torchao transformers ultralytics

# Python and PyTorch together, each with an environment of its own.
MATRIX := $(foreach python,3.10 3.11 3.12 3.13,$(python)-oldest $(python)-newest)

ARGS ?=

.SECONDARY: $(MATRIX:%=.venv-matrix/%/installed)
.PHONY: demo check test test-newest matrix clients docs explorer gpu-check lint format clean

demo: .venv-demo/installed
	.venv-demo/bin/python tools/demo.py

check: lint
	OMP_NUM_THREADS=1 $(TESTENV)/bin/python -m pytest -q $(QUICK)

test: lint $(SDIST)
	SVIT_TIMM_SDIST=$(abspath $(SDIST)) OMP_NUM_THREADS=1 $(TESTENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-newest: .venv-test-newest/installed
	OMP_NUM_THREADS=1 .venv-test-newest/bin/python -m pytest -n $(JOBS) --dist loadfile tests/ops/triton tests/layers \
		tests/test_gpu.py

# Goes on where one fails, and names all that failed or could not be installed.
matrix:
	@for cell in $(MATRIX); do $(MAKE) matrix-$$cell || failed="$$failed $$cell"; done; \
	test -z "$$failed" || { echo "Failed, or could not be installed:$$failed"; exit 1; }

matrix-%: .venv-matrix/%/installed
	OMP_NUM_THREADS=1 .venv-matrix/$*/bin/python -m pytest -q $(QUICK)

# Of docs/clients.md, with the libraries that the tests' environment lacks.
clients: .venv-clients/installed
	OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest tests/clients

docs: .venv-docs/installed
	.venv-docs/bin/python docs/explorer/build.py build/explorer
	.venv-docs/bin/mkdocs build --strict
	cp -R build/explorer/page/. site/explorer
	@echo "Open site/index.html; the search and the explorer need a server: python -m http.server -d site"

explorer: docs
	.venv-docs/bin/python docs/explorer/serve.py site

# Without a network in the environment that $(PYTHON) is of, which needs torch, timm and numpy.
gpu-check:
	$(MAKE) .venv-gpu/installed || echo "No environment could be made; this is $(PYTHON)'s."
	if test -e .venv-gpu/installed; then python=.venv-gpu/bin/python; else python=$(PYTHON); fi; \
	$$python tools/gpu_check.py $(ARGS)

lint: $(TESTENV)/installed
	$(TESTENV)/bin/ruff check
	$(TESTENV)/bin/ruff format --check
	$(TESTENV)/bin/mypy

format: $(TESTENV)/installed
	$(TESTENV)/bin/ruff check --fix
	$(TESTENV)/bin/ruff format

clean:
	rm -rf .venv-demo .venv-test .venv-test-onedl .venv-test-newest .venv-matrix .venv-clients .venv-docs .venv-gpu site outputs/demo build dist *.egg-info

.venv-demo/installed: $(PROJECT)
	@echo "Installing the demo's environment into .venv-demo; PyTorch is a large download."
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --constraint constraints.txt --editable ".[demo]"
	touch $@

.venv-test-newest/installed: $(PROJECT) Makefile
	@echo "Installing $(NEWEST) into .venv-test-newest: a large download."
	$(PYTHON) -m venv .venv-test-newest
	grep -vE '^(torch|torchvision)==' constraints.txt > .venv-test-newest/constraints.txt
	.venv-test-newest/bin/pip install --constraint .venv-test-newest/constraints.txt $(NEWEST) --editable ".[dev]"
	touch $@

.venv-matrix/bin/uv: constraints.txt
	$(PYTHON) -m venv .venv-matrix
	.venv-matrix/bin/pip install --constraint constraints.txt uv
	touch $@

# uv finds the Python or downloads it; its cache holds one copy of a package for all environments.
.venv-matrix/%/installed: $(PROJECT) .venv-matrix/bin/uv
	@echo "Installing Python and PyTorch $* into .venv-matrix: a large download."
	.venv-matrix/bin/uv venv --clear --python $(firstword $(subst -, ,$*)) .venv-matrix/$*
	grep -vE '^(torch|torchvision)==' constraints.txt > .venv-matrix/$*/constraints.txt
	.venv-matrix/bin/uv pip install --python .venv-matrix/$* --constraint .venv-matrix/$*/constraints.txt \
		$(if $(filter %-oldest,$*),$(OLDEST),$(NEWEST)) --editable ".[dev]"
	touch $@

# Each library takes the versions that it wants of what svit's constraints.txt pins, but of PyTorch and timm.
.venv-clients/installed: tests/clients/constraints.txt $(PROJECT)
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --constraint tests/clients/constraints.txt --editable ".[train,export]" pytest $(CLIENTS)
	touch $@

# The project itself is not installed: the check runs from the checkout.
.venv-gpu/installed: constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --retries 1 --timeout 10 --constraint constraints.txt torch torchvision timm numpy \
		pytest pytest-xdist hypothesis setuptools
	touch $@

# PyTorch exports the explorer's model.
.venv-docs/installed: $(PROJECT)
	@command -v npm > /dev/null || { echo "make docs: needs npm, which comes with Node.js 18 or later: apt-get install npm"; exit 1; }
	@echo "Installing the documentation's environment into .venv-docs; PyTorch is a large download."
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --constraint constraints.txt --editable ".[docs,export]"
	touch $@

# mmcv comes as source only. It is built against the PyTorch of this environment, hence without isolation, and with its
# operators for the CPU; for a GPU set FORCE_CUDA=1 (and delete the wheel that pip may have kept: pip cache remove mmcv).
$(TESTENV)/installed: $(PROJECT)
	@echo "Installing the tests' environment into $(TESTENV); PyTorch is a large download."
	$(PYTHON) -m venv $(TESTENV)
	$(TESTENV)/bin/pip install --constraint constraints.txt --editable ".[dev,$(EXTRA)]"
	@echo "Building $(MMCV): about 12 minutes on two cores, once; pip keeps the result."
	FORCE_CUDA=$${FORCE_CUDA:-0} MMCV_WITH_OPS=1 $(TESTENV)/bin/pip install --constraint constraints.txt \
		--no-build-isolation "$(MMCV)"
	touch $@

# timm's own tests come only with its source distribution.
$(SDIST): $(TESTENV)/installed
	$(TESTENV)/bin/pip download "timm==$(TIMM)" --no-deps --no-binary timm --dest $(TESTENV)/sdist
	tar -xzf $(TESTENV)/sdist/timm-$(TIMM).tar.gz -C $(TESTENV)
	touch $@
