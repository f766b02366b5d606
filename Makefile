PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
STUDY := digits_label_noise
NO_TRAINING := benchmarks docs figures head hostile_files launch list_models lock nothing_left \
	old_names package parts predict pretrained preview record report rerun secrets \
	security structure study sweeps weights

.PHONY: quickstart test test-slow test-long test-resume test-avx2 test-gpu test-slurm test-hosts figures bench cpu-map docs docs-serve lint format clean

quickstart: $(BASE) ## train SAM on scans of digits: less than a minute on two cores
	$(BIN)/python train.py experiment=quickstart
	@printf '%s\n' '' 'Next, RUN is the folder of the run, named above:' \
		'  . $(BIN)/activate' \
		'  tensorboard --logdir logs' \
		'  python -m sam_lightning evaluate ckpt_path=RUN' \
		'  python train.py experiment=quickstart rho=0   # without SAM' \
		'Your photographs, in PHOTOS/train/<class>/ and PHOTOS/test/<class>/:' \
		"  pip install -e '.[lite]'" \
		'  python train.py experiment=finetune data.root=PHOTOS' \
		'README.md has the rest.'

test: $(DEV) ## the default test suite: less than five minutes on two cores
	$(BIN)/python -m pytest

test-slow: $(DEV) ## the tests that take longer
	$(BIN)/python -m pytest -m "slow and not long"

test-long: $(DEV) ## the tests that take longest, and variations of others
	$(BIN)/python -m pytest -m long

test-resume: $(DEV) ## 200 random runs stopped and continued: hours; goes on where it was stopped
	OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers:. \
		$(BIN)/python tests/helpers/random_resume.py logs/test_resume 200

test-avx2: $(DEV) ## those of the default suite that train, as on a CPU without AVX-512
	ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest --ignore=tests/config --ignore=tests/data \
		--ignore=tests/optim $(patsubst %,--ignore-glob=*/test_%.py,$(NO_TRAINING))

test-gpu: $(DEV) ## the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu -n 4 --dist load

test-slurm: $(DEV) ## a SLURM of two nodes, which root can install on Debian and Ubuntu
	@command -v slurmctld slurmd munged >/dev/null || [ $$(id -u) != 0 ] || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge; }
	$(BIN)/python -m pytest -m slurm -n 0

test-hosts: $(DEV) ## two hosts as network namespaces; needs root, ip and unshare
	@command -v faketime >/dev/null || [ $$(id -u) != 0 ] || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends faketime iproute2 iptables; }
	$(BIN)/python -m pytest -m hosts -n 0

figures: $(BASE) ## the first result and every picture in images/: 15 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m sam_lightning study conf/study/$(STUDY).yaml jobs=2
	$(BIN)/python -m sam_lightning landscape labels=SGD,SAM out=images \
		ckpt_path=logs/studies/$(STUDY)/sgd,seed=0,logs/studies/$(STUDY)/sam,rho=0.2,seed=0
	$(BIN)/python images/sam_update.py out=images/sam_update
	$(BIN)/python images/overview.py out=images/overview
	$(BIN)/python images/cheaper_sam.py out=images/cheaper_sam

bench: $(DEV) ## the tables of benchmarks/: ten minutes on two cores
	$(BIN)/python -m benchmarks

cpu-map: $(DEV) ## where oneDNN's gradients are wrong on this CPU: five minutes
	$(BIN)/python -m benchmarks.onednn

docs: $(DOCS) ## the documentation as a site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(DOCS) ## the site on http://127.0.0.1:8000, drawn again when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pip prints hundreds of lines, or none for minutes. Here is how large $(VENV) is by now, where pip
# also keeps what it downloads until that is unpacked.
define watch
	@mkdir -p $(VENV)/tmp; start=$$(date +%s); \
	passed() { echo "  $$(($$(date +%s) - start)) s: $$(du -sm $(VENV) | cut -f1) MB"; }; \
	while sleep 6 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do passed; done & \
	TMPDIR=$(abspath $(VENV))/tmp $(1) || { echo 'It failed: $(subst ',,$(subst -qq ,,$(1)))'; exit 1; }; \
	kill $$!; rm -rf $(VENV)/tmp; passed
endef
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	@echo 'Making $(VENV)'
	$(call watch,$(PYTHON) -m venv $(VENV))

$(BASE): $(BIN)/python pyproject.toml
	@echo 'Installing torch and Lightning: 1 GB, and 6 GB where torch brings CUDA'
	$(call watch,$(PIP) --editable .)
	@touch $@

$(DEV): $(BIN)/python pyproject.toml
	@echo 'Installing what tests need: 2 GB, and 7 GB where torch brings CUDA'
	$(call watch,$(PIP) --editable '.[dev]')
	@touch $(BASE) $@

$(DOCS): $(BIN)/python pyproject.toml
	@echo 'Installing MkDocs: 170 MB'
	$(call watch,$(PIP) 'mkdocs-material>=9.5' 'mkdocstrings-python>=1.12')
	@touch $@

clean:
	rm -rf $(VENV)
