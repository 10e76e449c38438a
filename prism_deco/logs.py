"""What the command line writes to the terminal or a log file."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def configure_logging(*, debug: bool) -> None:
    """Sends log records to stderr: all of this package's, warnings of the libraries."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=debug)
        form, date = "%(message)s", "%X"
    else:
        # A file has no width to fold lines at: paths stay whole, and a message is one line to grep for.
        handler = logging.StreamHandler()
        form, date = f"%(asctime)s %(levelname)s {'%(name)s:%(lineno)d ' if debug else ''}%(message)s", "%Y-%m-%d %X"
    if not debug:
        # Lightning's hardware report and product tips, and deprecations between the libraries themselves.
        handler.addFilter(lambda record: record.name.startswith("prism_deco") or record.levelno >= logging.WARNING)
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\.")
    for name in ("lightning_fabric", "pytorch_lightning"):  # imported before, they have handlers of their own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.basicConfig(level=logging.WARNING, format=form, datefmt=date, handlers=[handler])
    logging.getLogger("prism_deco").setLevel(logging.DEBUG if debug else logging.INFO)
    if _rank():
        # Every rank has the same to say.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def _rank() -> int:
    """This process's rank among those that a launcher started; 0 without one."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
