"""What libraries log reaches the user once, from one rank, and only if he can do something about it."""

import os
import subprocess
import sys

import pytest

LIBRARIES = """
import logging, warnings
from prism_deco.logs import configure_logging
configure_logging(debug=False)
import huggingface_hub, transformers  # add handlers of their own
import open_clip, pytorch_lightning
open_clip.create_model("ViT-B-32", load_weights=False, cache_dir="/nowhere", device="meta")
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from kernels: why")
logging.getLogger("huggingface_hub.file_download").warning("hub is slow")
logging.getLogger("huggingface_hub.file_download").warning("hub is slow")
logging.getLogger("transformers.modeling").warning("odd weights")
logging.getLogger("pytorch_lightning").info("GPU available: False")
logging.getLogger("some_library").warning("disk is slow")
logging.getLogger("prism_deco.x").info("step 1")
logging.getLogger("prism_deco.x").error("step 2 failed")
warnings.warn("deprecated thing")
"""


@pytest.mark.slow
@pytest.mark.parametrize("variable", [{}, {"CI": "1"}, {"RANK": "0"}, {"RANK": "1"}, {"SLURM_PROCID": "3"}])
def test_libraries_speak_once_and_ranks_too(variable):
    environment = os.environ | {"CI": ""} | variable | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert "gemm_4bit" not in said and "No pretrained weights" not in said and "GPU available" not in said
    assert said.count("step 2 failed") == 1
    quiet = variable.get("RANK", "0") != "0" or "SLURM_PROCID" in variable
    for line in ("hub is slow", "odd weights", "disk is slow", "step 1", "deprecated thing"):
        assert said.count(line) == (0 if quiet else 1), said
