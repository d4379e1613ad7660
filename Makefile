# make demo    the starter tokenizer on images it never saw, then both training stages for a few minutes
# make test    the whole test suite
# make quality formatting and lint
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= demo
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test quality install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt tests/gradio.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[training,evaluation,test,quality]"
	# References for our metrics. Without their dependencies: they ask for torchvision, which nothing here needs.
	$(BIN)/python -m pip install --quiet --no-deps lpips==0.1.4 torch-fidelity==0.4.0
	# Gradio asks for pillow below 13 and runs with it; so it too comes without its dependencies.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement tests/gradio.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gradio
	touch $@

demo: install
	$(BIN)/python training/demo.py --output_dir $(DEMO_DIR) $(if $(FROM_SCRATCH),--from_scratch)

test: install
	$(BIN)/python -m pytest

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO_DIR) build *.egg-info src/*.egg-info
