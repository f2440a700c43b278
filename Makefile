# The two commands of a newcomer are `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
# Two processes, a file of tests at a time, in their order: tests wait more than they compute.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Likewise, the files of most tests first: what a file shares is made once, and none of the dearest begins last, alone.
# Of all test files to import them takes each process 25 seconds of CPU, so those are named that have such a test.
WHOLE  := $(BIN)/python -m pytest -n 2 --dist loadfile

export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo install test test-faults test-long soak check audit format clean

demo: $(READY)  ## the whole path on the built-in corpus; prints where the report is
	$(BIN)/rescribe run demo --json

install: $(READY)

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@# A folder that is called as the clone is may lie where Python is started: the package comes before it.
	@echo "$(CURDIR)/workflows/python" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rescribe-source.pth
	touch $@

test: $(READY)  ## the suite; set RESCRIBE_CORPORA to a folder with nlvr/ and noto-emoji/ to use them too
	$(PYTEST)

test-faults: $(READY)  ## kills real processes
	$(WHOLE) -m faults $$(grep -rl --include='test_*.py' 'mark\.faults' tests)

test-long: $(READY)  ## what takes minutes: the whole path, killed, on two machines; every command of README and docs
	$(WHOLE) -m long $$(grep -rl --include='test_*.py' 'mark\.long' tests)

soak: $(READY)  ## half an hour of random faults under one training
	$(BIN)/python -m benchmarks.soak_training --minutes 30

check: $(READY)  ## format, lint, types, known vulnerabilities
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python tests/audit.py requirements.lock

audit: $(READY)  ## known vulnerabilities of what is pinned; "not audited" where PyPI cannot be asked
	$(BIN)/python tests/audit.py requirements.lock

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
