"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys

from prism_deco import commands
from prism_deco.errors import UsageError
from prism_deco.logs import configure_logging


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 1 faults found or a failed run, 2 wrong input, 75 preempted,
    76 out of memory, 130 interrupted)."""
    args = _parse(argv)
    configure_logging(debug=args.debug)
    try:
        return args.command(args) or 0
    except (UsageError, OSError) as error:
        if args.debug:
            raise
        sys.stderr.write(f"prism-deco: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("prism-deco: interrupted\n")
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes the key=value arguments in one piece only; people put options between them.
    if rest and (not hasattr(args, "arguments") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.arguments += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prism-deco", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in commands.MODULES:
        module.add(subparsers, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
