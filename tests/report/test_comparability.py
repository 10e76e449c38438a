import json

import pytest

from prism_deco.report.assemble import write_report
from prism_deco.report.cells import seed_groups
from prism_deco.report.collect import collect
from prism_deco.report.comparability import disagreements


def _check(folder):
    return disagreements(seed_groups(collect([folder])), "")


def _edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def pair(make, tmp_path):
    make.run(tmp_path / "a", benchmarks=("gqa",))
    make.run(tmp_path / "b", "projector=c_abstractor", benchmarks=("gqa",))
    return tmp_path


def test_equal_cells_agree(pair, mini_sweep):
    assert _check(pair) == []
    assert _check(mini_sweep) == []  # seeds that are not finished are missing, not different


@pytest.mark.parametrize(
    ("loss", "sizes", "devices", "differs"),
    [
        ("token_mean", (16, 8), (1, 2), ""),
        ("micro_batch_mean", (16, 16), (1, 1), ""),
        (
            "micro_batch_mean",
            (16, 8),
            (1, 1),
            "16 (x 1) in a; 8 (x 1) in b.",
        ),
        (
            "micro_batch_mean",
            (16, 16),
            (1, 2),
            "16 (x 1) in a; 16 (x 2) in b.",
        ),
    ],
)
def test_micro_batches_are_compared_where_the_loss_is_a_mean_over_them(make, tmp_path, loss, sizes, devices, differs):
    """A cell that ran out of memory is tried again at half of them."""
    for name, size, count in zip("ab", sizes, devices, strict=True):
        options = [
            f"recipe.micro_batch_size={size}",
            f"recipe.loss={loss}",
            f"projector={'avgpool' if name == 'a' else 'maxpool'}",
        ]
        make.run(tmp_path / name, *options, benchmarks=("gqa",), devices=count)
    sentence = f"micro-batches, over which the loss is a mean, in row mini_siglip + mini_qwen2: {differs}"
    assert _check(tmp_path) == ([sentence] if differs else [])


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("manifest.json", {"data_hash": "e" * 64}, "training data (data_hash): dddddddddddd in a; eeeeeeeeeeee in b."),
        ("manifest.json", {"steps": 100}, "steps: 200 in a; 100 in b."),
        ("manifest.json", {"samples": 7}, "samples: 3200 in a; 7 in b."),
        (
            "manifest.json",
            {"tokens": {"visual_in": 64, "visual_out": 4}},
            "visual tokens in row mini_siglip + mini_qwen2: 16 in a; 4 in b.",
        ),
        (
            "eval/mini_gqa/metrics.json",
            {"data_hash": "other"},
            "mini_gqa: questions (data_hash): questions of in a; other in b.",
        ),
        (
            "eval/mini_gqa/metrics.json",
            {"prompt_hash": "other"},
            "mini_gqa: prompts (prompt_hash): prompts of m in a; other in b.",
        ),
        (
            "eval/mini_gqa/metrics.json",
            {"decoding": {"max_new_tokens": 8}},
            "mini_gqa: longest answer (max_new_tokens): 32 in a; 8 in b.",
        ),
        (
            "eval/mini_gqa/metrics.json",
            {"variants": ["generate"]},
            "mini_gqa: variants: unknown in a; generate in b.",
        ),
    ],
)
def test_each_difference_is_named_with_its_cells(pair, file, values, sentence):
    _edit(pair / "b" / file, **values)
    assert _check(pair) == [sentence]


def test_other_seeds_are_a_difference_and_an_uncompressed_reference_is_none(pair, make):
    make.run(pair / "c", "projector=linear")
    assert _check(pair) == []
    make.run(pair / "d", "seed=8")
    [sentence] = _check(pair)
    assert sentence.startswith("seeds: ") and "7, 8 in mini_siglip + mini_qwen2: avgpool" in sentence


def test_reports_refuse_to_mix_unless_told(pair, tmp_path):
    _edit(pair / "b/manifest.json", steps=100)
    with pytest.raises(ValueError, match=r"200 in a; 100 in b.*--mixed"):
        write_report([pair], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    page, _ = write_report([pair], tmp_path / "out", mixed=True)
    assert "steps: 200 in a; 100 in b." in page.read_text()


def test_other_steps_of_the_same_compute_agree(make, tmp_path):
    make.run(tmp_path / "a", benchmarks=("gqa",), steps=1050, samples=16_793)
    make.run(tmp_path / "b", "projector=linear", benchmarks=("gqa",), steps=714, samples=11_424)
    assert _check(tmp_path) == []
    page, [table] = write_report([tmp_path], tmp_path / "out")
    assert "The rows have 714 to 1,050 steps, with the same compute." in table.caption
    _edit(tmp_path / "b/manifest.json", steps=800, samples=12_800)
    assert [sentence.partition(":")[0] for sentence in _check(tmp_path)] == ["steps", "samples"]
    page, [table] = write_report([tmp_path], tmp_path / "out", mixed=True)
    assert "same compute" not in page.read_text()
