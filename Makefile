# The two commands of the README are `make demo` and `make test`; each sets up all that it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, file by file; each starts what it needs.
TEST_PROCESSES ?= 2
STAMP := $(VENV)/.installed

.PHONY: help demo test test-faults test-compose secrets nightly gpu-check gpu-bench lint audit types protos check-protos \
	model lock clean

help:  ## What can be made here
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "StreamFlow needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (a few minutes, once)"
	@# torch first and pinned: an unpinned one would bring gigabytes of CUDA packages.
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## Start everything on this machine, make pictures of a dozen prompts under out/, stop
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## All tests, with real processes and a real Redis
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-faults: $(STAMP)  ## The fault matrix: processes are killed and frozen under load; QUICK=1 for the short one
	STREAMFLOW_QUICK=$(QUICK) $(BIN)/python -m pytest -m faults tests/faults $(FAULTS)

test-compose: $(STAMP)  ## Build every image and run the composition, with kills; needs podman (docs/compose.md)
	$(BIN)/python -m pytest -m compose tests/compose -s

secrets:  ## The passwords and users of Redis that docker-compose.yml mounts
	sh deploy/secrets.sh

nightly: $(STAMP)  ## What takes longer: graphs of every family, the full fault matrix, half an hour of soak, the fuzzers
	$(BIN)/python -m pytest -m nightly
	$(BIN)/python -m pytest -m compose tests/compose -s
	STREAMFLOW_FAULTS_TABLE=docs/faults.md STREAMFLOW_SOAK_S=1800 $(BIN)/python -m pytest -m faults tests/faults
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	for target in request entry image; do $(BIN)/python -m tests.fuzz.fuzz_$$target -max_total_time=300 || exit 1; done

gpu-check:  ## What only a GPU can show; needs python3 with torch, diffusers and transformers, and no set-up
	$(PYTHON) -m pytest -c tests/gpu/pytest.ini --rootdir . tests/gpu

gpu-bench:  ## Benchmarks on a GPU, on networks of real models' shapes with random weights; needs the same
	$(PYTHON) -m benchmarks.gpu --json docs/benchmarks/gpu.json

lint: $(STAMP)  ## Style, and what bandit finds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit -q -c pyproject.toml -r streamflow services gateway

audit: $(STAMP)  ## Known vulnerabilities of what is pinned; needs the network
	$(BIN)/pip install -q --disable-pip-version-check 'pip-audit>=2.7'
	$(BIN)/python .ci/audit.py constraints.txt

types: $(STAMP)  ## Types of the library
	$(BIN)/mypy

protos: $(STAMP)  ## Generate streamflow/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. --pyi_out=. protos/streamflow/v1/*.proto

check-protos: protos  ## Fail when the committed generated code is not that of protos/
	git diff --exit-code -- streamflow/v1

lock: $(STAMP)  ## The hashes by which images take packages; INDEX= is a package index's simple API
	$(BIN)/python deploy/lock.py $(INDEX)

model: $(STAMP)  ## Train the built-in model again (about 3 hours on 2 cores, minutes on a GPU)
	$(BIN)/python -m training all --fresh

clean:  ## Remove what was made here, the virtual environment too
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
