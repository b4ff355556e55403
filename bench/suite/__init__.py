"""The benchmark's cases and providers under pytest-benchmark; run pytest on this folder."""
