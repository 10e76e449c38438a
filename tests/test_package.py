"""What the package says about itself, and what a wheel holds."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=;@ ]", requirement)[0].lower().replace("_", "-")


def test_extras_can_be_installed_by_their_name():
    # The pip that comes with Python 3.11 does not find `lmms_eval`: metadata have it as `lmms-eval`.
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", extra) for extra in PROJECT["optional-dependencies"])


def test_what_is_imported_is_declared():
    extras = {_name(name) for listed in PROJECT["optional-dependencies"].values() for name in listed}
    declared = {_name(name) for name in PROJECT["dependencies"]} | extras | {"prism-deco"}
    owners = packages_distributions()
    imported = set()
    for path in (ROOT / "prism_deco").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"prism_deco"}
    missing = {module for module in foreign if not declared & {_name(name) for name in owners.get(module, [module])}}
    # Of the adapter for lmms-eval, which brings them.
    assert missing <= {"tqdm", "tenacity"}, missing


@pytest.mark.slow
def test_a_wheel_holds_the_yamls_and_the_marker_of_types(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {"prism_deco/py.typed", "prism_deco/conf/recipe/prism.yaml", "prism_deco/conf/README.md"} <= names
    assert "\nVersion: 0.1.0\n" in metadata and "\nProvides-Extra: lmms-eval\n" in metadata
    assert "\nAuthor: the prism_deco authors\n" in metadata
    # Who reads it on an index or in site-packages has no checkout that a relative link could lead into.
    description = metadata.split("\n\n", 1)[1]
    assert "`runs/reference/README.md` of the source distribution" in description
    assert all(link.startswith("https:") for link in re.findall(r"\]\(([^)]+)\)", description))
