# `make demo` and `make test` work from a fresh clone with Python 3.11 to 3.13, git and make. They
# install into .venv-a and .venv-b inside the checkout; a second run installs nothing.
#
#   PYTHON=python3.12      another interpreter
#   TORCH_INDEX=URL        where pip takes torch from, for instance an index of CPU or CUDA builds
#   JOBS=4                 test processes, one thread each
#   ARGS="-k calibration"  further arguments of pytest, or overrides of `make demo`

PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= 2
ARGS ?=

# Backends of the two families of environments that cannot share an e3nn (docs/decisions.md).
BACKENDS_a := chgnet,mace,lora
BACKENDS_b := sevennet,chgnet,fairchem,lora$(shell $(PYTHON) -c 'import sys; sys.version_info < (3, 13) and print(",orb")')
EXTRAS_a := $(BACKENDS_a),test
EXTRAS_b := $(BACKENDS_b),test,lint

# what touches no vendor's code is tested once, in b
SELECT_a := not outside_data and not common
SELECT_b := not outside_data

PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-$(1)/bin/python -m pytest -n $(JOBS) --dist loadscope

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-a test-b test-gpu test-data data-given lint docs venv-a venv-b clean

help:
	@echo "make demo            fine-tune SevenNet-0 on SiO2, print the comparison, write runs/demo/"
	@echo "make test            every test that needs only shipped data; in b all, in a those of its backends"
	@echo "make test-gpu        the tests that compare a GPU with the CPU; needs a CUDA build of torch"
	@echo "make test-data DATA=DIR   the tests on outside data sets in DIR"
	@echo "make lint            ruff and mypy"
	@echo "make docs            write docs/recipes.md from the recipe's schema"
	@echo "make clean           remove the environments and caches (runs/ stays)"

demo: venv-b
	.venv-b/bin/python -m blip_ft.cli fit sio2_sevennet name=demo overwrite=true $(ARGS)

test: test-b test-a

# A backend that BLIP_FT_BACKENDS names and that cannot be imported is a failure, never a skip.
test-a test-b: test-%: venv-%
	BLIP_FT_BACKENDS=$(BACKENDS_$*) $(call PYTEST,$*) -m "$(SELECT_$*)" $(ARGS)

# one process: several would share the device, and its peak memory is reported
test-gpu: venv-b
	BLIP_FT_BACKENDS=$(BACKENDS_b) .venv-b/bin/python -m pytest -m gpu $(ARGS)

test-data: data-given venv-b
	BLIP_FT_BACKENDS=$(BACKENDS_b) BLIP_FT_DATA="$(abspath $(DATA))" $(call PYTEST,b) -m outside_data $(ARGS)

data-given:
	@test -n "$(DATA)" || { echo "say where the data sets lie: make test-data DATA=DIR"; exit 2; }
	@test -d "$(DATA)" || { echo "there is no folder '$(DATA)'"; exit 2; }

lint: venv-b
	.venv-b/bin/ruff check .
	.venv-b/bin/ruff format --check .
	.venv-b/bin/mypy

docs: venv-b
	.venv-b/bin/python docs/generate_recipes.py

venv-a venv-b: venv-%: .venv-%/.installed

# torch comes first and alone: its index may lack everything else, and pip then keeps this build.
.venv-%/.installed: constraints/%.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "Python 3.11 to 3.13 is needed, this is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12"; exit 2; }
	test -x .venv-$*/bin/pip || $(PYTHON) -m venv --clear .venv-$*
	@echo "installing environment $* ($(EXTRAS_$*)): some minutes the first time"
	.venv-$*/bin/python -m pip install -q --disable-pip-version-check \
	    $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep ^torch== constraints/$*.txt)"
	.venv-$*/bin/python -m pip install -q --disable-pip-version-check -c constraints/$*.txt -e ".[$(EXTRAS_$*)]"
	@rm -rf blip_ft.egg-info # left over from the build; it would hide later changes of the entry points
	@touch $@

clean:
	rm -rf .venv-a .venv-b build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis blip_ft.egg-info
