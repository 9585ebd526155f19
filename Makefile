# Each verb installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHECKPOINT ?= checkpoints/fashion-mnist-32
PORT ?= 8000
DEVICE ?= cuda

.PHONY: serve test test-long test-all test-fast coverage lint audit lock sbom format client docs dist release train evaluate bench figures gpu clean

serve: $(VENV)/.installed
	$(BIN)/tminus serve --checkpoint $(CHECKPOINT) --port $(PORT)

# Tests run in parallel, with one worker more than there are cores, since some tests wait. Those that hold a real server to
# a time run after them, alone. .ci/run reads the status: 1 means that tests failed, more that the run did not finish.
# test-long runs the trials of many seconds: replicas, Ray, fuzzers, kills.
test: SOME := not long
test-long: SOME := long
test test-long: $(VENV)/.installed-test
	status=0 alone=0; \
	$(BIN)/pytest -n $$(($$(nproc) + 1)) --dist worksteal -m "$(SOME) and not alone" || status=$$?; \
	$(BIN)/pytest -m "$(SOME) and alone" tests/e2e || alone=$$?; \
	[ $$alone -eq 5 ] || status=$$((status | alone)); \
	echo $$status >$(VENV)/.test-status; exit $$status

test-all: test test-long

# For the inner loop: starts no real server, and leaves out what is slow.
test-fast: $(VENV)/.installed-test
	$(BIN)/pytest -n auto --dist worksteal --ignore tests/e2e -m "not slow and not long"

# Measures lines and branches by the tests that mirror the code: real servers are processes of their own, which it cannot see.
# `make test` says whether a test fails.
COVER = $(BIN)/pytest -n auto --dist worksteal --cov --cov-append --cov-report= --cov-fail-under=0
coverage: $(VENV)/.installed-test
	$(BIN)/coverage erase
	$(COVER) -m "not long" tests/model tests/service || [ $$? -eq 1 ]
	$(BIN)/coverage report --skip-covered

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run .ci/release docker/lock docker/sbom docker/smoke

# Looks up known vulnerabilities of the image's packages. If the database is out of reach, it says so and ends with 0.
audit: $(VENV)/.installed-test
	$(BIN)/python docker/audit.py

# Locks the newest releases that pyproject.toml allows. TORCH_INDEX=… renews torch's build for CPUs too.
lock: $(VENV)/.installed-test
	docker/lock

# Writes the bill of materials of .venv. The image has one of its own inside.
sbom: $(VENV)/.installed-test
	PATH="$(BIN):$$PATH" docker/sbom $(BIN)/python build/tminus.cdx.json

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

client:
	$(PYTHON) tests/unasync.py

# Renews docs/reference/ from the code, builds the documentation as a site that can be read offline (open site/index.html), and
# checks its links and anchors.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m docs.site

# Makes both wheels and the archives of checkpoints.
dist: $(VENV)/.installed-test
	$(BIN)/python -m tests.release

# Runs the checklist of a release up to the tag. It publishes nothing.
release: $(VENV)/.installed-test
	.ci/release

train: $(VENV)/.installed
	$(BIN)/tminus train --data fashion-mnist --out runs/fashion-mnist-32

evaluate: $(VENV)/.installed
	$(BIN)/tminus evaluate --checkpoint $(CHECKPOINT) --sampler dpmpp_2m --steps 20

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench

# Puts the figures of bench/results/ into the pages, and lists the files that are older than the code that they speak of.
figures: $(VENV)/.installed-bench
	$(BIN)/python -m bench.pages

# Tests and measures a GPU in ten minutes, after the installation. DEVICE=cpu tries the bench without a GPU.
gpu: $(VENV)/.installed-gpu
	$(BIN)/python -m bench.gpu --device $(DEVICE) --check
	$(BIN)/pytest -m gpu tests/service/engine
	$(BIN)/python -m bench.gpu --device $(DEVICE)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml client/pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[openvino,hub]' --editable ./client
	@touch $@

$(VENV)/.installed-test: pyproject.toml client/pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[test]' --editable ./client
	$(BIN)/pip install --quiet --no-deps 'adaptive-terrain-diffusion==0.4.2' # its weights, not onnxruntime-gpu
	if command -v npm >/dev/null; then npm install --silent --no-save --prefix $(VENV) 'openai@>=6'; fi # for tests/e2e/node
	@touch $@ $(VENV)/.installed $(VENV)/.installed-docs

$(VENV)/.installed-docs: pyproject.toml client/pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[docs]' --editable ./client
	@touch $@

$(VENV)/.installed-bench: pyproject.toml client/pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[bench]' --editable ./client
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-gpu: pyproject.toml client/pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[gpu]' --editable ./client
	@touch $@ $(VENV)/.installed $(VENV)/.installed-bench

clean:
	rm -rf $(VENV) build site client/build *.egg-info client/*.egg-info
