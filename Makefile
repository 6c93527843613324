# make demo: a virtual environment, Fashion-MNIST, a pretraining run of about five minutes on two cores, its scores.
# make test: a virtual environment, lint, types, tests.
# make torture: faults by the hundred, about an hour on two cores; fills the table of docs/reliability.md. It can be
# interrupted and repeated: what TORTURE_LOG has is not tried again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN ?= runs/demo
TORTURE_LOG ?= runs/torture/log.jsonl
# Processes that run tests, each with two to four GB of memory: more of them need a machine that has it.
TEST_JOBS ?= 2

.PHONY: demo test torture lint types unit install data clean

demo: install data
	$(BIN)/python pretrain.py --config configs/pretrain/demo.yaml run=$(RUN)
	$(BIN)/python -m mae_et evaluate $(RUN)

test: install lint types unit

torture: install
	$(BIN)/python -m tests.torture --log $(TORTURE_LOG); held=$$?; \
	$(BIN)/python -m tests.torture.table $(TORTURE_LOG) && exit $$held

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/pyright

unit: data
	$(BIN)/python -m pytest --numprocesses=$(TEST_JOBS) --dist=loadfile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV) || { echo "python3 has no venv module here; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Debian and Ubuntu package Fashion-MNIST; only root may install it, and nothing here asks for more rights than it has.
# Elsewhere the first run downloads the same files.
data:
	@if [ ! -d /usr/share/datasets/fashion-mnist ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get install --yes --quiet dataset-fashion-mnist >/dev/null 2>&1 \
		|| { apt-get update --quiet >/dev/null 2>&1 \
		     && apt-get install --yes --quiet dataset-fashion-mnist >/dev/null 2>&1; } \
		|| echo "dataset-fashion-mnist could not be installed; the first run will download Fashion-MNIST"; \
	fi

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
