"""The architecture, checked: imports point one way, and light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prism_deco"

# A room may import rooms of lower rank only, and itself.
RANKS = {
    "errors": -1,
    "config": 1,
    "bootstrap": 0,
    "files": 0,
    "machine": 0,
    "tensors": 1,
    "exits": 0,
    "logs": 0,
    "distributed": 2,
    "processes": 3,
    "stages": 2,
    "sharing": 2,
    "backbones": 2,
    "projectors": 2,
    "llms": 2,
    "loss": 2,
    "sequence": 3,
    "vlm": 4,
    "data": 4,
    "build": 5,
    "features": 5,
    "inference": 5,
    "plan": 6,
    "training": 7,
    "evaluation": 7,
    "explain": 7,
    "bench": 8,
    "export": 8,
    "sweep": 8,
    "report": 8,
    "api": 9,
    "miniature": 10,
    "integrations": 10,
    "commands": 11,
    "cli": 12,
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "prism_deco":
                names = [f"prism_deco.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("prism_deco.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    if relative == Path("__init__.py"):
        return  # re-exports the facade, lazily
    room = relative.parts[0].removesuffix(".py")
    assert room in RANKS, f"give {room} a rank"
    wrong = {other for other in _imports(path) if other != room and RANKS.get(other, 99) >= RANKS[room]}
    assert not wrong, f"{relative} (rank {RANKS[room]}) imports {sorted(wrong)}"


LIGHT = ("import prism_deco.cli", "from prism_deco.config import load_config; load_config()")
ANSWERING = """import sys
import prism_deco.api, prism_deco.evaluation.runner
assert "matplotlib" not in sys.modules
import prism_deco.plan, prism_deco.report.assemble"""


@pytest.mark.parametrize(
    ("code", "libraries"),
    [*((code, ("torch", "transformers", "timm")) for code in LIGHT), (ANSWERING, ("lightning_fabric", "torchmetrics"))],
)
def test_what_takes_seconds_to_import_waits_until_it_is_needed(code, libraries):
    check = f"{code}\nimport sys; heavy = set({libraries}) & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=PACKAGE.parent)
