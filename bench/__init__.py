"""The microbenchmark ``hpo-fused-bench``: this package's losses against what people use today, on this machine."""
