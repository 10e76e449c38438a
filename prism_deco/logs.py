"""Logging of the command line, to a terminal or a log file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_USELESS = "No pretrained weights"
"""Prefix of warnings by open_clip and timm, which build the architecture before this package loads the weights."""

_REPETITIVE = ("huggingface_hub.utils._http", "huggingface_hub.file_download", "huggingface_hub._snapshot_download")
"""Loggers that repeat a message for every attempt and every file."""


def configure_logging(*, debug: bool) -> None:
    """Sends log records to stderr: this package's from INFO on, the libraries' from WARNING on. Ranks other than 0 only
    log errors, since all ranks log the same."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=debug)
        form, date = "%(message)s", "%X"
    else:
        # Not rich in a file: it would wrap lines, which breaks paths and grep.
        handler = logging.StreamHandler()
        form, date = f"%(asctime)s %(levelname)s {'%(name)s:%(lineno)d ' if debug else ''}%(message)s", "%Y-%m-%d %X"
    if not debug:
        handler.addFilter(_concerns_the_user)
        seen: set[str] = set()
        for name in _REPETITIVE:
            logging.getLogger(name).addFilter(lambda record: _is_new(record, seen))
        # Deprecation warnings of the libraries about each other.
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\.")
    for name in ("lightning_fabric", "pytorch_lightning"):  # they install handlers of their own when imported
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.basicConfig(level=logging.WARNING, format=form, datefmt=date, handlers=[handler])
    logging.getLogger("prism_deco").setLevel(logging.DEBUG if debug else logging.INFO)
    # The rank of this process, if a launcher started it.
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0):
        from huggingface_hub.utils import disable_progress_bars

        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        disable_progress_bars()
        if "transformers" in sys.modules:  # it only reads the hub's setting when it is imported
            sys.modules["transformers"].utils.logging.disable_progress_bar()


def log_console() -> Console:
    """The console that the log writes to, so that a progress bar stays below the log's lines."""
    from rich.console import Console
    from rich.logging import RichHandler

    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, RichHandler)]
    return handlers[0].console if handlers else Console(stderr=True)


def _concerns_the_user(record: logging.LogRecord) -> bool:
    if record.name.startswith("prism_deco"):
        return True
    # These write to stderr themselves. Records that they also propagate (transformers does if CI is set) would appear
    # twice.
    own_handler = record.name.startswith(("huggingface_hub", "transformers"))
    # Lightning's hardware report and product tips have lower levels.
    return record.levelno >= logging.WARNING and not own_handler and not record.getMessage().startswith(_USELESS)


def _is_new(record: logging.LogRecord, seen: set[str]) -> bool:
    message = record.getMessage()
    was_seen = message in seen
    seen.add(message)
    return not was_seen
