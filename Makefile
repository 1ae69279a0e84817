# `make demo` and `make test` set up what they need on a fresh machine: Python 3.11+ with venv, and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE  # the tests start Python often; it need not compile the library each time
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: demo test test-kernels lint docs bench clean

demo: $(VENV)/.demo  ## the whole story on real digits; the report is gramian-demo/report.html
	$(BIN)/gramian demo

test: $(VENV)/.test  ## all tests, the slow ones last
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not families"  # one thread a worker: more only wait for each other

.PHONY: test-families families
test-families:  ## every verb on the models of public libraries; one: FAMILIES=gpt2, the page: FAMILIES=--write
	$(MAKE) VENV=$(VENV)-families families

families: $(VENV)/.families  # an environment of their own: torchvision's wheel may not fit a CPU build of torch
	OMP_NUM_THREADS=1 $(BIN)/python tests/families.py $(FAMILIES)
	$(if $(FAMILIES),,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m families)

# What one processor rounds another rounds otherwise. First the kernels that this one can be told to use, then sums in
# other orders (tests/kernels.py), which stand for processors that are not at hand.
KERNELS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX512_CORE \
	MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX512 \
	MKL_CBWR=COMPATIBLE MKL_CBWR=AVX2 MKL_CBWR=AVX512 GRAMIAN_ORDER=1 GRAMIAN_ORDER=2 GRAMIAN_ORDER=3
ROUNDED := tests/test_linalg_*.py tests/test_spectra.py tests/test_noise.py tests/test_quick.py

test-kernels: $(VENV)/.test  ## quick tests of verdicts with the rounding of other processors; one: KERNELS=MKL_CBWR=AVX2
	@for kernel in $(KERNELS); do echo "$$kernel"; \
	env "$$kernel" PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -p kernels -m "not slow" \
	$(ROUNDED) || exit 1; done

lint: $(VENV)/.lint  ## style, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

.PHONY: coverage
coverage: $(VENV)/.coverage  ## which lines the quick tests run; pages in .coverage/html
	mkdir -p .coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not families" --cov --cov-report=
	-$(BIN)/coverage combine --append --quiet  # what the ranks of distributed tests wrote when they ended
	$(BIN)/coverage report
	$(BIN)/coverage html --quiet

docs: $(VENV)/.docs  ## HTML in docs/_build
	$(BIN)/sphinx-build --quiet -W -b html docs docs/_build

.PHONY: dist
dist: $(VENV)/.torch  ## the distributions in dist/, tried in a new environment; for a release: URL=https://…
	$(PIP) build
	$(BIN)/python tests/dist.py --torch $(TORCH) $(if $(URL),--url $(URL),)

bench: $(VENV)/.test  ## the figures of the README and of benchmarks/results
	$(BIN)/python benchmarks/demo_rates.py
	$(BIN)/python benchmarks/demo_seeds.py

clean:
	rm -rf $(VENV) $(VENV)-families dist gramian-demo runs docs/_build docs/_gallery .coverage .pytest_cache .ruff_cache

# torch first and by itself: its pinned version has a small CPU build where an open range takes gigabytes.
$(VENV)/.torch: constraints.txt
	@echo "Setting up $(VENV), once: torch is some 200 MB; a minute or two"
	@$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[tasks]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[test]'
	@touch $@

# Without their dependencies: torchvision and timm would replace the CPU build of torch.
$(VENV)/.families: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[families]'
	$(PIP) --no-deps torchvision timm
	@touch $@

$(VENV)/.coverage: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[coverage]'
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[test,lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[docs]'
	@touch $@
