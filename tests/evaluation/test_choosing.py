import io
from pathlib import Path

import pytest
from rich.console import Console

from prism_deco.config import choices
from prism_deco.config.choices import group_keys
from prism_deco.errors import UsageError
from prism_deco.evaluation import BENCHMARKS, build_benchmark, resolve, table
from prism_deco.evaluation.gqa import GQA

MINI = [f"mini_{n}" for n in ("pope", "refcoco", "refcocoplus", "refcocog", "vizwiz", "vqav2", "gqa", "textvqa")]


@pytest.mark.parametrize("name", choices("benchmark"))
def test_every_shipped_choice_builds(name):
    for member in resolve(name):
        benchmark = build_benchmark(member)
        assert benchmark.name == member and set(benchmark.variants) <= set(benchmark.VARIANTS)


def test_families():
    names = ["gqa", "mmbench", "mme", "pope", "questions", "refcoco", "seed", "textvqa", "vizwiz", "vqav2"]
    assert BENCHMARKS.names() == names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("mini", MINI),
        ("all-mini", MINI),
        ("pope, mini_pope", ["pope", "mini_pope"]),
        ("[pope, mini_pope]", ["pope", "mini_pope"]),
        (["pope", "table2", "pope"], ["pope", "mme", "mmbench", "seed"]),
        ("mini_gqa,mini", ["mini_gqa", *[name for name in MINI if name != "mini_gqa"]]),
        ("table3", [name.removeprefix("mini_") for name in MINI]),
        ([], []),
    ],
)
def test_groups_are_expanded(names, expected):
    assert resolve(names) == expected


def test_groups_say_how_their_members_are_asked(tmp_path):
    """Table 3 as vlm-evaluation, Tables 1 and 2 as LLaVA-1.5."""
    assert group_keys("table3") == {
        "pope": {"variants": ["likelihood", "generate"]},
        "textvqa": {"variants": ["prism", "plain"]},
    }
    assert group_keys("table1,table2")["textvqa"] == {"variants": ["ocr"]}
    assert group_keys("table1,pope")["pope"]["variants"][0] == "generate"
    assert group_keys("mini, gqa") == {}
    with pytest.raises(UsageError, match="table1 and table3 ask pope in different ways"):
        group_keys("table1,table3")
    mine = tmp_path / "mine.yaml"
    mine.write_text("members: [table3, mme]\nkeys: {textvqa: {limit: 5}, mme: {limit: 4}}\n")
    keys = group_keys(str(mine))
    assert keys["textvqa"] == {"variants": ["prism", "plain"], "limit": 5} and keys["mme"] == {"limit": 4}
    for name in ("table1", "table2", "table3"):
        for benchmark, own in group_keys(name).items():
            assert benchmark in resolve(name) and build_benchmark(benchmark, **own)


def test_unknown_names():
    with pytest.raises(ValueError, match="Did you mean 'pope'"):
        resolve("popo")


def test_groups_that_contain_each_other(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text(f"members: ['{path}']\n")
    with pytest.raises(ValueError, match="contain each other"):
        resolve([str(path)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imagee": "x"}, "Unknown key of the benchmark tiny_gqa 'imagee'. Did you mean 'image'"),
        ({"variants": ["shrt"]}, "Did you mean 'short'"),
        ({"variants": []}, "one or more"),
        ({"variants": ["short", "short"]}, "each once"),
        ({"on_bad_image": "skip"}, "fail"),
        ({"limit": 0}, "limit=0"),
        ({"family": "gqaa"}, "Did you mean 'gqa'"),
        ({"family": "vqav2"}, "is missing the key questions"),
        ({"members": ["pope"]}, "is a group"),
        ({"root": 5}, "tiny_gqa: root=5 must be text"),
        ({"annotations": None}, "annotations=None must be text"),
        ({"image": True}, "image=True must be text"),
        ({"limit": "x"}, "tiny_gqa: limit=x must be a whole number"),
        ({"limit": 2.5}, "limit=2.5 must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens=None must be a whole number"),
        ({"variants": [True]}, r"variants=\[True\] must be a list of texts"),
        ({"variants": 3}, "variants=3 must be a list of texts"),
        ({"variants": "[short"}, r"variants=\[short must be a list of texts"),
        ({"image": "images/{name}.png"}, "does not fit the fields imageId"),
    ],
)
def test_mistakes_in_a_choice(files, changes, message):
    with pytest.raises(ValueError, match=message):
        build_benchmark(files.gqa() | changes).items()


def test_text_is_read_by_the_type_of_its_key(files):
    """As on the command line: YAML would make a number of 5 and a boolean of Yes."""
    assert build_benchmark(files.gqa(), root="5", split="007", limit="null").path("{split}") == Path("5/007")
    pope = build_benchmark(files.pope(), variants="generate", choices="[Yes, No]", limit="3", subsets="popular")
    assert pope.variants == ("generate",) and pope.choices == ("Yes", "No") and pope.limit == 3
    assert pope.parts == ("popular",)
    with pytest.raises(UsageError, match="words for yes and no, not Yes"):
        build_benchmark(files.pope(), choices="[Yes]")


def test_keys_of_a_plug_in_are_read_by_their_types(files):
    class Mine(GQA):
        def __init__(self, *, share: float = 0.5, names: list[str] | None = None, **common):
            super().__init__(**common)
            self.share, self.names = share, names

    BENCHMARKS.register("mine_of_this_test")(Mine)
    try:
        mine = build_benchmark(files.gqa(family="mine_of_this_test"), share="0.25", names="[No, 5]")
        assert mine.share == 0.25 and mine.names == ["No", "5"]
    finally:
        del BENCHMARKS._entries["mine_of_this_test"]


def test_variants_need_their_files(files):
    with pytest.raises(ValueError, match="needs the key ocr"):
        build_benchmark(files.textvqa(ocr=None))
    with pytest.raises(ValueError, match="the variant 'prism' needs the key ocr"):
        build_benchmark(files.textvqa(ocr=None, variants=["plain", "prism"]))
    assert len(build_benchmark(files.textvqa(ocr=None, variants=["plain"])).items()) == 2
    with pytest.raises(ValueError, match="words for yes and no"):
        build_benchmark(files.pope(choices=["Yes"]))


def test_overrides_replace_keys(files):
    keys = files.gqa()
    assert build_benchmark(keys | {"root": None}, root=files.path).root == files.path
    assert build_benchmark("mini_pope", split="test", root="world").path("{split}").as_posix() == "world/test"


RESULT = {
    "benchmark": "pope",
    "variants": ["likelihood", "generate"],
    "metrics": {
        "accuracy": 86.96,
        "f1": 85.0,
        "invalid_rate": 0.0,
        "generate/accuracy": 81.04,
        "generate/invalid_rate": 0.0123,
    },
    "primary": "accuracy",
    "n": 8910,
    "invalid_rate": 0.0,
    "interval95": [86.04, 87.88],
    "decoding": None,
}


def rendered(*args, width=120) -> list[str]:
    """The lines of a table, runs of spaces as one."""
    console = Console(width=width, file=io.StringIO())
    console.print(table(*args))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_table_has_a_row_per_variant_beside_chance_and_blindness():
    """Every score stands beside the invalid rate of the same variant."""
    head, _, likelihood, generate = rendered([RESULT], {"pope": 50.0}, {"pope": 61.25})
    assert head == "benchmark metric (variant) n score 95 % interval chance blind invalid"
    assert likelihood == "pope accuracy (likelihood) 8910 87.0 86.0 to 87.9 50.0 61.2 0.0%"
    assert generate == "accuracy (generate) 8910 81.0 1.2%"


def test_the_table_says_where_chance_or_blindness_is_not_known():
    assert rendered([RESULT])[2].endswith("86.0 to 87.9 - - 0.0%")


def test_the_table_fits_a_terminal_of_80_columns():
    lines = rendered([RESULT | {"benchmark": "mini_refcocoplus", "n": 214354}], width=80)
    assert any(line.startswith("mini_refcocoplus accuracy 214354 87.0 86.0 to 87.9") for line in lines)
    assert "\u2026" not in "".join(lines)
