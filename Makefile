# Each target sets up what it needs. A machine needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# several processes with one thread each are faster than one with several
export OMP_NUM_THREADS ?= 1
JOBS ?= 2

.PHONY: quickstart test test-slow test-slurm test-gpu bench gpu-bench parity lint docs

quickstart: $(VENV)/.installed
	$(BIN)/alignbench sweep sweeps/quickstart.yaml -j $(JOBS)
	$(BIN)/alignbench report sweeps/quickstart.yaml

test: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow and not gpu"

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "slow and not gpu and not slurm"

# on a SLURM of its own (see tests/slurm/cluster.py): needs root on Debian, installs what is missing
test-slurm: $(VENV)/.installed-dev
	$(BIN)/pytest -m slurm -rs tests/slurm

# on one GPU
test-gpu: $(VENV)/.installed-dev
	$(BIN)/pytest -m gpu -rs tests/gpu

# on a CPU, in minutes: figures in benchmarks/results
bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/evaluators.py --size small
	$(BIN)/python benchmarks/report.py

# the full-size FLUX.1-dev with random weights on one GPU: figures in benchmarks/results
gpu-bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu.py

# against the official packages: the first run installs their environments (see alignbench/official)
parity: $(VENV)/.installed-dev
	$(BIN)/pytest -m parity -rP tests/parity

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy alignbench methods evaluators reports

# the documentation as a site, in site/; `python3 -m http.server -d site` shows it
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("alignbench needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@
