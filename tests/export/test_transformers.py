"""Plain transformers computes the same logits from the exported folder."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaNextVideoConfig
from transformers.models.llava_next_video.modeling_llava_next_video import (
    LlavaNextVideoMultiModalProjector,
    LlavaNextVideoPooler,
)

from prism_deco.api import Model
from prism_deco.cli import main
from prism_deco.config import load_choice
from prism_deco.export import save_transformers
from prism_deco.projectors import build_projector
from prism_deco.sequence import build_batch

# float32 sums in another order, through a few layers; logits are of order 1 to 10.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
FOLDED = ["recipe.standardise_features=true", "recipe.token_scale=0.5"]
AVERAGE = ["projector=avgpool", "projector.num_tokens=4"]
MAXIMUM = ["projector=maxpool", "projector.num_tokens=4"]
DECO = ["recipe.prompt_set=deco", "recipe.image_slot=after_first_token"]
SHUFFLE = ["projector=pixel_shuffle", "projector.num_tokens=4"]
CLASSES = {"linear": "Llava", "avgpool": "LlavaNextVideo", "maxpool": "LlavaNextVideo", "pixel_shuffle": "InternVL"}
TOWERS = {
    "clip": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "vit": "InternVLVisionModel",
    "plain": "InternVLVisionModel",
}
QUESTIONS = ["What color is it?", "How many circles are there?"]


def photo(size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A smooth picture: sharp noise would test the resampling filters of two libraries."""
    return Image.radial_gradient("L").resize(size).convert("RGB")


def our_logits(vlm, llm, image, question) -> tuple[list[int], torch.Tensor]:
    """The text's token ids and the logits at all positions."""
    encoded = llm.encode([{"role": "user", "content": question}], num_images=1, add_generation_prompt=True)
    pixels = {name: p[None] for name, p in vlm.backbone.transform(image).items()}
    with torch.no_grad():
        hidden = vlm.hidden_states(build_batch([encoded], vlm.projector.num_tokens, pixels=pixels))
        return encoded.input_ids, vlm.logits(hidden)[0]


@pytest.mark.parametrize(
    ("tower", "llm", "options"),
    [
        ("clip", "mini_qwen2", []),
        ("clip", "mini_llama", FOLDED),
        ("siglip", "mini_qwen2", FOLDED),
        ("siglip", "mini_phi", []),
        ("clip", "mini_qwen2", ["backbone.layer=-1", "backbone.image_size=35"]),
        ("siglip", "mini_llama", ["backbone.layer=0", "backbone.resize=resize-naive"]),
        ("vit", "mini_llama", FOLDED),
        ("clip", "mini_llama", [*AVERAGE, *FOLDED]),
        ("siglip", "mini_qwen2", [*AVERAGE, "projector.mlp_bias=false", "backbone.image_size=39"]),
        ("clip", "mini_phi", [*MAXIMUM, *FOLDED]),
        ("siglip", "mini_qwen2", [*MAXIMUM, "projector.num_tokens=1"]),
        ("vit", "mini_qwen2", [*SHUFFLE, "recipe.token_scale=0.5"]),
        ("plain", "mini_llama", [*SHUFFLE, "projector.num_tokens=1"]),
    ],
)
def test_the_logits_are_the_same(random_model, tmp_path, tower, llm, options):
    config, vlm, language = random_model(tower, f"llm={llm}", *options)
    save_transformers(tmp_path / "hf", config, vlm, language)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == f"{CLASSES[config.projector.name]}ForConditionalGeneration"
    assert type(model.model.vision_tower).__name__ == TOWERS[tower]
    of_video = CLASSES[config.projector.name] == "LlavaNextVideo"
    token_id = model.config.video_token_id if of_video else model.config.image_token_id
    seen = lambda pixels: {"pixel_values_videos": pixels[:, None]} if of_video else {"pixel_values": pixels}  # noqa: E731
    image = photo()
    pixels = vlm.backbone.transform(image)[f"tiny_{tower}"][None]
    for question in QUESTIONS:
        ids, expected = our_logits(vlm, language, image, question)
        # By hand: the beginning of the sequence, the image, the text.
        spliced = [ids[0], *[token_id] * vlm.projector.num_tokens, *ids[1:]]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([spliced]), **seen(pixels)).logits[0]
        torch.testing.assert_close(found[:, : expected.shape[1]], expected, **TOLERANCE)
        assert expected.std() > 0.1
    another = torch.zeros_like(pixels)
    assert not torch.allclose(model(input_ids=torch.tensor([spliced]), **seen(another)).logits[0], found, atol=0.01)


@pytest.mark.parametrize(("name", "mode"), [("avgpool", "average"), ("maxpool", "max")])
@pytest.mark.parametrize(("grid", "tokens"), [(24, 144), (24, 64), (27, 81)])
def test_pooling_is_that_of_llava_next_video(name, mode, grid, tokens):
    """transformers' modules with the weights of ours, real grids and float32."""
    torch.manual_seed(0)
    ours = build_projector(name, in_dim=32, out_dim=48, in_grid=(grid, grid), num_tokens=tokens)
    config = LlavaNextVideoConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_attention_heads": 2,
            "patch_size": 14,
        },
        text_config={"model_type": "llama", "hidden_size": 48, "num_attention_heads": 2},
        spatial_pool_mode=mode,
        spatial_pool_stride=grid // ours.out_grid[0],
    )
    theirs = torch.nn.Sequential(LlavaNextVideoPooler(config), LlavaNextVideoMultiModalProjector(config))
    first, last = (layer for layer in ours.mlp if isinstance(layer, torch.nn.Linear))
    theirs[1].linear_1, theirs[1].linear_2 = first, last
    features = torch.randn(2, grid**2, 32)
    torch.testing.assert_close(theirs(features), ours(features), rtol=0, atol=1e-7)


def test_plain_transformers_answers_alike(random_model, tmp_path):
    """A fresh process that never imports this package: processor, chat template, generation."""
    config, vlm, llm = random_model("clip", "llm=mini_qwen2", "backbone.resize=pad", *FOLDED)
    save_transformers(tmp_path / "hf", config, vlm, llm)
    photo().save(tmp_path / "photo.png")
    script = f"""
import json, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained({str(tmp_path / "hf")!r})
processor = AutoProcessor.from_pretrained({str(tmp_path / "hf")!r})
content = [{{"type": "image", "url": {str(tmp_path / "photo.png")!r}}}, {{"type": "text", "text": {QUESTIONS[0]!r}}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=6)
new = output[0, inputs["input_ids"].shape[1]:]
print(json.dumps({{"ids": inputs["input_ids"][0].tolist(), "pixels": inputs["pixel_values"].flatten().tolist(),
                   "text": processor.decode(new, skip_special_tokens=True).strip()}}))
"""
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True)
    found = json.loads(shown.stdout.splitlines()[-1])
    ids, _ = our_logits(vlm, llm, photo(), QUESTIONS[0])
    image_id = json.loads((tmp_path / "hf" / "config.json").read_text())["image_token_index"]
    assert found["ids"] == [ids[0], *[image_id] * 16, *ids[1:]]
    assert image_id not in ids
    # One of 255 levels, in units of the normalised pixels.
    pixels = vlm.backbone.transform(photo())["tiny_clip"].flatten()
    assert (torch.tensor(found["pixels"]) - pixels).abs().max() < 1.01 / 255 / 0.26
    assert found["text"] == Model(vlm, llm, config).generate([photo()], QUESTIONS[:1], max_new_tokens=6)[0]


def test_the_code_of_the_card_answers_as_the_trained_model(random_model, tmp_path):
    """In a process that never imports this package: the README's own lines, for all classes and ways to resize."""
    models = {
        "average": (
            "clip",
            ["llm=mini_llama", "llm.pretrained=true", "backbone.resize=resize-naive", *AVERAGE, *FOLDED, *DECO],
        ),
        "maximum": ("siglip", ["llm=mini_qwen2", "backbone.resize=letterbox", *MAXIMUM]),
        "cropped": ("clip", ["llm=mini_phi", "backbone.resize=resize-crop", *AVERAGE]),
        "shuffle": ("vit", ["llm=mini_qwen2", "backbone.resize=pad", *SHUFFLE]),
        "linear": ("siglip", ["llm=mini_qwen2", "backbone.resize=letterbox", *FOLDED]),
    }
    photo().save(tmp_path / "image.jpg", quality=100)
    image = Image.open(tmp_path / "image.jpg")
    expected, others = {}, {}
    for name, (tower, options) in models.items():
        config, vlm, llm = random_model(tower, *options)
        model = Model(vlm, llm, config)
        question = ["What is in the image?"]
        expected[name] = model.generate([image], question, max_new_tokens=8)[0]
        others[name] = model.generate([Image.new("RGB", (50, 40))], question, max_new_tokens=8)[0]
        save_transformers(tmp_path / name, config, vlm, llm)
    script = """
import contextlib, io, json, sys
for name in sys.argv[1:]:
    code = open(f"{name}/README.md").read().split("```python")[1].split("```")[0]
    code = code.replace("THIS_FOLDER", name).replace("max_new_tokens=64", "max_new_tokens=8")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(code, {})
    print(json.dumps([name, shown.getvalue().strip()]))
assert not [name for name in sys.modules if name.startswith("prism_deco")]
"""
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run(
        [sys.executable, "-c", script, *models],
        check=True, env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert dict(map(json.loads, shown.stdout.splitlines()[-len(models) :])) == expected
    assert sum(expected[name] != others[name] for name in models) >= 3, "answers hang on the image"


@pytest.mark.parametrize("resize", ["letterbox", "pad"])
def test_the_card_pads_for_a_class_of_videos_as_training_does(random_model, tmp_path, resize):
    """Sizes of odd and even differences, larger and smaller than the tower's input."""
    config, vlm, llm = random_model("clip", *AVERAGE, f"backbone.resize={resize}")
    save_transformers(tmp_path / "hf", config, vlm, llm)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    code = (tmp_path / "hf" / "README.md").read_text().split('convert("RGB")\n')[1].split("question =")[0]
    for size in ((50, 40), (50, 41), (9, 14), (31, 60), (640, 427)):
        seen = {"image": photo(size), "Image": Image}
        exec(code, seen)
        found = processor.video_processor(videos=[[seen["image"]]], return_tensors="pt")["pixel_values_videos"][0, 0]
        expected = vlm.backbone.transform(photo(size))["tiny_clip"]
        assert (found - expected).abs().max() < 2.01 / 255 / 0.26, size


@pytest.mark.parametrize("projector", [[], AVERAGE])
def test_the_plain_prompt_is_exported(random_model, tmp_path, caplog, projector):
    """That of the alignment stage: the image alone."""
    config, vlm, llm = random_model("clip", "llm=mini_qwen2", "recipe.prompt=plain", "backbone.resize=pad", *projector)
    save_transformers(tmp_path / "hf", config, vlm, llm)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    kind = "video" if projector else "image"
    talk = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    encoded = llm.encode([{"role": "user", "content": "What is it?"}], num_images=1, add_generation_prompt=True)
    assert prompt == f"{llm.tokenizer.bos_token}<{kind}>" and encoded.input_ids == [llm.tokenizer.bos_token_id]
    assert "tokens differ" not in caplog.text
    assert "A prompt is the image alone" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize("projector", [[], AVERAGE])
def test_a_tag_in_a_text_is_dropped_as_in_training(random_model, tmp_path, projector):
    config, vlm, llm = random_model("clip", "llm=mini_qwen2", "backbone.resize=pad", *projector)
    save_transformers(tmp_path / "hf", config, vlm, llm)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    image = {"type": "video", "video": [photo()]} if projector else {"type": "image", "image": photo()}

    def ids(text):
        talk = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
        options = {"return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        return processor.apply_chat_template(talk, tokenize=True, **options)["input_ids"][0].tolist()

    assert ids("<image>\nWhat is it?") == ids("What is it?")


def test_answers_in_a_batch_are_the_answers_one_by_one(random_model, tmp_path):
    """In a process that never imports this package; questions of very different lengths."""
    questions = ["What color is it" + " or how many circles are there" * n + "?" for n in range(8)]
    photo().save(tmp_path / "photo.png")
    for llm in ("mini_qwen2", "mini_llama", "mini_phi"):
        config, vlm, language = random_model("clip", f"llm={llm}", "backbone.resize=pad")
        save_transformers(tmp_path / llm, config, vlm, language)
        if llm == "mini_qwen2":  # whose prompts are the same tokens there
            expected = Model(vlm, language, config).generate([photo()] * 8, questions, max_new_tokens=6)
    script = f"""
import json
from pathlib import Path
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

def answers(model, processor, image, questions):
    talks = [[{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": q}}]}}] for q in questions]
    prompts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    inputs = processor(
        images=[image] * len(prompts), text=prompts, padding=True, add_special_tokens=False, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    return [processor.decode(row, skip_special_tokens=True).strip() for row in new]

for llm in ("mini_qwen2", "mini_llama", "mini_phi"):
    folder = Path({str(tmp_path)!r}) / llm
    parts = [kind.from_pretrained(folder) for kind in (LlavaForConditionalGeneration, AutoProcessor)]
    parts.append(Image.open(folder.with_name("photo.png")))
    batched = answers(*parts, {questions!r})
    print(json.dumps([llm, batched, [answers(*parts, [question])[0] for question in {questions!r}]]))
"""
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True)
    answers = {llm: (batched, single) for llm, batched, single in map(json.loads, shown.stdout.splitlines()[-3:])}
    for batched, single in answers.values():
        assert batched == single and len(set(single)) > 1
    assert answers["mini_qwen2"][1] == expected


@pytest.mark.parametrize("kind", ["rotated", "16-bit"])
def test_the_card_shows_how_to_open_images_as_in_training(random_model, tmp_path, kind):
    """From a path, transformers turns images by their EXIF tag and does not scale 16-bit values."""
    config, vlm, llm = random_model("clip", "llm=mini_qwen2", "backbone.resize=pad")
    save_transformers(tmp_path / "hf", config, vlm, llm)
    path = tmp_path / "image.png"
    if kind == "rotated":
        image = photo()
        image.paste((255, 0, 0), (0, 0, 10, 10))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    else:
        Image.fromarray((np.add.outer(np.arange(40), np.arange(50)) * 700).astype(np.uint16)).save(path)
    expected = vlm.backbone.transform(Image.open(path))["tiny_clip"]
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")

    def pixels(**source):
        talk = [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "What is it?"}]}]
        return processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")["pixel_values"]

    level = 1.01 / 255 / 0.26
    assert (pixels(image=Image.open(path).convert("RGB"))[0] - expected).abs().max() < level
    assert (pixels(url=str(path))[0] - expected).abs().max() > 50 * level
    card = (tmp_path / "hf" / "README.md").read_text()
    assert 'image = Image.open("image.jpg").convert("RGB")' in card
    assert "EXIF" in card and "16-bit" in card and "padding=True" in card


@pytest.mark.parametrize(
    ("llm", "prompt"),
    [
        ("mini_qwen2", "<|im_start|><image>user\nWhat is it?<|im_end|><|im_start|>assistant\n"),
        ("mini_phi", "Q<image>: What is it? A:"),
        ("mini_llama", "<s><image> Q: What is it? A:"),
    ],
)
def test_behind_the_first_token_of_a_prompt_set(random_model, tmp_path, caplog, llm, prompt):
    options = ["recipe.prompt_set=deco", "recipe.image_slot=after_first_token", "backbone.resize=pad"]
    config, vlm, language = random_model("clip", f"llm={llm}", *options)
    save_transformers(tmp_path / "hf", config, vlm, language)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "}]}]
    assert processor.apply_chat_template(talk, add_generation_prompt=True) == prompt
    text_only = [{"role": "user", "content": "What is it?"}]
    assert processor.apply_chat_template(text_only, add_generation_prompt=True) == prompt.replace(
        "<image> ", ""
    ).replace("<image>", "")
    assert "right after the first token" in (tmp_path / "hf" / "README.md").read_text()
    assert ("some tokens differ" in caplog.text) == (llm == "mini_llama"), "whose answers follow a turn of their own"


@pytest.mark.parametrize("slot", ["after_bos", "in_place"])
def test_where_the_template_puts_the_image(random_model, tmp_path, slot):
    config, vlm, llm = random_model("clip", "llm=mini_qwen2", f"recipe.image_slot={slot}")
    save_transformers(tmp_path / "hf", config, vlm, llm)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    image, text = {"type": "image"}, {"type": "text", "text": " What is it? "}
    talk = [{"role": "user", "content": [text, image]}]
    prompt = {
        "after_bos": "<|endoftext|><image><|im_start|>user\nWhat is it?<|im_end|><|im_start|>assistant\n",
        "in_place": "<|endoftext|><|im_start|>user\n<image>\nWhat is it?<|im_end|><|im_start|>assistant\n",
    }[slot]
    assert processor.apply_chat_template(talk, add_generation_prompt=True) == prompt
    plain = [{"role": "user", "content": "<image>\nWhat is it?"}]
    assert processor.apply_chat_template(plain, add_generation_prompt=True) == prompt
    text_only = processor.apply_chat_template([{"role": "user", "content": [text]}], add_generation_prompt=True)
    assert text_only == "<|endoftext|><|im_start|>user\nWhat is it?<|im_end|><|im_start|>assistant\n"
    note = {"after_bos": "right after the beginning-of-sequence token", "in_place": "at the start of its message"}[slot]
    assert note in (tmp_path / "hf" / "README.md").read_text()


def test_a_table_without_a_free_row_grows_one(random_model, tmp_path):
    """The new rows are never generated, whatever their logits."""
    mini = load_choice("llm", "mini_llama")
    rows = 672  # the tokenizer's size, pad token included
    path = tmp_path / "tight.yaml"
    mini |= {"architecture": mini["architecture"] | {"vocab_size": rows}, "pad_to_multiple_of": None}
    path.write_text(yaml.safe_dump({k: v for k, v in mini.items() if k != "name"}))
    config, vlm, llm = random_model("clip", f"llm={path}")
    assert llm.embedding_rows == len(llm.tokenizer) == rows
    save_transformers(tmp_path / "hf", config, vlm, llm)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert model.config.image_token_id == rows and model.lm_head.weight.shape[0] == 704
    assert model.generation_config.suppress_tokens == list(range(rows, 704))


@pytest.mark.parametrize(
    ("tower", "options", "reasons"),
    [
        ("mini_clip", [], ["(a convolutional stem)"]),
        ("mini_dinov2_siglip", [], ["has several vision towers"]),
        ("clip", [*AVERAGE, "projector.num_tokens=9"], ["into windows of several sizes"]),
        ("clip", [*AVERAGE, "projector.after_mlp=true"], ["that class pools in front of the MLP"]),
        (
            "clip",
            ["projector=qformer", "projector.num_tokens=4"],
            ["no class of transformers has the projector QFormer"],
        ),
        ("clip", [*SHUFFLE, *FOLDED], ["its tower is a CLIPVisionModel", "that class has the norm first"]),
        ("vit", MAXIMUM, ["whose image size that class does not read"]),
        ("vit", [*SHUFFLE, "projector.norm=patch"], ["(projector.norm=window)"]),
        ("vit", [*SHUFFLE, "backbone.image_size=48"], ["its windows have 3x3 patches"]),
        ("clip", ["projector.mlp_depth=3"], ["MLP of widths [128, 128, 128]"]),
        ("clip", ["recipe.turn_mask=block", "recipe.blind=true"], ["turn_mask=block", "trained blind"]),
    ],
)
def test_what_the_class_cannot_hold_is_refused_with_every_reason(
    random_model, tmp_path, tower, options, reasons, capsys
):
    config, vlm, llm = random_model(tower, *options)
    Model(vlm, llm, config).save(tmp_path / "export")
    assert main(["export", str(tmp_path / "export"), "--to", str(tmp_path / "hf"), "--hf"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert all(reason in shown for reason in reasons) and "Export it without --hf" in shown
    assert not (tmp_path / "hf").exists()


def test_an_output_bias_is_refused_unless_it_is_zero(random_model, tmp_path):
    config, vlm, llm = random_model("clip", "llm=mini_phi")
    assert not vlm.lm.lm_head.bias.any()
    vlm.lm.lm_head.bias.data[5] = 0.1
    with pytest.raises(ValueError, match="output layer of PhiForCausalLM has a bias"):
        save_transformers(tmp_path / "hf", config, vlm, llm)


def test_what_is_not_exact_is_said(random_model, tmp_path, caplog):
    config, vlm, llm = random_model("clip", "llm=mini_llama")
    save_transformers(tmp_path / "hf", config, vlm, llm)
    card = (tmp_path / "hf" / "README.md").read_text()
    for note in ("resize=letterbox", "llm.tokenize=per_turn"):
        assert note in caplog.text and note in card
    config, vlm, llm = random_model("clip", "llm=mini_qwen2", "backbone.resize=pad")
    caplog.clear()
    save_transformers(tmp_path / "exact", config, vlm, llm)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_command_writes_half_precision_after_comparing_in_full(random_model, tmp_path):
    config, vlm, llm = random_model("siglip")
    Model(vlm, llm, config).save(tmp_path / "export")
    command = ["export", str(tmp_path / "export"), "--to", str(tmp_path / "hf"), "--hf", "--dtype", "bfloat16"]
    assert main(command) == 0
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for file in (tmp_path / "hf").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
