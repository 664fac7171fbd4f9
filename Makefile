# Every target sets up what it needs: a clean clone and Python 3.11 to 3.13 are enough.
PYTHON ?= python3
EXP ?= baseline
PORT ?= 5000
FMNIST := .venv/bin/fmnist
.DEFAULT_GOAL := help
.PHONY: help setup data run sweep show list ui serve compare report sync doctor test test-slow test-browser test-services check bench bench-step bench-gpu bench-scaling bench-record soak lock clean

help:  ## print the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## build .venv from requirements.lock, if it is not there yet
	@$(PYTHON) tools/bootstrap.py

data: setup  ## fetch and verify Fashion-MNIST
	@$(FMNIST) data

run: setup  ## train and record an experiment, or continue it: make run EXP=baseline SET="optimizer.lr=0.01 train.seed=3"; SEEDS=5 or 3,7,9; FRESH=1
	@$(FMNIST) run $(EXP) $(foreach field,$(SET),--set '$(field)') $(if $(SEEDS),--seeds '$(SEEDS)') $(if $(FRESH),--fresh)

sweep: setup  ## train what is missing of a sweep: make sweep EXP=sweep-lr JOBS=2
	@$(FMNIST) sweep $(EXP) $(if $(JOBS),--jobs $(JOBS))

show: setup  ## print what an experiment or a sweep would do: make show EXP=epochs-40
	@$(FMNIST) show $(EXP) $(foreach field,$(SET),--set '$(field)')

list: setup  ## list the experiments
	@$(FMNIST) list

ui: setup  ## MLflow on 127.0.0.1: make ui PORT=5000
	@$(FMNIST) ui --port $(PORT)

serve: PORT = 5001
serve: setup  ## the champion's predictions on 127.0.0.1: make serve PORT=5001
	@$(FMNIST) serve --port $(PORT)

compare: setup  ## compare settings with the first of them: make compare RUNS="holdout holdout-lr-0.01"
	@$(FMNIST) compare $(RUNS)

report: setup  ## reports/report.html: verdicts, curves, what changed; figures of every run; RUNS="holdout holdout-lr-0.01" for some
	@$(FMNIST) report $(RUNS)

sync: setup  ## carry runs that are only on disk into MLflow
	@$(FMNIST) sync

doctor: setup  ## look at environment, data, store and unfinished runs, and say what to do
	@$(FMNIST) doctor

test: data  ## the tests, some minutes
	@.venv/bin/pytest

test-slow: data  ## the tests that start servers, kill processes or damage stores
	@.venv/bin/pytest -m slow

test-browser: data  ## the tests of MLflow's pages and of the report in Debian's Chromium, which it installs where it may; screenshots in build/
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q chromium; } || \
		{ echo "chromium is missing; as root: apt-get install chromium" >&2; exit 2; }
	@.venv/bin/pytest -m browser

test-services: data .venv-services  ## sweeps and moves against MLflow on PostgreSQL and S3, and on a Ray cluster; installs Debian's PostgreSQL where it may; its own environment, 7 GB
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q postgresql; } || \
		{ echo "PostgreSQL is missing; as root: apt-get install postgresql" >&2; exit 2; }
	@.venv-services/bin/python -m pytest tests/test_services.py -m services -n 0

check: setup  ## lint, types, formatting, the JSON Schema of the experiments
	@.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy && .venv/bin/python tools/schema.py

bench: .venv-bench  ## the whole job by this package and by what one would use instead, side by side; half an hour or more
	@.venv-bench/bin/python benchmarks/whole_job.py

bench-step: .venv-bench  ## a step on one core beside autograd, compilation, JAX and its own matrix products; some minutes
	@.venv-bench/bin/python benchmarks/step.py

bench-gpu: data  ## on a CUDA device: its tests, the step and its kernels, whole runs, stacks, JAX on the same card; some minutes
	@PYTHONPATH=. .venv/bin/python benchmarks/gpu.py

bench-scaling: data  ## how cost grows with epochs, runs and workers; an hour
	@.venv/bin/python benchmarks/scaling.py

bench-record: data  ## what recording costs: a run beside the same with --no-sync
	@.venv/bin/python benchmarks/whole_run.py

.PHONY: .venv-bench .venv-services
.venv-services:
	@$(PYTHON) tools/bootstrap.py .venv-services requirements-services.lock

.venv-bench: data
	@$(PYTHON) tools/bootstrap.py .venv-bench requirements-bench.lock

soak: data  ## 300 kill -9s, restored and copied stores, flipped bits, outages, a crowd: every result compared; most of an hour (SHORT=1: minutes)
	@.venv/bin/python benchmarks/survival.py $(if $(SHORT),--kills 15 --per-phase 2 --harms 1)
	@.venv/bin/python benchmarks/outages.py $(if $(SHORT),--repeats 1 --set train.epochs=8)

lock: setup  ## compile the lock files anew from pyproject.toml (needs uv)
	@uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --extra dev pyproject.toml -o requirements.lock
	@uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 -c requirements.lock pyproject.toml benchmarks/requirements.in -o requirements-bench.lock
	@uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 -c requirements.lock --extra ray --extra server pyproject.toml tests/requirements-services.in -o requirements-services.lock

clean:  ## remove .venv and caches; never mlruns/ or data/
	@rm -f .venv/stamp .venv-bench/stamp .venv-services/stamp  # first: half an environment must not pass for whole
	@rm -rf .venv .venv.lock .venv-bench .venv-bench.lock .venv-services .venv-services.lock build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info && find . -name __pycache__ -not -path './data/*' -not -path './mlruns/*' -prune -exec rm -rf {} +
