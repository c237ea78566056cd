PYTHON ?= python3.11
PYTEST ?= -m pytest -n 2 --dist loadfile

.PHONY: help test test-all quality style clean

help:
	@echo "make test      quick tests on transformers 5, in an environment that it creates"
	@echo "make test-all  every test on transformers 4.57 and on 5"
	@echo "make quality   lint and formatting"
	@echo "make style     repair what make quality finds, where ruff can"
	@echo "make clean     remove environments and caches"

# One environment for each supported line of transformers: .venv-4 and .venv-5.
.venv-%/installed: constraints-%.txt requirements.txt requirements-tabletop.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint constraints-$*.txt torch
	.venv-$*/bin/python -m pip install --quiet --constraint constraints-$*.txt --requirement requirements-dev.txt
	touch $@

test: .venv-5/installed
	.venv-5/bin/python $(PYTEST) -m "not slow"

test-all: .venv-4/installed .venv-5/installed quality
	OTHER_PYTHON=$(CURDIR)/.venv-5/bin/python .venv-4/bin/python $(PYTEST)
	OTHER_PYTHON=$(CURDIR)/.venv-4/bin/python .venv-5/bin/python $(PYTEST)

quality: .venv-5/installed
	.venv-5/bin/ruff check .
	.venv-5/bin/ruff format --check .

style: .venv-5/installed
	.venv-5/bin/ruff check --fix .
	.venv-5/bin/ruff format .

clean:
	rm -rf .venv-4 .venv-5 .pytest_cache .ruff_cache .hypothesis
