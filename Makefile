# From a bare checkout: `make sweep` runs the main job, `make test` passes the tests. Both install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers

.PHONY: install sweep test test-peers test-gpu offline lint types check clean

install: $(INSTALLED)

# torch first: asked for by name and version, pip takes a CPU build where one is offered.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev]'
	touch $@

$(PEERS): $(INSTALLED) tests/peers/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r tests/peers/requirements.txt
	touch $@

sweep: $(INSTALLED)
	$(BIN)/megafold-bench sweep

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu and not peers"

# Our modules against Boltz, Protenix and OpenFold3, with their weights copied over; the variants against trifast and
# cuEquivariance's front end. trifast itself cannot be imported without a GPU, what it needs can.
# The first line fails where one of them cannot be imported: the tests would only skip.
test-peers: $(PEERS)
	LAYERNORM_TYPE=torch $(BIN)/python -c "import boltz.model.layers.pairformer, \
		openfold3.core.model.latent.pairformer, protenix.model.modules.pairformer, \
		cuequivariance_torch, jaxtyping, platformdirs"
	LAYERNORM_TYPE=torch $(BIN)/python -m pytest -m "peers and not gpu"

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# Compiles the kernels for GPUs that are not here: for H100/H200 all, for the other architectures those of bf16.
# All of them, in twice the time: make offline ARCH=all. Only some: make offline ARCH=gfx90a,sm_80.
OFFLINE := $(BIN)/megafold-bench kernels --offline
ARCH ?=
offline: $(INSTALLED)
ifeq ($(ARCH),)
	$(OFFLINE) --arch sm_90
	$(OFFLINE) --arch sm_80,sm_100,gfx90a,gfx942,gfx950 --dtype bf16
else
	$(OFFLINE) --arch $(ARCH)
endif

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: test test-peers offline lint types

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
