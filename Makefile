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
BACKENDS_a := chgnet,mace,lora,phonopy
BACKENDS_b := sevennet,chgnet,fairchem,diep,lora,lammps,phonopy,torchsim$(shell $(PYTHON) -c 'import sys; sys.version_info < (3, 13) and print(",orb")')
EXTRAS_a := $(BACKENDS_a),test
EXTRAS_b := $(BACKENDS_b),test,lint

# Every test belongs to a ring (tests/conftest.py): `quick`, what `default` adds, what `full` adds. What touches no
# vendor's code, `common`, is the same in both environments: tested in one of them, `common_a` or `common_b`.
RING_test := (quick or default)
RING_full := not outside_data
SELECT = $(RING_$(1)) and (common_$(2) or not common)

PIP = .venv-$*/bin/python -m pip install -q --disable-pip-version-check
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-$(1)/bin/python -m pytest -n $(JOBS) --dist worksteal --durations=40

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-a test-b test-quick test-full test-full-a test-full-b test-gpu test-data data-given
.PHONY: release-check test-lowest lint docs venv-a venv-b environments clean

help:
	@echo "make demo            fine-tune SevenNet-0 on SiO2, print the comparison, write runs/demo/"
	@echo "make test            what has to pass before a change lands, in both environments"
	@echo "make test-quick      the part of it that needs no vendor's package, in one environment"
	@echo "make test-full       every test that needs only shipped data: before a release, after a change of adapters"
	@echo "make test-gpu        the tests that compare a GPU with the CPU; needs a CUDA build of torch"
	@echo "make test-data DATA=DIR   the tests on outside data sets in DIR"
	@echo "make lint            ruff and mypy"
	@echo "make test-lowest     the quick tests with the lowest allowed versions"
	@echo "make release-check   build, check and install the wheel, before a tag"
	@echo "make docs            write docs/recipes.md from the recipe's schema"
	@echo "make clean           remove the environments and caches (runs/ stays)"

demo: venv-b
	.venv-b/bin/python -m blip_ft.cli fit sio2_sevennet name=demo overwrite=true $(ARGS)

# Both families at the same time, each with half of the processes. What family a says comes in one piece at the end.
test test-full: environments
	@if [ $(JOBS) -lt 2 ]; then $(MAKE) $@-b && $(MAKE) $@-a; exit; fi; \
	half=$$(($(JOBS) / 2)); log=$$(mktemp); \
	$(MAKE) $@-a JOBS=$$half > $$log 2>&1 & other=$$!; \
	trap 'kill $$other 2> /dev/null; rm -f $$log; exit 130' INT TERM; \
	echo "family b (that of a runs beside it and is shown when both have ended):"; \
	$(MAKE) $@-b JOBS=$$(($(JOBS) - half)); b=$$?; \
	wait $$other; a=$$?; \
	echo "family a:"; cat $$log; rm -f $$log; \
	test $$a -eq 0 && test $$b -eq 0

# A backend that BLIP_FT_BACKENDS names and that cannot be imported is a failure, never a skip.
test-a test-b: test-%: venv-%
	BLIP_FT_BACKENDS=$(BACKENDS_$*) $(call PYTEST,$*) -m "$(call SELECT,test,$*)" $(ARGS)

test-full-a test-full-b: test-full-%: venv-%
	BLIP_FT_BACKENDS=$(BACKENDS_$*) $(call PYTEST,$*) -m "$(call SELECT,full,$*)" --hypothesis-profile=full $(ARGS)

test-quick: venv-b
	BLIP_FT_BACKENDS= $(call PYTEST,b) -m quick $(ARGS)

# one process: several would share the device, and its peak memory is reported
test-gpu: venv-b
	BLIP_FT_BACKENDS=$(BACKENDS_b) .venv-b/bin/python -m pytest -m gpu $(ARGS)

test-data: data-given venv-b
	BLIP_FT_BACKENDS=$(BACKENDS_b) BLIP_FT_DATA="$(abspath $(DATA))" $(call PYTEST,b) -m outside_data $(ARGS)

data-given:
	@test -n "$(DATA)" || { echo "say where the data sets lie: make test-data DATA=DIR"; exit 2; }
	@test -d "$(DATA)" || { echo "there is no folder '$(DATA)'"; exit 2; }

# before a tag: the built wheel passes, opens in an environment that has nothing else, and knows its version
release-check: .venv-release/.installed
	rm -rf dist build && .venv-release/bin/python -m build --outdir dist .
	.venv-release/bin/twine check --strict dist/*
	version=$$(.venv-release/bin/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])'); \
	grep -q "^## \[$$version\]" CHANGELOG.md || { echo "CHANGELOG.md has no section $$version"; exit 2; }; \
	grep -q "^version: $$version$$" CITATION.cff || { echo "CITATION.cff is of another version"; exit 2; }; \
	rm -rf .venv-release/empty && $(PYTHON) -m venv .venv-release/empty && \
	.venv-release/empty/bin/pip install -q --disable-pip-version-check "$$(grep ^torch== constraints/b.txt)" && \
	.venv-release/empty/bin/pip install -q --disable-pip-version-check -c constraints/b.txt dist/blip_ft-$$version-*.whl && \
	cd .venv-release && empty/bin/blip-finetune --version | grep -F "$$version" && empty/bin/blip-finetune recipes && \
	empty/bin/blip-finetune doctor

.venv-release/.installed: pyproject.toml
	test -x .venv-release/bin/pip || $(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip install -q --disable-pip-version-check "build>=1.2" "twine>=6"
	@touch $@

# the lowest versions that pyproject.toml allows, without a backend
test-lowest: .venv-lowest/.installed
	BLIP_FT_BACKENDS= $(call PYTEST,lowest) -m quick $(ARGS)

.venv-lowest/.installed: pyproject.toml constraints/lowest.txt
	test -x .venv-lowest/bin/pip || $(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep ^torch== constraints/lowest.txt)"
	.venv-lowest/bin/python -m pip install -q --disable-pip-version-check -c constraints/lowest.txt -e ".[test]"
	@rm -rf blip_ft.egg-info
	@touch $@

lint: venv-b
	.venv-b/bin/ruff check .
	.venv-b/bin/ruff format --check .
	.venv-b/bin/mypy

docs: venv-b
	.venv-b/bin/python docs/generate_recipes.py

venv-a venv-b: venv-%: .venv-%/.installed

# Both families install their packages at the same time; torch, the largest, is fetched once before.
environments: .venv-b/.torch
	@$(MAKE) .venv-a/.packages & a=$$!; $(MAKE) .venv-b/.packages; b=$$?; wait $$a && exit $$b
	@$(MAKE) venv-b venv-a

# torch comes first and alone: its index may lack everything else, and pip then keeps this build.
.venv-a/.torch .venv-b/.torch: .venv-%/.torch: constraints/%.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "Python 3.11 to 3.13 is needed, this is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12"; exit 2; }
	test -x .venv-$*/bin/pip || $(PYTHON) -m venv --clear .venv-$*
	@echo "installing environment $* ($(EXTRAS_$*)): some minutes the first time"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep ^torch== constraints/$*.txt)"
	@touch $@

# The packages without the project: two installations at once would meet in its blip_ft.egg-info.
.venv-a/.packages .venv-b/.packages: .venv-%/.packages: .venv-%/.torch pyproject.toml
	.venv-$*/bin/python -c "$$REQUIREMENTS" $(EXTRAS_$*) > .venv-$*/requirements.txt
	$(PIP) -c constraints/$*.txt -r .venv-$*/requirements.txt
	@touch $@

.venv-a/.installed .venv-b/.installed: .venv-%/.installed: .venv-%/.packages
	$(PIP) -c constraints/$*.txt -e ".[$(EXTRAS_$*)]"
	@rm -rf blip_ft.egg-info # left over from the build; it would hide later changes of the entry points
	@touch $@

# dependencies of pyproject.toml, and of the extras that are given
define REQUIREMENTS
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = sys.argv[1].split(",")
print(*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e]), sep="\n")
endef
export REQUIREMENTS

clean:
	rm -rf .venv-a .venv-b .venv-lowest .venv-release build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis blip_ft.egg-info
