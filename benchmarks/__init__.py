"""The benchmark suite: our kernels beside their peers, in one process, with the losing rows.

`python -m benchmarks run | report | roofline | cost`; see docs/benchmarking.md.
"""
