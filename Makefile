PYTHON ?= python
OUT ?= runs/gpu

.PHONY: build test coverage bench gate lint format gpu sanitize docs release wheels

build: ## compile the modules in place, only what changed
	$(PYTHON) setup.py build_ext --inplace

test:
	$(PYTHON) -m pytest

coverage: export COVERAGE_FILE = $(abspath build/coverage)
coverage: ## the lines of the trainer that its tests run; fails below 90 %
	mkdir -p build
	rm -f build/coverage build/coverage.*
	$(PYTHON) -m coverage run -m pytest tests/train $(ARGS)
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

bench:
	$(PYTHON) -m pytest benchmarks/ --benchmark-only

gate: ## what the code does, counted, beside the committed figures; docs/benchmarks.md
	$(PYTHON) -m benchmarks.gate $(ARGS)

# The theme's notice of its own future would be the only output.
docs: export NO_MKDOCS_2_WARNING = 1
docs: ## the site, in build/site; fails on any warning
	$(PYTHON) -m mkdocs build --strict --quiet

release: ## sdist and wheel in dist/; fails where files differ from the commit, or CHANGELOG.md has no date for the version
	git diff --quiet HEAD
	grep -qE "^## $$($(PYTHON) -c 'import fastres; print(fastres.__version__)'), [0-9]{4}-[0-9]{2}-[0-9]{2}$$" CHANGELOG.md
	$(PYTHON) -m build

wheels: ## the wheel, out of the source distribution, tested where there is no compiler; docs/wheel.md
	$(PYTHON) -m tests.wheels $(ARGS)

gpu: ## build, test, sanitize, measure and profile on the GPU here, in ten minutes; docs/gpu.md
	$(PYTHON) -m benchmarks.gpu --output-dir $(OUT) $(ARGS)

# torch quotes CXX as one word, so the flags go into a compiler of their own. Python's own leaks are not looked at.
# -O1 comes last and wins: at -O3 the compiler takes minutes over instrumented vector code.
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1
SANITIZED = $(abspath build/sanitize)
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell c++ -print-file-name=$(name)))

sanitize: ## the tests of the CPU extension and of the CUDA emulator under AddressSanitizer and UBSan
	mkdir -p $(SANITIZED)
	printf '#!/bin/sh\nexec c++ "$$@" %s\n' '$(SANITIZE)' > $(SANITIZED)/c++
	chmod +x $(SANITIZED)/c++
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 CXX=$(SANITIZED)/c++ \
	FASTRES_EXTENSION=build FASTRES_CUDA=0 TORCH_EXTENSIONS_DIR=$(SANITIZED) \
	$(PYTHON) -m pytest -p no:cacheprovider tests/emulator tests/ops tests/test_functional.py $(ARGS)

lint:
	ruff check .
	ruff format --check .
	$(PYTHON) -m mypy
	git ls-files 'csrc/*' | xargs clang-format --dry-run -Werror

format:
	ruff check --fix .
	ruff format .
	git ls-files 'csrc/*' | xargs clang-format -i
