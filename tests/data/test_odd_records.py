"""Records that PRISM and LLaVA train on although something is odd about them, and those that nothing trains on."""

import json

import pytest

from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.data.base import Source
from prism_deco.data.encoder import Encoder, check_records
from prism_deco.data.loader import Collate, Examples
from prism_deco.data.records import open_parts, open_records
from prism_deco.data.samplers import Filler
from prism_deco.llms import build_llm

IGNORE = -100
TURNS = {
    "plain": ["<image>\nWhat colour is it?", "Red."],
    "xml": ["What does <channel><image><url>x</url></image></channel> mean?", "It is RSS."],
    "two_tags": ["<image>\nLook at <image> again.", "Red."],
    "question_last": ["<image>\nColour?", "Red.", "Sure?"],
}


def _entry(name, **changes):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(TURNS[name])]
    image = {} if name == "xml" else {"image": "red40.png"}
    return {"id": name, **image, "conversations": turns, **changes}


@pytest.fixture
def source(tmp_path, colors):
    (tmp_path / "t.json").write_text(json.dumps([_entry(name) for name in TURNS]))
    return Source(tmp_path / "t.json", colors / "images")


def _parts(source, tmp_path, **options):
    return open_parts(source, tmp_path, val_fraction=0, limit=None, **options)


def _prismatic(llm, name):
    """prismatic's data set, written out: tags deleted, turns stripped and tokenised one by one, labels by turn number;
    (ids, labels) before the patches go in."""
    ids, labels = list(llm.tokenizer("<|endoftext|>", add_special_tokens=False)["input_ids"]), [IGNORE]
    for number, text in enumerate(TURNS[name]):
        text = text.replace("<image>", "").strip()
        if number % 2 == 0:
            role = "<|im_start|>assistant\n" if number + 1 < len(TURNS[name]) else ""
            turn = llm.tokenizer(f"<|im_start|>user\n{text}<|im_end|>{role}", add_special_tokens=False)["input_ids"]
            labels += [IGNORE] * len(turn)
        else:
            turn = llm.tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
            labels += turn
        ids += turn
    return ids, labels


@pytest.mark.parametrize("name", TURNS)
def test_after_bos_an_odd_record_is_trained_as_in_prismatic(source, tmp_path, name):
    """A last question has no loss and nothing after it, so that leaving it out changes nothing."""
    llm = build_llm("mini_qwen2", pretrained=False, device="meta")
    records = _parts(source, tmp_path, odd_records="train").train
    record = next(r for r in records if r.id == name)
    encoded, cut = Encoder(llm, max_text_tokens=300)(record)
    ids, labels = _prismatic(llm, name)
    assert cut == 0 and any(label != IGNORE for label in labels)
    assert encoded.input_ids == ids[: len(encoded.input_ids)] and encoded.labels == labels[: len(encoded.labels)]
    assert set(labels[len(encoded.labels) :]) <= {IGNORE}
    assert (len(encoded.labels) < len(labels)) == (name == "question_last")
    assert encoded.image_slots == ([] if name == "xml" else [1])


def test_in_place_an_odd_record_is_trained_as_in_llava(source, tmp_path, tiny, colors):
    vlm, _ = tiny()
    in_place = build_llm("mini_qwen2", pretrained=False, device="meta", image_slot="in_place")
    records = _parts(source, tmp_path, odd_records="train").train
    loaded = Examples(records, colors / "images", Encoder(in_place, max_text_tokens=300), vlm.backbone.transform)
    examples = {name: loaded[i] for i, name in enumerate(TURNS)}
    texts = {name: in_place.tokenizer.decode(example.encoded.input_ids) for name, example in examples.items()}
    assert "<channel><image><url>x</url></image></channel>" in texts["xml"]
    assert examples["xml"].encoded.image_slots == [] and not examples["xml"].bad_record
    assert "user\n\nLook at  again.<|im_end|>" in texts["two_tags"]
    assert len(examples["two_tags"].encoded.image_slots) == len(examples["two_tags"].pixels) == 1
    # LLaVA: the lengths of the rounds do not add up, so that the whole sample is ignored.
    assert set(examples["question_last"].encoded.labels) == {IGNORE} and examples["question_last"].bad_record
    assert [e.bad_record for e in examples.values()] == [False, False, False, True]


def test_the_sampler_counts_all_words_of_a_record_as_prismatic_does(source, tmp_path):
    records = _parts(source, tmp_path, odd_records="train").train
    assert records.words.tolist() == [sum(len(text.split()) for text in turns) for turns in TURNS.values()]
    assert records.has_image.tolist() == [True, False, True, True]


def test_odd_records_are_refused_by_name_or_left_out_and_counted(source, tmp_path):
    with pytest.raises(
        ValueError, match=r"record 1 \(id xml\): 1 <image> tags but 0 image files.* 2 more records"
    ) as e:
        _parts(source, tmp_path)
    assert "recipe.odd_records=train" in str(e.value) and "data.on_bad_record=skip" in str(e.value)
    parts = _parts(source, tmp_path, on_bad_record="skip")
    assert ([r.id for r in parts.train], len(parts.left_out)) == (["plain"], 3)
    parts = _parts(source, tmp_path, on_bad_record="skip", odd_records="train")
    assert ([r.id for r in parts.train], len(parts.left_out)) == (list(TURNS), 0)


def test_what_nothing_can_train_on_is_left_out_whatever_the_recipe(tmp_path, colors):
    bad = [_entry("plain", id="none", conversations=None), _entry("plain", id="key", image=None, photo="red40.png")]
    (tmp_path / "t.json").write_text(json.dumps([*bad, _entry("question_last"), _entry("plain")]))
    source = Source(tmp_path / "t.json", colors / "images")
    with pytest.raises(ValueError, match=r"record 0 \(id none\).*data.on_bad_record=skip") as error:
        _parts(source, tmp_path, odd_records="train")
    assert "odd_records" not in str(error.value)
    for odd, left_out in (("train", 2), ("refuse", 3)):
        parts = _parts(source, tmp_path, on_bad_record="skip", odd_records=odd)
        assert len(parts.left_out) == left_out and len(parts.train) == 4 - left_out


@pytest.mark.parametrize(("images", "fits"), [(45, True), (46, False)])
def test_more_images_than_positions_are_found_from_the_index(tmp_path, tiny, colors, images, fits):
    vlm, llm = tiny()
    turns = [{"from": "human", "value": "<image>" * images + "\nWhich?"}, {"from": "gpt", "value": "Red."}]
    many = {"id": "many", "image": ["red40.png"] * images, "conversations": turns}
    (tmp_path / "t.json").write_text(json.dumps([_entry("plain"), many]))
    records = open_records(tmp_path / "t.json", tmp_path)
    encoder = Encoder(llm, max_text_tokens=300, max_positions=4 * 45 + 3, tokens_per_image=4)
    if fits:
        check_records(records, encoder)
        return
    message = "Record many: 46 images of 4 visual tokens leave no room for a question and an answer in 183 positions"
    with pytest.raises(ValueError, match=message):
        check_records(records, encoder)
    examples = Examples(records, colors / "images", encoder, vlm.backbone.transform, on_bad_record="skip")
    step = Collate(4, 2)([examples[0], examples[1], examples[Filler(1)]])
    assert (step.bad_rows, step.records) == ([1], 2)
    alone = Collate(4, 2)([examples[0]])
    assert step.num_targets == alone.num_targets
    for batch in step.batches:  # also the one that holds nothing but such records
        loss = vlm(batch.to("cpu"))
        assert loss.count == (alone.num_targets if batch is step.batches[0] else 0)
        loss.total.backward()


COMMON = [
    "data=llava", "data.num_workers=0", "data.val_fraction=0.3", "evaluate.benchmarks=null", "recipe.num_tokens=16",
    "trainer.samples=4", "recipe.global_batch_size=4", "recipe.max_steps=3", "recipe.standardise_features=false",
]  # fmt: skip


def _train(path, colors, out, *arguments):
    line = [*COMMON, f"data.json={path}", f"data.image_root={colors / 'images'}", f"runs_dir={out}", "run_id=x"]
    return main(["train", *line, *arguments])


def test_a_run_says_how_many_records_have_images_and_how_many_were_left_out(tmp_path, colors, caplog):
    entries = json.loads((colors / "train.json").read_text()) + [_entry(name) for name in TURNS]
    entries += [_entry("plain", id="many", image=["red40.png"] * 200)]
    entries[-1]["conversations"][0]["value"] = "<image>" * 200
    (tmp_path / "t.json").write_text(json.dumps(entries))
    assert _train(tmp_path / "t.json", colors, tmp_path / "a", "data.val_fraction=0") == 2
    options = ["data.val_fraction=0", "data.on_bad_record=skip", "recipe.max_steps=null", "recipe.sampler=shuffled",
               "recipe.epochs=2"]  # fmt: skip
    assert _train(tmp_path / "t.json", colors, tmp_path / "a", *options) == 0
    manifest = json.loads((tmp_path / "a" / "x" / "manifest.json").read_text())
    # Nine of the fixture and `plain` remain; `many`, which only its length keeps out, comes twice and counts once.
    assert (manifest["records"], manifest["records_with_images"], manifest["bad_records"]) == (10, 9, 4)
    assert "11 records (10 with images)" in caplog.text
    assert caplog.text.count("Skipping 3 bad records (data.on_bad_record=skip): record 10 (id xml)") == 1
    assert "Record many: 200 images of 16 visual tokens leave no room" in caplog.text


def test_a_bad_record_is_found_before_the_first_step(tmp_path, colors, capsys):
    entries = json.loads((colors / "train.json").read_text())
    entries += [_entry("plain", id="many", image=["red40.png"] * 200)]
    entries[-1]["conversations"][0]["value"] = "<image>" * 200
    (tmp_path / "t.json").write_text(json.dumps(entries))
    for flags in (["--check"], []):
        assert _train(tmp_path / "t.json", colors, tmp_path / "a", *flags) == 2
        assert "Record many: 200 images of 16 visual tokens" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a" / "x" / "metrics.jsonl").exists()


@pytest.mark.parametrize("policy", ["data.on_bad_image=skip", "data.on_bad_record=skip"])
def test_sample_answers_pass_over_what_was_skipped(tmp_path, colors, policy):
    """Every validation record has an image that is gone, or more images than there are positions for."""
    many = [{"from": "human", "value": "<image>" * 200}, {"from": "gpt", "value": "Red."}]
    val = {
        "data.on_bad_image=skip": _entry("plain", image="gone.png"),
        "data.on_bad_record=skip": _entry("plain", image=["red40.png"] * 200, conversations=many),
    }
    path = tmp_path / "val.json"
    path.write_text(json.dumps([val[policy]]))
    assert _train(colors / "train.json", colors, tmp_path, f"data.val_json={path}", policy) == 0


@pytest.mark.parametrize("recipe", ["prism", "llava_v1_5_align", "llava_v1_5_finetune"])
def test_the_strict_recipes_train_on_odd_records_and_others_do_not(recipe):
    assert load_config([f"recipe={recipe}"]).recipe.odd_records == "train"
    assert load_config([]).recipe.odd_records == "refuse"
    assert load_config([]).data.on_bad_record == "fail"
