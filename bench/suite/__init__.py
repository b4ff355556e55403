"""The benchmark's cases and providers as a pytest-benchmark suite: run pytest on this folder.

Part of the package, so that it comes with an installation, too. What tests the benchmark itself lies in ``tests/``.
"""
