"""The command line: finds the named command and runs it with its arguments."""

from __future__ import annotations

import argparse
import gc
import importlib
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import prism_deco
from prism_deco.commands import COMMANDS
from prism_deco.config import cache_dir
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.exits import SIGNALS, is_disk_full, own_process
from prism_deco.files import full_disk
from prism_deco.logs import configure_logging

DESCRIPTION = "Train vision-language models around DeCo's token compression, score them, and see where they look."


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 1 faults found or a failed run, 2 wrong input, 75 preempted,
    76 out of memory, 130 interrupted)."""
    if argv is None:
        own_process()
    code = _run(argv)
    if argv is None:
        for number in SIGNALS:  # a signal during Python's shutdown must not change the exit code
            signal.signal(number, signal.SIG_IGN)
        gc.freeze()  # the last collection before the exit would take a second after a large plan
    return code


def _run(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command, args = _parse(argv)
    configure_logging(debug=args.debug)
    try:
        return command(args) or 0
    except UsageError as error:
        if args.debug:
            raise
        sys.stderr.write(f"prism-deco: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("prism-deco: interrupted\n")
        return 130
    except Exception as error:
        if args.debug or not is_disk_full(error):
            raise
        named = [Path(argument.rpartition("=")[2]) for argument in argv]
        full = full_disk([*named, cache_dir(), Path(tempfile.gettempdir())], error)
        ways = "Name another folder with --out, --to or runs_dir=FOLDER; for the cache, set PRISM_DECO_CACHE."
        sys.stderr.write(f"prism-deco: error: {full} Free some space. {ways}\n")
        return 2


def _parse(argv: list[str]) -> tuple[Callable[[argparse.Namespace], int | None], argparse.Namespace]:
    """The function of the named command, and its arguments."""
    name = " ".join(argv[:2])
    if name not in COMMANDS:
        name = " ".join(argv[:1])
    if name not in COMMANDS:
        _explain_commands(argv)
    module = importlib.import_module(f"prism_deco.commands.{COMMANDS[name].module or name.split()[0]}")
    function = name.replace(" ", "_")
    command = getattr(module, function)
    parser = argparse.ArgumentParser(
        prog=f"prism-deco {name}",
        description=_wrap(command.__doc__),
        epilog=f"example:\n  prism-deco {COMMANDS[name].example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    getattr(module, f"{function}_arguments")(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # Intermixed, so that options may stand between key=value arguments.
    return command, parser.parse_intermixed_args(argv[len(name.split()) :])


def _explain_commands(argv: list[str]) -> NoReturn:
    """Handles `--help` and `--version`, and refuses anything else, since it names no command."""
    # `data` and `bench` are prefixes of several commands.
    family = {name: entry for name, entry in COMMANDS.items() if argv and name.startswith(f"{argv[0]} ")}
    listed = family or COMMANDS
    width = max(map(len, listed))
    lines = [_wrap(entry.summary, f"  {name:{width}}  ") for name, entry in listed.items()]
    parser = argparse.ArgumentParser(
        prog="prism-deco",
        usage="prism-deco COMMAND ...",
        description=_wrap(DESCRIPTION),
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prism-deco {prism_deco.__version__}")
    parser.parse_known_args(argv)
    if not argv:
        parser.error("name a command; prism-deco --help lists them")
    parser.error(str(unknown("command", " ".join(argv[: 2 if family else 1]), listed)))


def _wrap(text: str | None, start: str = "") -> str:
    """A docstring's first paragraph, wrapped to the terminal's width and indented below `start`."""
    first = " ".join((text or "").split("\n\n")[0].split())
    width = min(shutil.get_terminal_size().columns, 100) - 2
    return textwrap.fill(first, width, initial_indent=start, subsequent_indent=" " * len(start))


if __name__ == "__main__":
    sys.exit(main())
