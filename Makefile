# make demo       the whole method on the miniature world: about 3 minutes on 2 cores after the install
# make test       the theorems, the traps, the commands: under 6 minutes on 2 cores
# make test-all   the slow proofs as well: under 25 minutes
# make lint       ruff
# The first call makes .venv and installs the pinned requirements into it.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all lint clean
test test-all: export OMP_NUM_THREADS = 1  # two workers on two cores; threads that wait for each other would make them ten times slower

demo: $(VENV)/core
	$(BIN)/python paper/miniature.py demo

test: $(VENV)/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-all: $(VENV)/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lint: $(VENV)/test
	$(BIN)/ruff check .

$(VENV)/core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test: $(VENV)/core requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) runs
