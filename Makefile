PYTHON ?= python
OUT ?= runs/gpu

.PHONY: build test bench lint format gpu

build: ## compile the modules in place, only what changed
	$(PYTHON) setup.py build_ext --inplace

test:
	$(PYTHON) -m pytest

bench:
	$(PYTHON) -m pytest benchmarks/ --benchmark-only

gpu: ## build, test, sanitize, measure and profile on the GPU here, in ten minutes; docs/gpu.md
	$(PYTHON) -m benchmarks.gpu --output-dir $(OUT) $(ARGS)

lint:
	ruff check .
	ruff format --check .
	$(PYTHON) -m mypy
	git ls-files 'csrc/*' | xargs clang-format --dry-run -Werror

format:
	ruff check --fix .
	ruff format .
	git ls-files 'csrc/*' | xargs clang-format -i
