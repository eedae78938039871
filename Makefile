# `make` lists what there is. Each target works alone from a clean clone: it sets up .venv first where that is needed.

PYTHON ?= python3
RUN := .venv/bin/python
SETUP := $(PYTHON) tools/setup_environment.py $(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)") $(if $(WHEELS),--wheels "$(WHEELS)")
BENCH_DATA := $(if $(DATA),--data $(DATA))
BENCH_PEERS := $(if $(PEERS),--peers "$(PEERS)")
BENCH_QUICK := $(if $(FULL),,--quick)

.PHONY: help setup demo test check format faults soak learn bench knee wheels clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## */  make \1\t/'

setup:  ## .venv with everything [TORCH_INDEX=URL of torch builds] [WHEELS=folder, without a network] [PYTHON=python3.12]
	@$(SETUP)

.venv/.ready: pyproject.toml dinox_io/_filters.c tools/setup_environment.py $(wildcard tools/environment/*.py)
	@$(SETUP)

demo: .venv/.ready  ## from DICOM to a report in minutes [DATA=folder of your own DICOM] [SHORT=1]
	@$(RUN) tools/demo.py $(if $(DATA),--data "$(DATA)") $(if $(SHORT),--short)

test: check  ## format, lint, types of packages and tools, and tests, one process a core; about 15 minutes on 2 cores
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: .venv/.ready  ## only format, lint, and types of packages and tools
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m basedpyright --pythonpath $(RUN)

format: .venv/.ready  ## rewrite the source in the house's format
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

faults: .venv/.ready  ## long campaigns: kills, damage, offline installs [FAULTS_MINUTES=15: cut off what takes longer]
	@FAULTS_MINUTES="$(FAULTS_MINUTES)" $(RUN) -m pytest -m fault -v

soak: .venv/.ready  ## 2 hours of training with 20 kills, beside the same run undisturbed, in soak/; goes on where it stopped [HOURS=2] [KILLS=20] [MINUTES=of this time]
	@$(RUN) tools/soak.py $(if $(HOURS),--hours $(HOURS)) $(if $(KILLS),--kills $(KILLS)) $(if $(MINUTES),--minutes $(MINUTES))

learn: .venv/.ready  ## is anything learnt on the phantom: 3 seeds, with and without each loss term, in learn/; goes on where it stopped [MINUTES=of this time]
	@$(RUN) tools/learn.py $(if $(MINUTES),--minutes $(MINUTES))

bench: .venv/.ready  ## a fixed run whose losses must be the kept ones, and a short set of all benchmarks, against the baseline of such machines, in bench/ [FULL=1: all rounds] [DATA="folders of DICOM"] [PEERS=python with benchmarks/peers.txt]
	@$(RUN) benchmarks/fixed_run.py $(BENCH_QUICK)
	@$(RUN) benchmarks/codec.py $(BENCH_DATA) $(BENCH_PEERS) $(BENCH_QUICK)
	@$(RUN) benchmarks/pack.py speed $(BENCH_DATA) $(BENCH_PEERS) $(BENCH_QUICK)
	@$(RUN) benchmarks/pack.py parsing $(BENCH_DATA) $(BENCH_QUICK)
	@$(RUN) benchmarks/pack.py scale $(BENCH_QUICK)
	@$(RUN) benchmarks/loader.py $(BENCH_DATA) $(BENCH_PEERS) $(BENCH_QUICK)
	@$(RUN) benchmarks/views.py $(BENCH_DATA) $(BENCH_QUICK)
	@$(RUN) benchmarks/optimizer.py $(BENCH_QUICK)
	@$(RUN) benchmarks/model.py $(BENCH_QUICK)
	@$(RUN) benchmarks/train_step.py $(BENCH_QUICK)
	@$(RUN) benchmarks/kernels.py $(BENCH_QUICK)
	@$(RUN) benchmarks/baseline.py check bench

knee: .venv/.ready  ## the settings that suit this machine, measured in under ten minutes, in knee/ [SHARDS=packed set] [CONFIG=configs/demo.yaml] [MINUTES=8]
	@$(RUN) benchmarks/knee.py $(if $(SHARDS),--shards "$(SHARDS)") --config "$(if $(CONFIG),$(CONFIG),configs/demo.yaml)" --output knee --minutes $(if $(MINUTES),$(MINUTES),8)

wheels: .venv/.ready  ## collect in wheels/ an install for a machine without internet
	@$(RUN) tools/collect_wheels.py

clean:  ## remove .venv, build outputs and caches; bench/, demo/, knee/, learn/, runs/, soak/ and wheels/ stay
	rm -rf .venv build dist ./*.egg-info dinox_io/*.so .pytest_cache .ruff_cache .hypothesis
	find dinox_io dinox_model dinox_train tools benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
