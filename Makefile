# Every target sets up what it needs in .venv first. `make help` lists them.
VENV := .venv
BIN := $(VENV)/bin
# The compilers of the chips have an environment of their own: where they are installed, JAX looks for the chips.
COMPILERS := .venv-compilers
PYTEST_FLAGS ?= -n 2

.PHONY: help demo test test-slow lint types certify certificates bench docs clean
help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile

demo: $(VENV)/installed  ## train a small language model on 8 virtual devices, beside the same model in plain Flax
	$(BIN)/python examples/train_gpt.py --demo

test: $(VENV)/installed  ## the test suite without its slow cases
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"

test-slow: $(VENV)/installed  ## the slow cases: further kernels in the interpreters, all transforms of each operator
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m slow

lint: $(VENV)/installed  ## style and imports
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/installed  ## static types
	$(BIN)/mypy

certify: $(COMPILERS)/installed  ## compile what changed for every chip and compare with docs/certificates.json
	$(COMPILERS)/bin/jaxops certify --check

certificates: $(COMPILERS)/installed  ## the same, and write docs/certificates.{md,json}
	$(COMPILERS)/bin/jaxops certify

bench: $(VENV)/installed  ## time the operators against JAX's and Flax's own on this machine
	$(BIN)/python -m benchmarks

docs: $(VENV)/installed  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove everything that was generated
	rm -rf $(VENV) $(COMPILERS) build dist site out *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Of all that is installed Python compiles what is imported, when it is: --no-compile.
$(VENV)/installed: pyproject.toml constraints.txt
	@sh tools/create_venv.sh $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[cli,data,test,docs]'
	@touch $@

$(COMPILERS)/installed: pyproject.toml constraints.txt
	@sh tools/create_venv.sh $(COMPILERS)
	$(COMPILERS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[cli,verify,tpu-compile,gpu-compile]'
	@touch $@
