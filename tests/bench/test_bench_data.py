import io
import time

import pytest
from PIL import Image
from rich.console import Console

from prism_deco.backbones import build_backbone
from prism_deco.bench.data import bench_data
from prism_deco.bench.measure import Usage
from prism_deco.bench.result import BenchResult, BenchRow, interleaved, spread
from prism_deco.llms import build_llm


@pytest.fixture(scope="module")
def llm():
    return build_llm("mini_qwen2", pretrained=False, device="meta")


def test_both_pipelines_are_measured_in_one_run(tmp_path, llm):
    transform = build_backbone("mini_siglip", pretrained=False).transform
    sizes = {"side": 64, "size": (64, 48), "count": 3, "micro_batch_size": 2, "repeats": 2}
    result = bench_data(tmp_path / "photos", llm, transform, **sizes)
    with Image.open(tmp_path / "photos" / "images" / "2.jpg") as image:
        assert image.size == (64, 48)
    assert [row.name.partition(":")[0] for row in result.rows] == ["prism_deco"] * 3 + ["PIL and torchvision"]
    assert all(len(row.taken) == 2 and min(row.times("cpu_seconds")) > 0 for row in result.rows)
    assert result.columns["relative"](result.rows[-1]) == "1.00"


def test_images_per_second_are_those_of_the_clock(tmp_path, llm):
    """A transform that burns 20 ms of processor time leaves at most 50 images a second."""

    def slow(image):
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return build(image)

    build = build_backbone("mini_siglip", pretrained=False).transform
    result = bench_data(tmp_path / "photos", llm, slow, side=64, size=(64, 48), count=4, repeats=2)
    whole, alone, _, plain = [float(result.columns["images/s per core"](row).split()[0]) for row in result.rows]
    assert 5 < whole <= 50 and 5 < alone <= 50
    assert plain > 50


def test_a_table_has_a_row_for_each_thing():
    rows = [BenchRow("ours", [Usage(1.0)], {"n": 3}), BenchRow("plain", [Usage(2.0)], {"n": 4})]
    console = Console(width=100, file=io.StringIO())
    console.print(BenchResult(rows, "[Title]", "Caption", {"count": lambda row: str(row.facts["n"])}).table())
    lines = console.file.getvalue().splitlines()
    assert lines[0].strip() == "[Title]" and lines[-1].strip() == "Caption"
    assert [line.split("│")[1:3] for line in lines if "│" in line] == [[" ours  ", "     3 "], [" plain ", "     4 "]]
    assert spread([1.0, 2.0, 3.0, 4.0, 9.0], 1) == "3.0 ± 2.0"


def test_things_are_measured_in_turn():
    ran = []
    runs = {name: lambda name=name: ran.append(name) or Usage(float(len(ran))) for name in ("a", "b")}
    taken = interleaved(runs, repeats=2, warmup=1)
    assert ran == ["a", "b"] * 3
    assert {name: [usage.seconds for usage in usages] for name, usages in taken.items()} == {"a": [3, 5], "b": [4, 6]}
    total = Usage.total([Usage(1.0, 0.5, 10), Usage(2.0, 1.5, 30), Usage(4.0, 2.0)])
    assert total == Usage(7.0, 4.0, 30)
    with pytest.raises(ValueError, match="repeats=1 shows no spread"):
        interleaved({}, repeats=1)
