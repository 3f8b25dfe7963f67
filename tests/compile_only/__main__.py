"""`python -m tests.compile_only [--quick]`: a line a kernel that ships; status 1 above a limit.

Needs no GPU. Triton's kernels are compiled by the Triton wheel, csrc/cuda by nvcc where there is
one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from . import cuda_sources, report


def main() -> int:
    """Compiles, prints the table and what is above its limits."""
    parser = argparse.ArgumentParser(prog="python -m tests.compile_only", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the variants that the tests compile")
    args = parser.parse_args()
    rows, wrong = [], []

    # imported here: csrc/cuda is compiled without Triton too
    try:
        from . import triton_kernels

        modules = triton_kernels.modules()
    except ImportError as error:
        print(f"Triton's kernels were not compiled: {error}", file=sys.stderr)
    else:
        for module, arch in product(modules, (80, 90)):
            limits = report.limits_in(Path(module.kernels.__file__))
            for variant in (module.quick if args.quick else module.variants)(arch):
                row = triton_kernels.compile_variant(variant)
                rows.append(row)
                wrong += report.excesses(row, limits.get(row.kernel, {}))
                print(variant, file=sys.stderr)

    if cuda_sources.nvcc() is None:
        print("csrc/cuda was not compiled: no nvcc", file=sys.stderr)
    else:
        for source in cuda_sources.SOURCES:
            limits = report.limits_in(source)
            for row in cuda_sources.compile_source(source):
                wrong += report.excesses(row, cuda_sources.limits_of(row.kernel, limits))
                rows.append(replace(row, kernel=cuda_sources.readable(row.kernel)))

    print(report.table(rows))
    print("\n".join(["", *wrong]) if wrong else "\nevery kernel is within its limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
