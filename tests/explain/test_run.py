"""One image and a set, from the files of a small world to pictures, numbers and tables."""

import io
import json

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from prism_deco.explain import ExplainExample, MapTable, explain_image, explain_set, relevance, side_by_side, write_page


@pytest.fixture
def examples(colors):
    names = ("red90.png", "green40.png", "blue90.png")
    answers = ("red", None, "a blue square")
    boxes = ((0.0, 0.0, 0.5, 1.0), (0.25, 0.25, 0.75, 0.75), None)
    rows = zip(names, answers, boxes, strict=True)
    return [ExplainExample(colors / "images" / n, "What color is it?", a, b, n) for n, a, b in rows]


def test_an_image_becomes_pictures_maps_and_a_page(small, examples, tmp_path):
    vlm, llm = small(projector="qformer")
    section = explain_image(vlm.float(), llm, examples[2], tmp_path, run="a run")
    assert [panel.run for panel in section.panels] == ["a run"]
    for method in ("r-gae", "attention"):
        folder = tmp_path / method
        files = {"words.json", "maps.safetensors", "sentence.png", "queries.png", *(f"word_0{k}.png" for k in range(3))}
        assert {path.name for path in folder.iterdir()} == files
        with Image.open(folder / "sentence.png") as picture:
            assert picture.size == (768, 512)  # the image is 90 x 60
        maps = load_file(folder / "maps.safetensors")
        words = json.loads((folder / "words.json").read_text())
        assert maps["text_to_patch"].shape == (len(words["tokens"]), 64) and words["answer"] == "a blue square"
        assert [word["text"] for word in words["words"]] == ["a", "blue", "square"]
    assert (tmp_path / "index.html").stat().st_size < 200_000


def test_a_set_becomes_numbers_with_intervals(small, examples, tmp_path, monkeypatch, caplog):
    vlm, llm = small()
    caplog.set_level("INFO", logger="prism_deco")
    own = iter(["blue", ""])
    monkeypatch.setattr("prism_deco.explain.run.generate_answer", lambda *_, **__: [next(own)])
    empty = ExplainExample(examples[0].image, "What shape is it?")
    summary, sections = explain_set(
        vlm, llm, [*examples, empty], tmp_path, run="a run", about={"benchmark": "colors"}, steps=4, show=2
    )
    assert summary == json.loads((tmp_path / "metrics.json").read_text())
    assert (summary["n"], summary["skipped"], summary["benchmark"], summary["projector"]) == (3, 1, "colors", "avgpool")
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["red", "blue", "a blue square"]
    for method in ("r-gae", "attention", "random"):
        values, per_row = summary["methods"][method], [row["methods"][method] for row in rows]
        for name in ("deletion_auc", "insertion_auc", "energy_in_box", "pointing"):
            known = [row[name] for row in per_row if name in row]
            assert len(known) == values[name]["n"] == (3 if "auc" in name else 2)
            assert values[name]["mean"] == pytest.approx(sum(known) / len(known))
            low, high = values[name]["interval95"]
            assert min(known) - 1e-9 <= low <= values[name]["mean"] + 1e-9 <= high + 2e-9 <= max(known) + 3e-9
    assert summary["methods"]["r-gae"]["query_redundancy"]["mean"] == 0
    assert len(sections) == 2 and (tmp_path / "index.html").is_file()


def test_runs_stand_side_by_side(small, examples, tmp_path):
    results = []
    for projector in ("avgpool", "maxpool"):
        vlm, llm = small(projector=projector)
        options = {"run": f"run of {projector}", "steps": 2}
        results.append(explain_set(vlm, llm, [examples[0], examples[2]], tmp_path / projector, **options))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(MapTable([summary for summary, _ in results]))
    text = console.export_text()
    for part in ("run of avgpool", "run of maxpool", "energy in box", "deletion AUC", "redundancy", "random"):
        assert part in text
    energy = results[1][0]["methods"]["r-gae"]["energy_in_box"]["mean"]
    assert f"{energy:.3f}" in text
    joined = side_by_side([sections for _, sections in results])
    assert [len(section.panels) for section in joined] == [2, 2]
    write_page(tmp_path / "both.html", "both", joined)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_breaks_no_word_at_any_width(width):
    name = "mini_siglip-avgpool-mini_qwen2-shapes-mini-s7"
    value = {"mean": 0.5, "interval95": [0.25, 0.75]}
    measures = ["energy_in_box", "pointing", "deletion_auc", "insertion_auc", "query_redundancy", "query_spread"]
    methods = {method: dict.fromkeys(measures, value) for method in ("r-gae", "attention", "random")}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(MapTable([{"run": name, "projector": "c_abstractor", "methods": methods, "n": 7}]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    parts = ("mini_siglip-avgpool-", "mini_qwen2-shapes-", "mini-s7", "c_abstractor", "attention", "0.500", "±0.250")
    assert set(parts) <= set(text.split())
    assert ("Terminal too narrow for" in text) == (width < 120)
    assert ("spread" in text.partition("r-gae")[0]) == (width == 120)


def test_random_maps_are_seeded(small, examples, tmp_path):
    vlm, llm = small()
    runs = [
        explain_set(vlm, llm, examples[:1], tmp_path / str(k), run="r", steps=2, seed=s)[0]
        for k, s in enumerate((0, 0, 1))
    ]
    first, again, other = (run["methods"]["random"]["energy_in_box"]["mean"] for run in runs)
    assert first == again != other


def test_a_set_without_answers_is_refused(small, examples, tmp_path, monkeypatch):
    vlm, llm = small()
    monkeypatch.setattr("prism_deco.explain.run.generate_answer", lambda *_, **__: [""])
    with pytest.raises(ValueError, match="no example has an answer"):
        explain_set(vlm, llm, [examples[1]], tmp_path, run="r")


def test_any_precision_can_be_explained(small, examples, tmp_path):
    """bfloat16 maps are written in float32, and agree with float32 as far as its digits go."""
    vlm, llm = small(projector="avgpool")
    exact = relevance(vlm.float(), llm, examples[0].image, "What color is it?", "red")
    rough = relevance(vlm.bfloat16(), llm, examples[0].image, "What color is it?", "red")
    assert rough.text_to_patch.dtype == torch.float32 and next(vlm.projector.parameters()).dtype == torch.bfloat16
    correlation = torch.corrcoef(torch.stack([exact.text_to_patch[0], rough.text_to_patch[0]]))[0, 1]
    assert correlation > 0.95


def test_projector_maps_of_a_model_in_bfloat16_are_computed_in_float32(small):
    """Against the same rounded weights in float32 throughout. Computed in bfloat16 the maps differ by 0.15."""
    vlm, llm = small(projector="c_abstractor", hidden_dim=64, depth=3)
    noise = torch.randint(0, 255, (64, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    vlm.bfloat16()
    exact = relevance(vlm.float(), llm, image, "What?", "a red square")
    rough = relevance(vlm.bfloat16(), llm, image, "What?", "a red square")
    difference = (exact.query_to_patch - rough.query_to_patch).abs().sum(dim=-1).mean()
    assert difference < 0.09  # every row sums to one


def test_a_relevance_shows_itself_in_one_line_and_as_a_figure(small, examples, tmp_path):
    vlm, llm = small()
    result = relevance(vlm, llm, examples[0].image, "What color is it?", "a $red square")
    assert repr(result).startswith("Relevance(r-gae, answer='a $red square', ") and len(repr(result)) < 150
    assert "4x4 visual tokens, 8x8 patches" in repr(result)
    figure = result.plot()
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["a $red square", "1: a", "2: $red", "3: square"]
    figure.savefig(tmp_path / "figure.png")
