import base64
import copy
import json
import pickle

import pytest
from PIL import Image

from prism_deco.errors import UsageError
from prism_deco.evaluation import build_benchmark
from prism_deco.evaluation.choose import prepare
from prism_deco.evaluation.image_check import bad_images
from prism_deco.evaluation.scoring import predict, summarise
from prism_deco.evaluation.textvqa import read_ocr

KINDS = ("pope", "refcoco", "vqav2", "vizwiz", "textvqa", "gqa", "mme", "seed", "mmbench", "questions")


def items(files, kind, **keys):
    return build_benchmark(getattr(files, kind)(**keys)).items()


def test_pope_questions_of_all_subsets_in_both_variants(files):
    asked = items(files, "pope")
    assert [item.question_id for item in asked[:5]] == [
        *(f"random/{k}/likelihood" for k in range(4)),
        "popular/0/likelihood",
    ]
    assert [item.question_id for item in asked[8:10]] == ["random/0/generate", "random/1/generate"]
    assert asked[0].prompt == ("Is there a thing 0 in the image?\nAnswer the question using a single word or phrase.")
    assert asked[0].choices == ("Yes", "No") and asked[8].choices == ()
    assert asked[3].target == {"answer": "no", "subset": "random", "variant": "likelihood"}
    assert asked[3].image == "images/1.png" and asked[3].paths[0] == files.path / "images/1.png"


def test_refcoco_asks_once_per_sentence_of_the_split(files):
    asked = items(files, "refcoco")
    assert [item.question_id for item in asked] == ["0-0", "0-1", "1-2", "1-3"]
    assert asked[3].prompt == (
        'Please provide the bounding box coordinate of the region this sentence describes: "thing 1 1"'
    )
    assert asked[3].target == {
        "box": [0.1, 0.0, 0.6, 1.0],
        "exact_box": [0.1, 0.0, 0.6, 1.0],
        "width": 100,
        "height": 50,
    }
    trained = items(files, "refcoco", variants=["trained"], split="train")
    assert [item.question_id for item in trained] == ["2-4", "2-5"]
    assert trained[0].prompt.endswith("describes: thing 2 0.")


def test_line_separators_inside_json_strings(files):
    keys = files.pope(subsets=["random"], variants=["generate"])
    path = files.path / "coco_pope_random.json"
    path.write_text(path.read_text().replace("thing 0", "thing\u2028 0"))
    assert len(build_benchmark(keys).items()) == 4


def test_vqav2_joins_questions_and_annotations(files):
    asked = items(files, "vqav2")
    assert [item.image for item in asked] == ["images/000.png", "images/001.png", "images/002.png"]
    assert asked[2].target == {"answers": ["2"] * 10, "type": "other"}


def test_vizwiz_ids_are_places_in_the_list(files):
    first, second = items(files, "vizwiz")
    assert (first.question_id, second.question_id) == ("0", "1")
    assert first.prompt == (
        "What is this 0?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    assert (first.target["type"], second.target["type"]) == ("unanswerable", "answerable")


def test_textvqa_with_and_without_ocr_tokens(files):
    asked = items(files, "textvqa")
    assert asked[1].prompt == (
        "What does images/im1.png say?\nReference OCR token: A, word1"
        "\nAnswer the question using a single word or phrase."
    )
    assert asked[3].prompt == ("What does images/im1.png say?\nAnswer the question using a single word or phrase.")


def _harness(text):
    """What vlm-evaluation makes of a text of LLaVA's JSON lines: its prompts with and without OCR tokens."""
    ask = "{}\nAnswer the question using a single word or phrase.".format
    return ask(text), ask(text.split("\nReference OCR token:")[0])


def test_textvqa_as_the_prism_harness_asks(files, tmp_path):
    """From LLaVA's file, whose texts the harness takes for questions, and from TextVQA's own."""
    instruction = "\nAnswer the question using a single word or phrase."
    text = f"What does images/im0.png say?\nReference OCR token: A, word0{instruction}"
    lines = [{"question_id": f"im{k}", "image": f"im{k}.jpg", "text": text.replace("0", str(k))} for k in range(2)]
    expected = [_harness(line["text"]) for line in lines]
    assert expected[1][0].endswith(f"A, word1{instruction}{instruction}")
    variants = {"variants": ["prism", "plain"]}
    keys = files.textvqa(**variants)
    (files.path / "llava.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for ocr in ("ocr.json", "llava.jsonl"):
        prompts = [item.prompt for item in build_benchmark(keys | {"ocr": ocr}).items()]
        assert prompts == [prompt for kind in zip(*expected, strict=True) for prompt in kind]


def test_ocr_tokens_from_llavas_prompts(tmp_path):
    path = tmp_path / "ocr.jsonl"
    text = "what?\nReference OCR token: NO, EXIT\nAnswer the question using a single word or phrase."
    path.write_text(json.dumps({"question_id": "im0", "image": "im0.jpg", "text": text}) + "\n")
    assert read_ocr(path) == {"im0": "NO, EXIT"}


def test_gqa_ids_are_the_keys(files):
    assert [(i.question_id, i.target["answer"]) for i in items(files, "gqa")] == [
        ("200", "yes"),
        ("201", "yes"),
        ("202", "t-shirt"),
    ]


def test_mme_reads_both_folder_layouts(files):
    asked = items(files, "mme")
    assert [(i.question_id, i.image) for i in asked] == [
        ("count/a/0", "mme/count/a.png"),
        ("count/a/1", "mme/count/a.png"),
        ("count/b/0", "mme/count/b.png"),
        ("count/b/1", "mme/count/b.png"),
        ("scene/c/0", "mme/scene/images/c.jpg"),
        ("scene/c/1", "mme/scene/images/c.jpg"),
    ]
    assert asked[4].prompt == "Is it a bar?\nAnswer the question using a single word or phrase."
    assert [i.target["answer"] for i in asked[4:]] == ["yes", "no"]


def test_own_questions_have_one_image_several_or_none(files):
    one, several, none = items(files, "questions")
    assert [item.question_id for item in (one, several, none)] == ["1", "2", "sum"]
    assert one.image == "images/q0.png" and one.paths == (files.path / "images/q0.png",)
    assert several.image == ["images/q1.png", "images/q0.png"] and none.image == []
    assert one.prompt == "What is this?\nAnswer the question using a single word or phrase."
    assert [i.target["answers"] for i in (one, several, none)] == [["A cat"], ["2", "two"], ["2"]]
    assert items(files, "questions", variants=["plain"])[2].prompt == "What is 1 + 1?"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "Who?", "images": "a.png", "answer": "x"}, "has no 'image' .it has question, images, answer"),
        ({"question": "Who?", "image": "a.png"}, "has no 'answer'"),
        ({"question": "Who?", "image": "a.png", "answer": []}, "image and answer must be text or lists of texts"),
        ({"question": "Who?", "image": ["a.png", 1], "answer": "x"}, "image and answer must be text or lists of texts"),
        ({"question": "Who?", "image": "../a.png", "answer": "x"}, "leads out of the image root"),
    ],
)
def test_own_questions_that_cannot_be_asked(files, record, says):
    keys = files.questions()
    path = files.path / "questions.jsonl"
    path.write_text(path.read_text() + json.dumps(record) + "\n")
    with pytest.raises(UsageError, match=rf"questions\.jsonl, record 4.*{says}"):
        build_benchmark(keys).items()


def test_a_file_for_a_root_is_named(files):
    with pytest.raises(UsageError, match=r"questions\.jsonl does not exist: check root=FOLDER"):
        build_benchmark(files.questions(), root=files.path / "questions.jsonl").items()


def test_seed_leaves_videos_out(files):
    asked = items(files, "seed")
    assert [i.question_id for i in asked] == ["0", "1", "2"]
    assert asked[1].target == {"answer": "B", "type": "Spatial Relation"}
    assert asked[0].prompt == (
        "Where is it 0?\nA. left\nB. right\nC. 3\nD. below\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_mmbench_unpacks_its_images(files):
    benchmark = build_benchmark(files.mmbench())
    asked = benchmark.items()
    assert [i.question_id for i in asked] == ["5", "1000005", "6", "1000006"]
    assert asked[0].prompt == "Which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert asked[2].prompt.startswith("Think.\nWhich?\n")
    assert asked[1].target == {
        "answer": "B",
        "options": {"A": "dog", "B": "cat"},
        "category": "spatial_relationship",
        "question": 5,
        "rotation": 1,
    }
    assert asked[0].paths == asked[1].paths != asked[2].paths
    with Image.open(asked[0].paths[0]) as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize(
    ("kind", "limit", "ids"),
    [
        ("gqa", 2, ["200", "201"]),
        ("pope", 2, ["random/0", "popular/0"]),
        ("pope", 3, ["random/0", "random/1", "popular/0"]),
        (
            "mme",
            3,  # pairs stay together
            ["count/a/0", "count/a/1", "scene/c/0", "scene/c/1"],
        ),
        ("mmbench", 1, ["5", "1000005"]),
        ("seed", 2, ["0", "1"]),
        ("gqa", 99, ["200", "201", "202"]),
    ],
)
def test_a_limit_is_spread_over_subsets_and_keeps_groups_whole(files, kind, limit, ids):
    keys = {"variants": ["generate"]} if kind == "pope" else {}
    assert [item.question_id for item in items(files, kind, limit=limit, **keys)] == ids


@pytest.mark.parametrize("kind", KINDS)
def test_missing_file(files, kind):
    keys = getattr(files, kind)()
    keys["root"] = str(files.path / "elsewhere")
    with pytest.raises(ValueError, match="elsewhere"):
        build_benchmark(keys).items()


@pytest.mark.parametrize("kind", KINDS)
def test_a_root_is_needed(files, kind):
    with pytest.raises(ValueError, match="root"):
        build_benchmark(getattr(files, kind)(root=None)).items()


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("pope", "coco_pope_popular.json"),
        ("refcoco", "instances.json"),
        ("refcoco", "refs(unc).p"),
        ("vqav2", "annotations.json"),
        ("vqav2", "questions.json"),
        ("vizwiz", "val.json"),
        ("textvqa", "text.json"),
        ("textvqa", "ocr.json"),
        ("gqa", "gqa.json"),
        ("seed", "seed.json"),
        ("mmbench", "mmb.tsv"),
        ("questions", "questions.jsonl"),
    ],
)
def test_truncated_files_are_named(files, kind, file):
    keys = getattr(files, kind)()
    path = files.path / file
    content = path.read_bytes()
    cut = content.rindex(b"\t") if file.endswith("tsv") else len(content) * 2 // 3
    path.write_bytes(content[:cut])
    with pytest.raises(ValueError) as error:
        build_benchmark(keys).items()
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("kind", "key", "other", "file"),
    [
        ("pope", "annotations", "gqa", "gqa.json"),
        ("pope", "annotations", "vizwiz", "val.json"),
        ("gqa", "annotations", "vizwiz", "val.json"),
        ("gqa", "annotations", "seed", "seed.json"),
        ("vizwiz", "annotations", "gqa", "gqa.json"),
        ("vqav2", "questions", "seed", "seed.json"),
        ("vqav2", "annotations", "textvqa", "text.json"),
        ("textvqa", "annotations", "vqav2", "questions.json"),
        ("seed", "annotations", "vqav2", "questions.json"),
        ("refcoco", "instances", "vqav2", "annotations.json"),
    ],
)
def test_a_file_of_another_benchmark_is_refused(files, kind, key, other, file):
    keys = getattr(files, kind)()
    getattr(files, other)()
    with pytest.raises(ValueError) as error:
        build_benchmark(keys | {key: file}).items()
    assert file in str(error.value)


def test_the_first_bad_record_is_named(files):
    keys = files.vizwiz()
    records = json.loads((files.path / "val.json").read_text())
    del records[1]["answers"]
    files.json("val.json", records)
    with pytest.raises(ValueError, match=r"val\.json, record 2 is not a VizWiz record: it has no 'answers'"):
        build_benchmark(keys).items()


def test_ten_annotators_are_needed(files):
    keys = files.textvqa()
    content = json.loads((files.path / "text.json").read_text())
    content["data"][1]["answers"].pop()
    files.json("text.json", content)
    with pytest.raises(ValueError, match="record 2: VQA accuracy needs the answers of ten"):
        build_benchmark(keys).items()


def test_duplicated_ids(files):
    keys = files.pope()
    path = files.path / "coco_pope_random.json"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="the question id random/0 occurs twice"):
        build_benchmark(keys).items()
    keys = files.vqav2()
    content = json.loads((files.path / "annotations.json").read_text())
    content["annotations"].append(content["annotations"][0])
    files.json("annotations.json", content)
    with pytest.raises(ValueError, match=r"annotations\.json, record 4: question_id 0 occurs twice"):
        build_benchmark(keys).items()


def test_questions_without_annotation(files):
    keys = files.vqav2()
    content = json.loads((files.path / "annotations.json").read_text())
    del content["annotations"][1]
    files.json("annotations.json", content)
    with pytest.raises(ValueError, match=r"questions\.json, record 2: question 1 .* same split"):
        build_benchmark(keys).items()


def test_a_box_without_area(files):
    keys = files.refcoco()
    content = json.loads((files.path / "instances.json").read_text())
    content["annotations"][1]["bbox"] = [0, 0, 0, 5]
    files.json("instances.json", content)
    with pytest.raises(ValueError, match=r"instances\.json, annotation 2"):
        build_benchmark(keys).items()


def test_an_mme_question_without_its_twin(files):
    keys = files.mme()
    (files.path / "mme/count/b.txt").write_text("Is there one?\tYes\n")
    with pytest.raises(ValueError, match=r"b\.txt holds 1 questions; MME has two per image"):
        build_benchmark(keys).items()


def test_an_unknown_label(files):
    keys = files.pope()
    path = files.path / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"no"', '"maybe"', 1))
    with pytest.raises(ValueError, match=r"coco_pope_random\.json, record 3 .*'maybe'"):
        build_benchmark(keys).items()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png"])
def test_image_paths_stay_below_the_root(files, name):
    keys = files.vizwiz()
    records = json.loads((files.path / "val.json").read_text())
    records[0]["image"] = name
    files.json("val.json", records)
    keys["image"] = "{image}"
    with pytest.raises(ValueError, match=r"val\.json, record 1"):
        build_benchmark(keys).items()


def test_missing_and_truncated_images(files):
    asked = items(files, "gqa")
    (files.path / "images/n1.png").unlink()
    content = (files.path / "images/n2.png").read_bytes()
    (files.path / "images/n2.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"Question 201: the image .*n1\.png"):
        bad_images(asked, "fail")
    assert bad_images(asked, "count_wrong") == {"images/n1.png", "images/n2.png"}


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.99, 1.0])
def test_a_photograph_that_was_cut_off(files, kept):
    """Whether a JPEG is whole is seen at a reduced size as well."""
    asked = items(files, "vizwiz")
    path = files.path / "val/0.png"
    skimage_data = pytest.importorskip("skimage.data", reason="scikit-image ships the photograph")
    Image.fromarray(skimage_data.chelsea()).save(path, "JPEG")
    content = path.read_bytes()
    path.write_bytes(content[: round(len(content) * kept)])
    assert bad_images(asked, "count_wrong") == (set() if kept == 1 else {"val/0.png"})


def test_an_mmbench_image_that_is_no_base64(files):
    keys = files.mmbench()
    path = files.path / "mmb.tsv"
    good = base64.b64encode((files.path / "x.jpg").read_bytes()).decode()
    path.write_text(path.read_text().replace(good, "%%%", 1))
    with pytest.raises(ValueError, match=r"mmb\.tsv, record 1: the image is not base64"):
        build_benchmark(keys).items()


def test_a_split_without_questions(files):
    with pytest.raises(ValueError, match="no questions of split 'testA'"):
        items(files, "refcoco", split="testA")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_subset_without_questions(files, content):
    """Its mean would be over the other subsets alone."""
    keys = files.pope()
    (files.path / "coco_pope_popular.json").write_text(content)
    with pytest.raises(
        UsageError, match=r"tiny_pope: no questions of popular in .*\(questions of random: 4, popular: 0\)"
    ):
        build_benchmark(keys).items()


@pytest.mark.parametrize(("kind", "limit"), [("pope", 1), ("mme", 2)])
def test_a_limit_that_leaves_out_a_part(files, kind, limit):
    with pytest.raises(UsageError, match=rf"in what limit={limit} keeps \(questions of .*: 0\)"):
        items(files, kind, limit=limit)


def test_what_was_read_of_each_part_is_logged(files, tmp_path, caplog):
    caplog.set_level("INFO")
    for kind in ("pope", "seed", "gqa"):
        path = tmp_path / f"tiny_{kind}.yaml"
        path.write_text(json.dumps({k: v for k, v in getattr(files, kind)().items() if k != "name"}))
        prepare(str(path))
    assert "tiny_pope: read 8 questions (random 4, popular 4)" in caplog.text
    assert "tiny_seed: read 3 questions (Instance Location 1, Spatial Relation 2)" in caplog.text
    assert "tiny_gqa: read 3 questions\n" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("width", 0, r"instances\.json, image 1: 0 x 50 pixels is not an image size"),
        ("height", -3, r"instances\.json, image 1: 100 x -3 pixels is not an image size"),
    ],
)
def test_an_image_without_a_size(files, key, value, says):
    keys = files.refcoco()
    content = json.loads((files.path / "instances.json").read_text())
    content["images"][0][key] = value
    files.json("instances.json", content)
    with pytest.raises(UsageError, match=says):
        build_benchmark(keys).items()


ODD = [None, True, 0, -1, 10**400, float("nan"), "", "x", "\ud800", [], [None], {}]
RECORDS = {
    "coco_pope_random.json": "pope",
    "refs(unc).p": "refcoco",
    "instances.json": "refcoco",
    "questions.json": "vqav2",
    "annotations.json": "vqav2",
    "val.json": "vizwiz",
    "text.json": "textvqa",
    "ocr.json": "textvqa",
    "gqa.json": "gqa",
    "seed.json": "seed",
    "questions.jsonl": "questions",
}


def places(value, path=()):
    """The paths of all values inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in inner:
        yield (*path, key)
        yield from places(member, (*path, key))


def with_value(content, path, value):
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize("file", RECORDS)
def test_odd_values_are_read_or_refused_by_name(files, file):
    """No value of an annotation file ends in another error than a `UsageError` that names the file; what is read can be
    scored."""
    keys = getattr(files, RECORDS[file])()
    path = files.path / file
    pickled, lines = file.endswith(".p"), file.startswith("coco_pope") or file.endswith(".jsonl")
    text = path.read_bytes()
    content = pickle.loads(text) if pickled else [json.loads(line) for line in text.splitlines()] if lines else None
    content = content if content is not None else json.loads(text)
    seen = set()
    for place in places(content):
        kind = tuple("#" if isinstance(key, int) else key for key in place)
        if kind in seen:
            continue  # the first record stands for all
        seen.add(kind)
        for value in ODD:
            changed = with_value(content, place, value)
            if pickled:
                path.write_bytes(pickle.dumps(changed))
            else:
                rows = "".join(json.dumps(row) + "\n" for row in changed) if lines else json.dumps(changed)
                path.write_text(rows)
            benchmark = build_benchmark(keys)
            try:
                asked = benchmark.items()
            except UsageError as error:
                assert file in str(error) or str(files.path) in str(error), (place, value, error)
                continue
            summarise(benchmark, [benchmark.grade(predict(item, None)) for item in asked], None)


def test_annotations_are_not_unpickled_blindly(files, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    keys = files.refcoco()
    with (files.path / "refs(unc).p").open("wb") as file:
        pickle.dump([Evil()], file)
    with pytest.raises(ValueError, match="not a pickle of plain data"):
        build_benchmark(keys).items()
    assert not (tmp_path / "opened").exists()
