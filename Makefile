PYTHON ?= python3.11
PYTEST ?= -m pytest -n 2 --dist loadfile --durations 15

.PHONY: help demo test test-all quality style clean

help:
	@echo "make demo      the policy of this repository at work, in an environment that it creates"
	@echo "make test      quick tests on transformers 5, in an environment that it creates"
	@echo "make test-all  every test on transformers 4.57 and on 5"
	@echo "make quality   lint and formatting"
	@echo "make style     repair what make quality finds, where ruff can"
	@echo "make clean     remove environments and caches"
	@echo "make bench-robosuite, make bench-libero"
	@echo "               tests of the evaluator with these simulators, each in an environment of its own"

# What the demo needs and no more.
.venv-demo/installed: constraints-5.txt requirements.txt requirements-evaluation.txt requirements-data.txt requirements-tabletop.txt
	@echo "Creating an environment in .venv-demo; PyTorch and its companions take a few minutes to arrive"
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --constraint constraints-5.txt torch
	.venv-demo/bin/python -m pip install --quiet --constraint constraints-5.txt --requirement requirements.txt --requirement requirements-evaluation.txt
	touch $@

demo: .venv-demo/installed
	.venv-demo/bin/python tools/demo.py --output_dir demo

# One environment for each supported line of transformers: .venv-4 and .venv-5.
.venv-%/installed: constraints-%.txt $(wildcard requirements*.txt)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint constraints-$*.txt torch
	.venv-$*/bin/python -m pip install --quiet --constraint constraints-$*.txt --requirement requirements-dev.txt
	touch $@

# PyTorch's threads spin while they wait: with several processes, one for each.
test test-all: export OMP_NUM_THREADS ?= 1

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
	rm -rf demo .venv-demo .venv-4 .venv-5 .venv-robosuite .venv-libero .pytest_cache .ruff_cache .hypothesis

# Benchmarks whose pins conflict with those above have environments of their own: .venv-robosuite and .venv-libero.
MUJOCO_GL ?= osmesa
LIBERO_CONFIG_PATH ?= $(CURDIR)/.venv-libero/configuration
RUN_BENCHMARK = -m pytest tests/test_benchmark_adapters.py

.PHONY: bench-robosuite bench-libero

bench-robosuite: .venv-robosuite/installed
	MUJOCO_GL=$(MUJOCO_GL) .venv-robosuite/bin/python $(RUN_BENCHMARK)

# LIBERO asks a question when it is first imported: whether its datasets go elsewhere. They are not used.
bench-libero: .venv-libero/installed
	echo N | LIBERO_CONFIG_PATH=$(LIBERO_CONFIG_PATH) .venv-libero/bin/python -c "import libero.libero" > /dev/null
	MUJOCO_GL=$(MUJOCO_GL) LIBERO_CONFIG_PATH=$(LIBERO_CONFIG_PATH) .venv-libero/bin/python $(RUN_BENCHMARK)

.venv-robosuite/installed: constraints-5.txt
.venv-libero/installed: constraints-4.txt

# Without torchvision, which LIBERO's requirements bring and nothing here uses: a build of it for another torch than the
# installed one makes transformers fail.
.venv-robosuite/installed .venv-libero/installed: .venv-%/installed: requirements-%.txt requirements.txt requirements-evaluation.txt
	$(PYTHON) -m venv .venv-$*
	grep --no-filename --invert-match mujoco $(filter constraints-%,$^) > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt torch
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --requirement requirements-$*.txt
	.venv-$*/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@
