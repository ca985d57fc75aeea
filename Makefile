PYTHON ?= python3

.PHONY: check test gpu-test bench
check:            ## lint and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:             ## everything that runs without a GPU
	$(PYTHON) -m pytest -q -m "not gpu" -n 2

gpu-test:         ## needs a CUDA GPU; works from a plain checkout with no network
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e .
	$(PYTHON) -m pytest -q -m gpu -n 4

bench:            ## writes benchmarks/results/*.json
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e .
	$(PYTHON) benchmarks/line_scan.py --quick
