# make demo    the starter tokenizer on images it never saw, then both training stages for a few minutes
# make test    the whole test suite
# make docs    the documentation as a site, in site/
# make quality formatting and lint
# make audit   known vulnerabilities of the pinned versions; needs the network
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= demo
SITE_DIR ?= site
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test docs quality audit install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[training,evaluation,test,quality]"
	# References for our metrics. Without their dependencies: they ask for torchvision, which nothing here needs.
	$(BIN)/python -m pip install --quiet --no-deps lpips==0.1.4 torch-fidelity==0.4.0
	touch $@

demo: install
	$(BIN)/python training/demo.py --output_dir $(DEMO_DIR) $(if $(FROM_SCRATCH),--from_scratch)

# The tests of one file stay in one process, where some share what they have built. A process takes up to 2 GB.
test: install
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Strict: a broken link, a page that is in no menu or a name that does not exist is an error. Needs Python >= 3.11.
docs: install
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx --quiet --fail-on-warning --doctree-dir build/doctrees docs $(SITE_DIR)

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# In an environment of its own: it is no dependency.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --disable-pip --no-deps --requirement constraints.txt

clean:
	rm -rf $(VENV) $(VENV)-audit $(DEMO_DIR) $(SITE_DIR) docs/api/generated build *.egg-info src/*.egg-info
