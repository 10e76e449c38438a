import io
import time

import pytest
from PIL import Image
from rich.console import Console

from prism_deco.backbones import build_backbone
from prism_deco.bench.data import PipelineRow, bench_data, photographs, render
from prism_deco.data.base import Source
from prism_deco.llms import build_llm


@pytest.fixture(scope="module")
def llm():
    return build_llm("mini_qwen2", pretrained=False, device="meta")


def test_both_pipelines_are_measured_in_one_run(tmp_path, llm):
    source = photographs(tmp_path / "photos", count=3, size=(64, 48))
    assert Image.open(tmp_path / "photos" / "images" / "2.jpg").size == (64, 48)
    backbone = build_backbone("mini_siglip", pretrained=False)
    rows = bench_data(source, llm, backbone.transform, side=64, micro_batch_size=2, repeats=2)
    assert [row.pipeline.partition(":")[0] for row in rows] == ["prism_deco"] * 3 + ["PIL and torchvision"]
    assert all(row.images_per_second > 0 for row in rows)


def test_images_per_second_are_those_of_the_clock(colors, llm):
    """A transform that burns 20 ms of processor time leaves at most 50 images a second."""

    def slow(image):
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return build(image)

    build = build_backbone("mini_siglip", pretrained=False).transform
    whole, alone, _, plain = bench_data(
        Source(colors / "train.json", colors / "images"), llm, slow, side=64, images=4, repeats=2
    )
    assert 5 < whole.images_per_second <= 50 and 5 < alone.images_per_second <= 50
    assert plain.images_per_second > 50


def test_the_table_compares_with_the_last_row():
    console = Console(width=100, file=io.StringIO())
    console.print(render([PipelineRow("ours", 50.0, 1.0), PipelineRow("plain", 40.0, 2.0)], "Title"))
    assert "1.25" in console.file.getvalue() and "50.0 ± 1.0" in console.file.getvalue()


def test_too_few_repeats_are_refused(colors, llm):
    with pytest.raises(ValueError, match="repeats=1 shows no spread"):
        bench_data(Source(colors / "train.json", colors / "images"), llm, dict, side=64, repeats=1)
