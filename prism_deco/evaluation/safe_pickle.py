"""Reading pickles that hold data and nothing else (RefCOCO distributes its expressions as one)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from prism_deco.errors import UsageError


class _DataUnpickler(pickle.Unpickler):
    """Admits no class and no function: only the built-in containers, strings and numbers can be built."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def load_data_pickle(path: Path) -> Any:
    """The content of a pickle of plain containers, strings and numbers.

    Raises:
        UsageError: it is missing or damaged, or it names a class or function (unpickling may run those,
            so nothing of it is executed).
    """
    try:
        with path.open("rb") as file:
            return _DataUnpickler(file, encoding="utf-8").load()
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UsageError(
            f"{path} is not a pickle of plain data ({type(error).__name__}: {error}). Nothing of it was executed; "
            "take the file from its publisher again."
        ) from error
