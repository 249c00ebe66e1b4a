# Everything a newcomer needs. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
HOST   ?= 127.0.0.1
PORT   ?= 8000

.PHONY: help setup serve chat check test test-clients sanitize selftest clean
.DEFAULT_GOAL := help

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

NATIVE := $(wildcard src/dsv4/kernels/native/*.cpp src/dsv4/kernels/native/*.h) \
          src/dsv4/kernels/native/CMakeLists.txt

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "dsv4 needs Python >= 3.10; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -e '.$(1)'
	@touch $(BIN)/dsv4
endef

$(BIN)/dsv4: pyproject.toml $(NATIVE)
	$(call install,)

$(VENV)/.dev: pyproject.toml $(NATIVE)
	$(call install,[dev])
	@touch $@

setup: $(VENV)/.dev   ## make .venv with everything, tests included

serve: $(BIN)/dsv4    ## serve v4-nano on http://127.0.0.1:8000 (HOST=, PORT=)
	$(BIN)/dsv4 serve --host $(HOST) --port $(PORT)

chat: $(BIN)/dsv4     ## talk to v4-nano in the terminal
	$(BIN)/dsv4 chat

check: $(VENV)/.dev   ## lint, types and the fast tests (two minutes)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m 'not slow'

test: $(VENV)/.dev    ## lint, types and every test
	$(BIN)/ruff check .
	$(BIN)/mypy
	-tests/clients/install .clients $(BIN)/python
	$(BIN)/python -m pytest

test-clients: $(VENV)/.dev  ## run real clients and agents (openai, anthropic, llm, aider, Claude Code, Codex, OpenCode)
	tests/clients/install .clients $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_real_clients.py tests/test_agents_sessions.py

SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)

sanitize: $(VENV)/.dev  ## test the native kernels under the address and undefined-behaviour sanitizers
	cmake -S src/dsv4/kernels/native -B build/sanitize -DDSV4_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python
	cmake --build build/sanitize --parallel
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  $(BIN)/python -m pytest -q tests/test_native_kernels.py; \
	  status=$$?; $(BIN)/python -m pip install -q -e .; exit $$status

SELFTEST = cmake -S src/dsv4/kernels/native -DDSV4_SELFTEST=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo

selftest:        ## the kernels without Python: under valgrind, and on an emulated arm64 the same bits
	$(SELFTEST) -B build/selftest
	cmake --build build/selftest --parallel
	valgrind -q --error-exitcode=1 build/selftest/selftest > build/selftest/here
	$(SELFTEST) -B build/arm64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/arm64 --parallel
	qemu-aarch64-static build/arm64/selftest > build/arm64/there
	diff build/selftest/here build/arm64/there

clean:           ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
