"""What an image file may be and where it may lie, with the files that web pages and other people's folders hold."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prism_deco
from prism_deco.data.images import decode_image

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 10
%%EndComments
0 0 20 10 rectfill
%%EOF
"""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_formats_of_data_sets_are_read(kind):
    pixels = np.full((6, 8, 3), (200, 100, 50), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    read = np.asarray(decode_image(data.getvalue(), "x"))
    assert read.shape == pixels.shape and np.abs(read.astype(int) - pixels).max() < 8


@pytest.mark.parametrize("kind", ["EPS", "ICNS", "PCX", "TGA", "SGI", "DDS", "MSP", "XBM"])
def test_other_formats_are_refused_with_those_that_are_read(kind):
    data = io.BytesIO(EPS)
    if kind != "EPS":
        Image.new("1" if kind in ("MSP", "XBM") else "RGB", (64, 64)).save(data, kind)
    with pytest.raises(OSError, match=r"a\.jpg cannot be decoded as an image .*JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"):
        decode_image(data.getvalue(), "a.jpg")


OPENS = """
import sys
from pathlib import Path
from PIL import Image
from prism_deco.data.images import ImageFolder, load_image, open_image
from prism_deco.data.validators import inspect_image

folder = Path(sys.argv[1])
for read in (
    lambda: open_image(folder / "a.jpg"),
    lambda: load_image(ImageFolder(folder), "a.jpg"),
    lambda: inspect_image(ImageFolder(folder), "a.jpg"),
    lambda: Image.open(folder / "a.jpg").convert("RGB"),
):
    try:
        read()
    except (OSError, ValueError):
        pass
    print((folder / "started").exists(), flush=True)
"""


def test_no_picture_starts_ghostscript(tmp_path):
    """Pillow's own way, the last one, shows that the trap works."""
    (tmp_path / "a.jpg").write_bytes(EPS)
    trap = tmp_path / "bin" / "gs"
    trap.parent.mkdir()
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho 10.0\n")
    trap.chmod(0o755)
    environment = os.environ | {"PATH": f"{trap.parent}:{os.environ['PATH']}"}
    ran = subprocess.run([sys.executable, "-c", OPENS, tmp_path], env=environment, check=True, capture_output=True)
    said = ran.stdout.split()
    assert said[:3] == [b"False"] * 3 and said[-1] == b"True"


def test_no_module_opens_images_without_the_list_of_formats():
    """Calls of `Image.open`, by module: those in `data.images`, and the plain loader that it is compared with."""
    package = Path(prism_deco.__file__).parent
    found = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                name = str(path.relative_to(package))
                found.setdefault(name, []).append(any(k.arg == "formats" for k in node.keywords))
    assert found == {"data/images.py": [True], "bench/data.py": [True]}
