# install · run · test · check · bench · soak; `make run ARGS="--port 9000"` passes options on.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# An additional package index with builds of PyTorch without CUDA (hundreds of MB smaller).
TORCH_INDEX ?=

BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed
# Python files are compiled when they are first imported: most of what a package has is never imported.
# What is compiled must be kept, or each start compiles it again: 7 s.
export PYTHONDONTWRITEBYTECODE :=
PIP = $(BIN)/python -m pip install --no-compile --disable-pip-version-check \
    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
    $(shell nvidia-smi >/dev/null 2>&1 || echo -c constraints/cpu.txt)

TOOLS := build/tools

.PHONY: install run test test-clients test-vllm test-gpu test-containers images dist check bench bench-prepare bench-report docs record soak audit sbom check-kubernetes clean

# What running needs. Whatever tests or checks adds the rest.
install: $(RUNS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Forebay needs Python 3.11 or newer: set PYTHON" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(RUNS): pyproject.toml constraints/cpu.txt | $(BIN)/python
	@echo "Installing Forebay into $(VENV): 1.1 GB with PyTorch for CPUs, half a minute on 2 cores once it is downloaded."
	$(PIP) -e ".[all]"
	@touch $@

$(STAMP): pyproject.toml constraints/cpu.txt | $(BIN)/python
	@echo "Installing what tests and checks need into $(VENV): 2 GB in all."
	$(PIP) -e ".[dev]"
	@touch $(RUNS) $@

run: $(RUNS)
	@$(BIN)/forebay up $(ARGS)

# Three at a time also on 2 cores: tests of real processes wait more than they compute. The files in order: those of
# tests/unit, which are short, come last and fill what is left.
test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Codex, Claude Code, the AI SDK, openai-agents and the SDKs for Node, installed into build/clients. Needs npm.
test-clients: $(STAMP)
	$(BIN)/python -m pytest -m clients $(ARGS) tests/clients

# The real vLLM on the CPU, in an environment of its own (3.4 GB).
VLLM := build/vllm
$(VLLM)/.installed: scripts/install_vllm.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $< $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@

test-vllm: $(STAMP) $(VLLM)/.installed
	VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm $(ARGS) tests/vllm tests/unit/test_engine_contract.py

# Of the engine that DOCKER_HOST names. WHEELHOUSE=1 where builds have no network. PUSH=REGISTRY also pushes them.
IMAGES ?= api cpu served
images: $(STAMP)
	PYTHON=$(BIN)/python deploy/images/bases.sh
	PYTHON=$(BIN)/python deploy/images/build.sh $(IMAGES)

# The wheel, the sdist and the Helm chart of the last commit, in dist/. URL is the page of the repository.
PACKAGING := build/packaging
$(PACKAGING)/.installed:
	$(PYTHON) -m venv $(PACKAGING)
	$(PACKAGING)/bin/python -m pip install -q "build>=1.3,<2" "twine>=6,<7" "setuptools>=80" "setuptools-scm>=9" \
		"helm-python-sdk>=0.2.2,<0.3"
	touch $@

dist: $(PACKAGING)/.installed
	$(PACKAGING)/bin/python scripts/dist.py $(URL)

# With an engine of its own where none answers. What runs against NATS in a container as well is all of
# tests/integration that takes its NATS from the fixtures, but for the models: these ask the same of NATS, and take long.
test-containers: $(STAMP)
	scripts/with_docker.sh sh -ec '$(MAKE) images; $(BIN)/python -m pytest -m containers $(ARGS) tests/containers; \
		$(BIN)/python -m pytest -n 2 --dist loadfile --nats container -m "nats and not model" tests/integration'

# On a machine with an NVIDIA GPU, in less than ten minutes: answers, speed and memory (tests/gpu/run.py). It needs this
# repository, and with WHEELS=DIR no network: fill DIR elsewhere by
#   pip download -d DIR ".[gpu,api]" openai "setuptools>=80" "setuptools-scm>=9"
# ARGS="--device cpu" runs it on a CPU.
test-gpu:
	test -x build/gpu/bin/python || $(PYTHON) -m venv build/gpu
	build/gpu/bin/python -m pip install -q $(if $(WHEELS),--no-index --find-links $(WHEELS)) -e ".[gpu,api]" openai
	build/gpu/bin/python tests/gpu/run.py $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_links.py
	$(MAKE) docs

# The site of the docs, in build/site/html; strict: a dead link ends it. In an environment of its own (90 MB).
SITE := build/site
$(SITE)/venv/.installed: constraints/docs.txt
	$(PYTHON) -m venv $(SITE)/venv
	$(SITE)/venv/bin/python -m pip install -q -r $<
	touch $@

docs: $(STAMP) $(SITE)/venv/.installed
	$(BIN)/python scripts/docs_site.py
	$(SITE)/venv/bin/zensical build --strict --clean -f $(SITE)/zensical.toml
	$(BIN)/python -m pytest -q -m docs tests/docs

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

bench-prepare: $(STAMP)
	$(BIN)/python tests/benchmarks/prepare.py $(ARGS)

bench-report: $(STAMP)
	$(BIN)/python tests/benchmarks/report.py $(ARGS)

# The picture of the README; it takes a minute.
record: $(RUNS)
	$(BIN)/python scripts/record_first_minute.py docs/images/first-minute.svg

soak: $(STAMP)
	$(BIN)/python tests/faults/soak.py $(ARGS)

# In an environment of their own: they are no part of what they look at.
$(TOOLS)/bin/python:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q "pip-audit>=2.9,<3" "cyclonedx-bom>=7,<8"

audit: $(TOOLS)/bin/python
	for lock in api inference-cpu inference-served; do \
	    $(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r constraints/$$lock.lock || exit 1; done

sbom: $(STAMP) $(TOOLS)/bin/python
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.json $(BIN)/python
	$(BIN)/python scripts/check_sbom.py build/sbom.json

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# The manifests, the chart, nginx and the units of systemd. Needs Debian's nginx-light and systemd.
# In an environment of its own: checkov pins what others use too. helm-python-sdk is Helm 4 as a library (85 MB).
CHECKOV := build/checkov
check-kubernetes: $(STAMP)
	ls $(CHECKOV)/lib/python*/site-packages/helm_python >/dev/null 2>&1 || { $(PYTHON) -m venv $(CHECKOV) && \
		$(CHECKOV)/bin/python -m pip install -q 'checkov>=3.3,<4' 'helm-python-sdk>=0.2.2,<0.3'; }
	rm -rf $(CHECKOV)/deploy && cp -r deploy $(CHECKOV)/deploy
	sed -i 's|components/gpu|components/vllm|' $(CHECKOV)/deploy/kubernetes/overlays/production/kustomization.yaml
	for folder in deploy/kubernetes/overlays/* $(CHECKOV)/deploy/kubernetes/overlays/production; do \
		$(BIN)/kubectl kustomize $$folder > $(CHECKOV)/rendered.yaml && \
		$(CHECKOV)/bin/checkov --config-file deploy/kubernetes/.checkov.yaml -f $(CHECKOV)/rendered.yaml || exit 1; \
	done
	HELM_PYTHON=$(CURDIR)/$(CHECKOV)/bin/python $(BIN)/python -m pytest -m deploy $(ARGS) tests/kubernetes tests/deploy
