.PHONY: setup demo test test-slow lint docs gpu clean

setup:
	@tools/setup.sh

demo: setup
	@.venv/bin/fastlt demo

test: setup
	@.venv/bin/pytest

test-slow: setup
	@.venv/bin/pytest -m slow

lint: setup
	@mkdir -p .venv/typing && ln -sfn "$(CURDIR)/kernels" .venv/typing/fastlt_kernels && ln -sfn "$(CURDIR)/benchmarks" .venv/typing/fastlt_benchmarks
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

docs: setup
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet && echo "docs: site/index.html"

gpu:
	@tools/gpu.sh

clean:
	@rm -rf .venv build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
