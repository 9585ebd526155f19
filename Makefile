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

# In parallel all but what holds a real server to a time: that wants the cores to itself. A worker more than there are
# cores, since some tests wait. No test is run twice. The status is kept for .ci/run: 1 is that of tests that failed, more
# that of a run that did not come to its end; make's own says less. test-long has the trials of many seconds: replicas, Ray,
# fuzzers, kills.
test: SOME := not long
test-long: SOME := long
test test-long: $(VENV)/.installed-test
	status=0 alone=0; \
	$(BIN)/pytest -n $$(($$(nproc) + 1)) --dist worksteal -m "$(SOME) and not alone" || status=$$?; \
	$(BIN)/pytest -m "$(SOME) and alone" tests/e2e || alone=$$?; \
	[ $$alone -eq 5 ] || status=$$((status | alone)); \
	echo $$status >$(VENV)/.test-status; exit $$status

test-all: test test-long

# For the inner loop: no real servers, nothing slow.
test-fast: $(VENV)/.installed-test
	$(BIN)/pytest -n auto --dist worksteal --ignore tests/e2e -m "not slow and not long"

# Of branches too, by the tests that mirror the code. Nothing would be seen of real servers, which are processes of their own.
# Whether a test fails is for `make test` to say.
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

# Known vulnerabilities of what the image is built with. Where the database cannot be reached it says so, and goes on.
audit: $(VENV)/.installed-test
	$(BIN)/python docker/audit.py

# The newest releases that pyproject.toml allows. TORCH_INDEX=… renews torch's build for CPUs too.
lock: $(VENV)/.installed-test
	docker/lock

# Of what is installed in .venv. The image's own is made with it and is in it.
sbom: $(VENV)/.installed-test
	PATH="$(BIN):$$PATH" docker/sbom $(BIN)/python build/tminus.cdx.json

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

client:
	$(PYTHON) tests/unasync.py

# The documentation as a site, to be read offline: open site/index.html. Its links and anchors are checked.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m docs.site

# Both wheels and the archives of checkpoints.
dist: $(VENV)/.installed-test
	$(BIN)/python -m tests.release

# The checklist of a release, up to the tag. Nothing is published.
release: $(VENV)/.installed-test
	.ci/release

train: $(VENV)/.installed
	$(BIN)/tminus train --data fashion-mnist --out runs/fashion-mnist-32

evaluate: $(VENV)/.installed
	$(BIN)/tminus evaluate --checkpoint $(CHECKPOINT) --sampler dpmpp_2m --steps 20

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench

# The figures of bench/results/ into the pages; lists the files that are older than the code that they speak of.
figures: $(VENV)/.installed-bench
	$(BIN)/python -m bench.pages

# On a machine with a card, ten minutes and what the installation takes. DEVICE=cpu tries the bench without one.
gpu: $(VENV)/.installed-gpu
	$(BIN)/python -m bench.gpu --device $(DEVICE) --check
	$(BIN)/pytest -m gpu tests/service/engine
	$(BIN)/python -m bench.gpu --device $(DEVICE)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml client/pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[openvino]' --editable ./client
	@touch $@

$(VENV)/.installed-test: pyproject.toml client/pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[test]' --editable ./client
	$(BIN)/pip install --quiet --no-deps 'adaptive-terrain-diffusion==0.4.2' # its weights, not onnxruntime-gpu
	if command -v npm >/dev/null; then npm install --silent --no-save --prefix $(VENV) 'openai@>=6'; fi # for tests/e2e/node
	@touch $@ $(VENV)/.installed

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
