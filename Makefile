# make audit   set up, then audit squeezenet1_1 on imagenet_samples: out/audit-squeezenet1_1/report.html, .pdf, .json
# make test    set up, then run all tests; a bare `pytest -n 2` leaves out the slow ones
# make check   format, lint, types, generated docs
# make docs    write docs/techniques.md and docs/cli.md anew
# make bench   timings and peak memory as ratios; takes about ten minutes

PYTHON ?= python3
BIN := .venv/bin

.PHONY: audit test check docs bench clean

audit: .venv/ready
	$(BIN)/harness audit squeezenet1_1 -d imagenet_samples -o out/audit-squeezenet1_1 \
		-p 'class_visualization.classes=[flamingo, tarantula, dalmatian, ostrich]'

test: .venv/ready-dev
	$(BIN)/python -m pytest tests -m "" -n 2 --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

check: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: .venv/ready-dev
	$(BIN)/python docs/generate.py

bench: .venv/ready-dev
	$(BIN)/python bench/bench.py --memory

clean:
	rm -rf .venv out harness-runs

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[samples]'
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[samples,vgg,dev]'
	touch $@
