# Everything works in a fresh clone; it needs Python 3.10 or newer, and make.
PYTHON ?= python3
MINUTES ?= 10
# Tests in parallel: most of them wait most of the time. Each needs up to 3 GB of memory for its TorchServe.
WORKERS ?= 4

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif

.PHONY: demo cluster test test-unit lint bench soak video diagrams options clean
.DELETE_ON_ERROR:

demo: .venv/server  ## both recipes on the sample clip
	$(BIN)/python -m demo

cluster: .venv/server  ## two TorchServe nodes behind nginx, and four cameras; needs nginx
	$(BIN)/python -m demo --cluster

test: test-unit  ## all tests, the others against a real TorchServe
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not alone" tests/integration tests/resilience
	$(BIN)/python -m pytest -m alone tests/integration tests/resilience

test-unit: .venv/dev  ## the tests that start no server and no process
	$(BIN)/python -m pytest -n 2 tests/unit

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/bench  ## benchmarks/README.md anew; 42 minutes on 2 cores, and 12 GB of memory
	$(BIN)/python -m benchmarks.run

soak: .venv/dev  ## four cameras and a fault every 20 seconds: make soak MINUTES=10
	$(BIN)/python -m tests.resilience.soak --minutes $(MINUTES)

video: .venv/dev  ## data/sample_video.mp4 anew
	$(BIN)/python data/make_sample_video.py

diagrams: .venv/dev  ## architecture/*.png anew
	$(BIN)/python architecture/render.py

options: .venv/dev  ## docs/options.md anew
	$(BIN)/python -m docs.make_options

clean:
	rm -rf .venv

# .venv/server has the packages of the edge device and of the server; .venv/dev adds the packages for developers, and
# .venv/bench those of the benchmark.
.venv/server: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "installing into .venv: PyTorch is large, the first time takes minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '.[server]'
	touch $@

.venv/dev: .venv/server
	$(BIN)/python -m pip install --quiet '.[server,openvino,dev]'
	touch $@

.venv/bench: .venv/server
	$(BIN)/python -m pip install --quiet '.[server,openvino,bench]'
	touch $@
