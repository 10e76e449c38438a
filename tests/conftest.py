"""Shared fixtures: a small data set on disk and tiny instances of the real models."""

import json
import shutil
import socket
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from prism_deco.backbones import build_backbone
from prism_deco.llms import build, build_llm
from prism_deco.llms.tuning import quantization
from prism_deco.projectors import build_projector
from prism_deco.vlm import VLM


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With `-n auto`, runs all tests of a file in one process, so that module fixtures train only once."""
    if getattr(config.option, "numprocesses", None):
        config.option.loadscopereorder = False  # keep the order below, not most tests first
        if config.option.dist == "no":
            config.option.dist = "loadfile"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Runs the slowest files first; otherwise the last one would run alone at the end."""
    weights = Counter()
    for item in items:
        starts_processes = {"training", "sweep"} & set(item.path.parts)
        weights[item.path] += 60 if item.get_closest_marker("slow") else 5 if starts_processes else 1
    items.sort(key=lambda item: (-weights[item.path], str(item.path)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keeps all tests and fixtures out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRISM_DECO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


@pytest.fixture(scope="session")
def colors(tmp_path_factory) -> Path:
    """A LLaVA data set: `train.json` and `images/`, with eight plain images of two sizes and a text-only record."""
    root = tmp_path_factory.mktemp("colors")
    (root / "images").mkdir()
    records = []
    for name, rgb in COLORS.items():
        for width in (40, 90):
            image = f"{name}{width}.png"
            Image.new("RGB", (width, 60), rgb).save(root / "images" / image)
            turns = ["<image>\nWhat color is it?", name, "Is it red?", "Yes" if name == "red" else "No"]
            records.append({"id": f"{name}{width}", "image": image, "conversations": llava_turns(*turns)})
    records.append({"id": "text", "conversations": llava_turns("Which colors are there?", ", ".join(COLORS))})
    (root / "train.json").write_text(json.dumps(records))
    return root


def llava_turns(*texts: str) -> list[dict[str, str]]:
    """Alternating turns in LLaVA's format."""
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def free_port() -> int:
    """An unused local port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def four_bits(monkeypatch):
    """Enables four-bit weights without a GPU: bitsandbytes also computes on the CPU, slowly."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    if torch.cuda.is_available():
        return
    # On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights in its first forward pass in evaluation mode and
    # unpacks them in `state_dict`. Neither is exact: the scales are rounded to bfloat16 and quantised again. After a
    # validation, a run would continue with other frozen weights than a resumed run loads. GPUs never repack.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)

    def on_cpu(kind):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return quantization(kind) | {"device_map": {"": "cpu"}}

    monkeypatch.setattr(build, "quantization", on_cpu)
    monkeypatch.setattr("prism_deco.training.preconditions.quantization", on_cpu)


@pytest.fixture
def tiny():
    """(llm choice, VLM options) -> (VLM, LanguageModel) with random weights in float64, seeded."""

    def build(llm: str = "mini_qwen2", projector: str = "avgpool", tokens: int | None = 4, **options):
        torch.manual_seed(0)
        backbone = build_backbone("mini_siglip", pretrained=False)
        language = build_llm(llm, pretrained=False)
        project = build_projector(projector, backbone.embed_dim, language.embed_dim, backbone.grid, tokens)
        return VLM(backbone, project, language.model, **options).double(), language

    return build


@pytest.fixture(scope="session")
def browser():
    """A headless browser that records the console logs of pages."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install selenium)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        quiet = ("quic", "background-networking", "component-update", "sync", "gpu", "dev-shm-usage")
        for flag in ("headless", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in quiet)):
            options.add_argument(f"--{flag}")
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument("--window-size=1200,1400")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield made
        made.quit()
