"""`python -m benchmarks run | report | roofline | cost`."""

from __future__ import annotations

import argparse
import sys

import torch

from . import cost, record, report, roofline, run


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run.add_arguments(commands.add_parser("run", help="time our ops beside their peers"))
    cost.add_arguments(commands.add_parser("cost", help="import, call, build and wheel"))
    shown = commands.add_parser("report", help="the tables of a file that --json wrote")
    shown.add_argument("file")
    shown.add_argument("--markdown", action="store_true")
    shown.add_argument("--readme", action="store_true", help="only the table of the README")
    shown.add_argument("--plot", metavar="FILE")
    shown.add_argument("--check", action="store_true", help="hold it to the targets")
    limits = commands.add_parser("roofline", help="what this machine reaches")
    limits.add_argument("--dtype", nargs="+", choices=roofline.DTYPES, default=["fp32", "bf16"])
    limits.add_argument("--threads", type=int, default=2)

    args = parser.parse_args(argv)
    if args.command == "run":
        return run.main(args)
    if args.command == "cost":
        return cost.main(args)
    if args.command == "report":
        try:
            rows = record.read(args.file)
        except (ValueError, OSError) as error:
            print(f"report: {error}", file=sys.stderr)
            return 2
        if args.readme:
            print(report.readme(rows) if rows else "no rows")
            return 0
        return report.show(rows, args.markdown, args.plot, args.check)
    torch.set_num_threads(args.threads)
    found = roofline.measure(args.dtype)
    for dtype, value in found.flops.items():
        print(f"{dtype}: {value / 1e9:.0f} GFLOP/s ({found.source[dtype]})")
    print(f"copy: {found.bytes / 1e9:.1f} GB/s, reads and writes counted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
