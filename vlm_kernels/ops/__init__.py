"""The public functions, one file an op: keywords to their defaults, backend choice, autograd.

Each op has the same name in `reference/`, `testing/specs/`, `csrc/` and `tests/ops/`.
"""
