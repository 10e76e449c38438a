"""What the command line writes to the terminal or to a log file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_USELESS = "No pretrained weights"
"""What warnings of open_clip and timm begin with: weights are read after the architecture is built."""

_REPETITIVE = ("huggingface_hub.utils._http", "huggingface_hub.file_download", "huggingface_hub._snapshot_download")
"""Loggers that say the same of every attempt and every file."""


def configure_logging(*, debug: bool) -> None:
    """Sends log records to stderr: this package's from INFO on, warnings of the libraries; errors alone on other ranks
    than 0, since every rank has the same to say."""
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
        handler.addFilter(_concerns_the_user)
        said: set[str] = set()
        for name in _REPETITIVE:
            logging.getLogger(name).addFilter(lambda record: _is_new(record, said))
        # Deprecations between the libraries themselves.
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\.")
    for name in ("lightning_fabric", "pytorch_lightning"):  # imported before, they have handlers of their own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.basicConfig(level=logging.WARNING, format=form, datefmt=date, handlers=[handler])
    logging.getLogger("prism_deco").setLevel(logging.DEBUG if debug else logging.INFO)
    # The rank of this process among those that a launcher started.
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0):
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        _hide_progress_bars()


def log_console() -> Console:
    """The terminal that the log goes to. A progress bar on it stays below the lines of the log."""
    from rich.console import Console
    from rich.logging import RichHandler

    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, RichHandler)]
    return handlers[0].console if handlers else Console(stderr=True)


def _concerns_the_user(record: logging.LogRecord) -> bool:
    if record.name.startswith("prism_deco"):
        return True
    # These write to stderr themselves; what they pass on as well (transformers does if CI is set) would appear twice.
    own_handler = record.name.startswith(("huggingface_hub", "transformers"))
    # Below are Lightning's hardware report and product tips.
    return record.levelno >= logging.WARNING and not own_handler and not record.getMessage().startswith(_USELESS)


def _is_new(record: logging.LogRecord, said: set[str]) -> bool:
    message = record.getMessage()
    was_said = message in said
    said.add(message)
    return not was_said


def _hide_progress_bars() -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    if "transformers" in sys.modules:  # it looks at the hub's setting when it is imported
        sys.modules["transformers"].utils.logging.disable_progress_bar()
