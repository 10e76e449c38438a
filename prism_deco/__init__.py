"""Training of vision-language models with DeCo's token compression, in a single stage as PRISM does.

In a notebook:

    import prism_deco

    # The same choices and settings as on the command line; `prism-deco keys` lists them.
    config = prism_deco.load_config(["projector=c_abstractor", "recipe.epochs=1", "run_id=first",
                                     "data=llava", "data.json=train.json", "data.image_root=images"])
    run = prism_deco.train(config)                        # the run folder; an unfinished run resumes

    model = prism_deco.load(run, device="auto")           # a run, or a folder from `prism-deco export`
    model.generate(["photo.jpg"], ["What is in the picture?"])
    seen = model.relevance("photo.jpg", "What is in the picture?")
    seen.tokens, seen.text_to_query                       # what each token of the answer depends on
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_deco.api import Model, load, train
    from prism_deco.config import load_config

__all__ = ["Model", "load", "load_config", "train"]
__version__ = "0.1.0"

# bitsandbytes warns about a missing kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy imports keep `import prism_deco.config` and `prism-deco --help` fast.
    if name in __all__:
        return getattr(import_module("prism_deco.config" if name == "load_config" else "prism_deco.api"), name)
    raise AttributeError(f"module 'prism_deco' has no attribute {name!r}")
