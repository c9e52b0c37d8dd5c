.DEFAULT_GOAL := help
.PHONY: help setup demo serve chart-tools check-helm test test-faults test-scaling test-gpu memcheck-gpu test-interpreter check lint type bench bench-kernels eval eval-served clean

# The first Python of a fitting version; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
# Triton and the NumPy that its interpreter works with; neither belongs into .venv.
INTERPRETER := build/interpreter
CHECKPOINT ?= checkpoints/tiny-agent
FP8 := checkpoints/tiny-agent-fp8
# A GPU machine without a network has torch in a Python of its own and no .venv.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 26

setup: $(READY) $(FP8)/config.json  ## make .venv with everything pinned, and tiny-agent's FP8 form

$(READY): pyproject.toml setup.py constraints.txt .ci/setup_environment.py $(wildcard proto/seamount/v1/*.proto)
	@test -n "$(PYTHON)" || { echo "setup: Seamount needs Python 3.11 or 3.12 on the PATH, or PYTHON=..." >&2; exit 1; }
	@$(PYTHON) .ci/setup_environment.py
	@touch $@

$(FP8)/config.json: $(READY) $(wildcard checkpoints/tiny-agent/*.safetensors)
	@rm -rf $(FP8)
	$(BIN)/seamount checkpoint quantize checkpoints/tiny-agent $(FP8)

demo: $(READY)  ## start everything on Ray Serve, talk to tiny-agent while it calls tools, check it, stop
	$(BIN)/seamount demo

serve: $(READY)  ## start everything in the foreground; Ctrl-C stops it
	$(BIN)/seamount up

test: $(READY)  ## all tests, parity included (CPU)
	$(BIN)/python -m pytest -q

test-faults: $(READY)  ## every point of the fault suite: processes killed, stopped, cut off (CPU, 9 minutes)
	$(BIN)/python -m pytest -q -m "" tests/faults

test-scaling: $(READY)  ## the longer tests of scaling, two releases beside each other among them (CPU, 13 minutes)
	$(BIN)/python -m pytest -q -m scaling tests/cluster

check: lint type  ## everything that reads code without running it

chart-tools: $(READY)  ## fetch what checks the Helm chart into build/tools: helm, checkov (a minute; tests skip without them)
	@$(BIN)/python .ci/fetch_chart_tools.py

check-helm: chart-tools  ## every profile of the Helm chart: lint, schemas, policies, checkov
	$(BIN)/python -m pytest -q tests/helm

lint: $(READY)  ## ruff, import contracts, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	cd proto && ../$(BIN)/buf lint

type: $(READY)  ## mypy --strict
	$(BIN)/mypy

test-gpu:  ## kernels, model and trainer on a CUDA device; needs torch, triton, grpcio, pytest there, no network
	@mkdir -p gen/seamount
	@for name in kernels workers; do ln -sfn ../../$$name gen/seamount/$$name; done
	@ln -sfn ../../proto/wire gen/seamount/wire
	PYTHONPATH=gen $(GPU_PYTHON) -m pytest -q -rs -m gpu --confcutdir=tests/kernels tests/kernels/gpu tests/workers/gpu tests/examples/gpu

# Without PyTorch's caching an allocation ends where its tensor does, and an access beyond it is seen.
memcheck-gpu:  ## every kernel on small shapes under compute-sanitizer; needs a CUDA device and the CUDA toolkit
	@mkdir -p gen/seamount && ln -sfn ../../kernels gen/seamount/kernels
	PYTHONPATH=gen PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all \
		--error-exitcode 1 $(GPU_PYTHON) -m pytest -q -m gpu --confcutdir=tests/kernels tests/kernels/gpu/test_every_operation.py

test-interpreter: $(READY)  ## the GPU kernels' tests on a CPU, in Triton's interpreter (once fetches 190 MB; 4 minutes)
	@test -d $(INTERPRETER)/triton || $(BIN)/pip install -q --target $(INTERPRETER) triton==3.6.0 numpy==2.2.6
	TRITON_INTERPRET=1 PYTHONPATH=$(INTERPRETER):gen $(BIN)/python -m pytest -q -rs --confcutdir=tests/kernels tests/kernels/gpu \
		tests/examples/gpu/test_selection_bits.py tests/workers/offline

bench: $(READY)  ## run the CPU benchmarks (half an hour on an idle machine)
	@set -e; for name in agents context cut_ahead latency retention scaling tiers token_log transfer; do \
		echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name; done

bench-kernels:  ## measure the GPU kernels; needs a CUDA device
	@mkdir -p gen/seamount && ln -sfn ../../kernels gen/seamount/kernels
	@set -e; for name in kernels kernels_write kernels_gemm kernels_chunk; do \
		echo "== benchmarks.$$name"; PYTHONPATH=gen $(GPU_PYTHON) -m benchmarks.$$name; done

eval:  ## score the trained checkpoint on held-out tasks: table, JSON, plot (CHECKPOINT=DIR; hours without a GPU)
	PYTHONPATH=gen $(GPU_PYTHON) -m examples.tiny_agent.evaluate --checkpoint $(CHECKPOINT) --out .run/evaluation
	PYTHONPATH=gen $(GPU_PYTHON) -m examples.tiny_agent.report .run/evaluation

eval-served: $(READY)  ## 200 tasks and 5 needles through the whole system on this CPU: the same tokens as in one process (an hour)
	$(BIN)/python -m examples.tiny_agent.parity --checkpoint $(CHECKPOINT)

clean:  ## remove the environment and everything generated; checkpoints stay
	rm -rf .venv gen build dist .run .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
