# make demo        from nothing to a page of images made by a Decoupled Autoencoder and a Transformer prior
# make demo-joint  the same with the one-stage baseline
# make evidence    docs/evidence.md: the comparisons of the method with its baselines, under 45 minutes on 2 cores
# make test        lint and tests
# make test-processors  the tests of the operations again, on the code that torch has for older processors; .ci/run runs both
# make test-oldest the tests with the oldest versions that pyproject.toml allows (constraints-oldest.txt), in .venv-oldest
# make test-newest the tests with the newest versions on the index, in .venv-newest; each run asks the index
# Each works alone on a fresh machine with Python >= 3.11: it creates .venv, installs, runs. A second run needs no network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LAUNCH := $(BIN)/accelerate launch --config_file recipes/accelerate/one_process.yaml
DEMO := recipes/configs/digits.yaml

.PHONY: demo demo-joint evidence test test-processors test-oldest test-newest lint clean

# One thread, as `accelerate launch` sets it anyway: the result then does not depend on the number of cores.
demo demo-joint evidence: export OMP_NUM_THREADS := 1
demo: RUN := runs/demo
demo: OVERRIDES := output_dir=runs/demo
demo-joint: RUN := runs/demo-joint
demo-joint: OVERRIDES := output_dir=runs/demo-joint method=joint

demo demo-joint: $(INSTALLED)
	rm -rf $(RUN)
	$(LAUNCH) recipes/train_dae.py --config $(DEMO) $(OVERRIDES)
	$(LAUNCH) recipes/encode.py --config $(DEMO) $(OVERRIDES)
	$(LAUNCH) recipes/train_prior.py --config $(DEMO) $(OVERRIDES)
	$(BIN)/python recipes/sample.py --config $(DEMO) $(OVERRIDES)
	$(BIN)/python recipes/evaluate.py --config $(DEMO) $(OVERRIDES)
	$(BIN)/python recipes/report.py --config $(DEMO) $(OVERRIDES)

evidence: $(INSTALLED)
	$(BIN)/python recipes/evidence.py

PYTEST := -m pytest -n auto --dist loadscope -q
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# The environments of other versions are of their own. What was installed is printed first: a result without versions says nothing.
VERSIONS := import platform; from importlib.metadata import version
VERSIONS += ; print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in ("torch", "triton", "numpy", "accelerate")))
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -c '$(VERSIONS)'
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 .venv-oldest/bin/python $(PYTEST)

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -c constraints-oldest.txt -e ".[test]"
	touch $@

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --upgrade --upgrade-strategy eager -e ".[test]"
	.venv-newest/bin/python -c '$(VERSIONS)'
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 .venv-newest/bin/python $(PYTEST)

# torch chooses its code by the processor: `make test` ran that of this one, and these are the lesser ones. AVX-512 machines run all.
OLDER := import torch; kinds = ["DEFAULT", "AVX2", "AVX512"]; own = torch.backends.cpu.get_cpu_capability()
OLDER += ; print(*(kind.lower() for kind in kinds[: kinds.index(own)] if own in kinds))
test-processors: $(INSTALLED)
	set -e; older=$$(env -u ATEN_CPU_CAPABILITY $(BIN)/python -c '$(OLDER)'); for capability in $$older; do \
		echo "ATEN_CPU_CAPABILITY=$$capability"; \
		ATEN_CPU_CAPABILITY=$$capability OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope -q \
			tests/kernels tests/quantizers --ignore tests/kernels/test_aot.py; \
	done

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs
