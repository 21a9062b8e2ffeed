# make tiny    environment, then the whole default plan: both recipes, to data/ckpts/*/hf/
# make test    environment, then the tests
# make check   format, lint, types, workflow lint, import order, spelling

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
CORES ?= 2
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The jobs load plait's modules thousands of times: where Python is told to keep no compiled ones, it is not here.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: tiny env dev test tiny-test test-long test-cluster test-cluster-short check format config goldens image mutants bench

tiny: env
	snakemake --cores $(CORES)

env: $(VENV)/.runtime

dev: $(VENV)/.dev

$(VENV)/.runtime: envs/cpu.lock pyproject.toml
	command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON) on PATH; name one: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet pip==26.3
	$(VENV)/bin/python -m pip install --quiet -r envs/cpu.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

$(VENV)/.dev: envs/dev.lock $(VENV)/.runtime
	$(VENV)/bin/python -m pip install --quiet -r envs/dev.lock
	touch $@

test: dev
	pytest -m "not long and not tiny and not cluster" -n $(CORES) --dist loadfile --no-loadscope-reorder

# After make tiny: what it left in data/ is as promised.
tiny-test: dev
	pytest -m tiny tests/tiny

test-long: dev
	pytest -m "long and not cluster" -n $(CORES) --dist loadfile --no-loadscope-reorder

# On a Slurm of this host and with an Apptainer, installed and brought up by the tests; says in one line each
# what it skips, and why. The short ones leave out those that wait for Slurm to give up or to begin anew.
test-cluster: dev
	pytest -m cluster -rs tests/cluster tests/envs

test-cluster-short: dev
	pytest -m "cluster and not long" -rs tests/cluster tests/envs

check: dev
	ruff format --check src tests
	ruff check src tests
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint
	lint-imports
	codespell
	python -m plait.config.document --check
	plait env render --check

format: dev
	ruff format src tests
	ruff check --fix src tests
	snakefmt Snakefile workflow

# The keys of config/, from their types: config/README.md and config/schema.json.
config: dev
	python -m plait.config.document

# The plans and launches that the tests compare with.
goldens: dev
	REWRITE_GOLDENS=1 pytest tests/workflow tests/preflight -k "golden or launch_of_each"

# Images for --sdm apptainer, envs/cpu.sif and envs/gpu.sif: built from envs/*.def, their bases held to the
# digests of the first time; or pulled: make image PULL=docker://REGISTRY/NAME takes its tags cpu and gpu.
IMAGES ?= cpu gpu

image: env
	$(if $(PULL),,plait env lock)
	for name in $(IMAGES); do \
	  apptainer $(if $(PULL),pull,build) --force envs/$$name.sif.part $(if $(PULL),$(PULL):$$name,envs/$$name.def) \
	  && mv envs/$$name.sif.part envs/$$name.sif || exit 2; done

# Faults of a converter, each with the check of a proof that finds it.
mutants: dev
	OMP_NUM_THREADS=1 python tests/verify/mutants.py

# Figures as ratios, each pair measured in one run. Some rows only: make bench ROWS="photos tokens-spm".
bench: dev
	python -m tests.bench $(ROWS)
