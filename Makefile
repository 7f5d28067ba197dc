# Every target sets up what it needs first (scripts/set-up): Debian packages, .venv and the C modules.
# A second run finds them there and takes a moment. `make help` lists the targets.

PREFIX ?= /usr/local
# The program's own venv; PREFIX/bin/mcr is a link into it.
MCR_HOME ?= $(if $(filter /usr/local,$(PREFIX)),/opt/mcr,$(PREFIX)/lib/mcr)
# What scripts/install puts below PREFIX/share.
SHARED := man/man1/mcr.1 bash-completion/completions/mcr zsh/site-functions/_mcr fish/vendor_completions.d/mcr.fish

PYTHON := .venv/bin/python
# cffi's own output, which nobody formats, begins with an underscore.
C_FILES := $(filter-out $(wildcard mcr/_*.c mcr/*/_*.c), \
	$(wildcard bench/*.[ch] bpf/*.[ch] mcr/*.[ch] mcr/*/*.[ch] tests/c/*.[ch]))

.DEFAULT_GOAL := help
.PHONY: help build demo test test-compilers test-vm vm-table soak bench bench-check lint format install uninstall install-service uninstall-service clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## install what is missing and compile the C modules
	@scripts/set-up

demo: build ## relay one stream through three network namespaces and show it (root)
	@scripts/as-root $(PYTHON) -m mcr.demo

test: build ## run the tests, under 10 minutes (root)
	@scripts/as-root $(PYTHON) -m pytest -n 2 --dist loadfile tests

test-compilers: build ## build, load and test in Debian 12 and 13, by their own compilers (root)
	@scripts/set-up roots
	@scripts/as-root $(PYTHON) -m tests.compilers $(COMPILERS_OPTIONS)

soak: build ## run the long tests with the full figures (root)
	@scripts/set-up soak
	@scripts/as-root $(PYTHON) -m pytest -m soak --timeout 900 tests

test-vm: build ## run it on the kernels of Debian 12 and 13, in QEMU; VM=bookworm or trixie for one (root)
	@scripts/set-up vm
	@scripts/as-root $(PYTHON) -m tests.vm $(VM)

vm-table: build ## put the tables of the last `make test-vm` into docs/KERNEL-SUPPORT.md
	@$(PYTHON) -m tests.vm table

bench: ## measure against smcroute and socat: build/bench/results.md (root)
	@scripts/set-up bench
	@scripts/as-root $(PYTHON) -m bench run $(BENCH_OPTIONS)

bench-check: ## measure the targets and compare ratios with the recorded ones (root)
	@scripts/set-up bench
	@scripts/as-root $(PYTHON) -m bench check

lint: build ## check style, types and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(C_FILES)

format: build ## rewrite the sources in the format that lint wants
	$(PYTHON) -m ruff format .
	.venv/bin/clang-format -i $(C_FILES)

install: build ## install the program in /opt/mcr, with a link, man page and completions in PREFIX (root)
	@scripts/as-root scripts/install "$(MCR_HOME)" "$(PREFIX)/bin/mcr" "$(PREFIX)/share"

uninstall: ## remove what `make install` made (root)
	@scripts/as-root rm -rf "$(MCR_HOME)" "$(PREFIX)/bin/mcr" $(SHARED:%="$(PREFIX)/share/%")

install-service: ## install the systemd unit and what belongs to it (root; PREFIX, DESTDIR)
	@$(if $(DESTDIR),,scripts/as-root) scripts/install-service install "$(PREFIX)" "$(DESTDIR)"

uninstall-service: ## remove what `make install-service` made, but the configuration (root)
	@$(if $(DESTDIR),,scripts/as-root) scripts/install-service uninstall "$(PREFIX)" "$(DESTDIR)"

clean: ## remove what was compiled, caches, and roots of other Debians (root, if there are any)
	@[ ! -e build/roots ] || scripts/as-root rm -rf --one-file-system build/roots
	rm -rf build dist mcr.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
	find mcr \( -name '*.so' -o -name '*.o' -o -name '_*.c' \) -delete

distclean: clean ## remove .venv as well
	rm -rf .venv
