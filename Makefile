PYTHON ?= python3

.PHONY: check test gpu-test gpu-sanitize bench
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

gpu-sanitize:     ## memory and race checks of the kernels (compute-sanitizer comes with the CUDA toolkit)
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PYTHON) scripts/sanitize_kernels.py || exit 1; done
