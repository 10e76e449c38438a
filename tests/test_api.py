"""`prism_deco.load`: one copy of the weights, nothing drawn for the LLM, nothing read twice, every gap named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import prism_deco
from prism_deco.api import Model
from prism_deco.build import build_model
from prism_deco.config import load_config, read_config, save_config
from prism_deco.errors import UsageError

SMALL = ["projector=qformer", "projector.hidden_dim=24", "projector.ffn_dim=48"]


class RandomDraws(TorchDispatchMode):
    """Counts the random numbers drawn into real memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {"normal_", "uniform_"} & {func._schema.name.partition("::")[2]} and not args[0].is_meta:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model():
    config = load_config(["llm.pretrained=false", "recipe.standardise_features=true", "run_id=test", *SMALL])
    torch.manual_seed(4)
    vlm, llm = build_model(config)
    return Model(vlm.eval(), llm, config)


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "export")
    return tmp_path / "export"


def test_nothing_is_drawn_for_the_llm_and_the_seed_stays(folder, model):
    projector = sum(p.numel() for p in model.vlm.projector.parameters())
    language = sum(p.numel() for p in model.vlm.lm.parameters())
    state = torch.get_rng_state()
    with RandomDraws() as draws:
        loaded = prism_deco.load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert draws.count <= 2 * projector < language
    with RandomDraws() as draws:
        build_model(model.config)
    assert draws.count > language / 2, "the counter must see what an ordinary build draws"
    assert not any(tensor.is_meta for tensor in (*loaded.vlm.parameters(), *loaded.vlm.buffers()))


def test_computed_buffers_and_ties_are_those_of_an_ordinary_build(folder, model):
    loaded = prism_deco.load(folder)
    ours, theirs = dict(model.vlm.named_buffers()), dict(loaded.vlm.named_buffers())
    assert ours.keys() == theirs.keys() and any("inv_freq" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    lm = loaded.vlm.lm
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    trained = {name for name, p in model.vlm.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.vlm.named_parameters() if p.requires_grad} == trained


def test_the_projectors_first_weights_are_not_looked_for(folder, model):
    config = read_config(folder / "config.yaml")
    config.projector.weights = "gone.safetensors"
    save_config(config, folder / "config.yaml")
    loaded = prism_deco.load(folder)
    for name, tensor in model.vlm.projector.state_dict().items():
        assert torch.equal(loaded.vlm.projector.state_dict()[name], tensor)


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    for device, says in (("gpu", "has no GPU"), ("cuda:9", "cuda:9: this machine has"), ("gpus", "is not a device")):
        with pytest.raises(UsageError, match=says):
            prism_deco.load(tmp_path / "gone", device=device)


def test_python_completes_the_public_names():
    code = "import sys, prism_deco; print(dir(prism_deco), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['Model', '__doc__', '__version__', 'load', 'load_config', 'train'] False\n"
    assert all(callable(getattr(prism_deco, name)) for name in prism_deco.__all__)


def test_the_notebook_in_the_docstring_runs(colors, tmp_path, monkeypatch):
    shutil.copytree(colors / "images", tmp_path / "images")
    shutil.copy(colors / "train.json", tmp_path)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    lines = [line.removeprefix("    ") for line in prism_deco.__doc__.splitlines() if line.startswith("    ")]
    assert len([line for line in lines if line]) <= 10
    notebook = {}
    exec("\n".join(lines), notebook)
    assert (
        notebook["run"] == Path("runs/first")
        and json.loads(Path("runs/first/status.json").read_text())["state"] == "done"
    )
    seen = notebook["seen"]
    assert len(seen.tokens) == len(seen.text_to_query) and seen.text_to_query.shape[1] == 16


@pytest.fixture(params=["after_bos", "in_place"])
def asked(request):
    """A model, and images of two colours."""
    settings = ["recipe.turn_mask=causal", "recipe.standardise_features=false", "recipe.token_scale=3"]
    config = load_config([*settings, f"recipe.image_slot={request.param}", "run_id=test"])
    torch.manual_seed(4)
    vlm, llm = build_model(config)
    return Model(vlm.eval(), llm, config), Image.new("RGB", (40, 40), "red"), Image.new("RGB", (50, 30), "blue")


def by_hand(model, images, prompt) -> str:
    """Greedy decoding by a slow loop, the visual tokens spliced in one image after the other."""
    encoded = model.llm.encode([{"role": "user", "content": prompt}], len(images), add_generation_prompt=True)
    table = model.vlm.lm.get_input_embeddings()
    visual = [tokens for image in images for tokens in model.encode_images([image])]
    parts, begin = [], 0
    for slot, tokens in zip(encoded.image_slots, visual, strict=True):
        parts += [table(torch.tensor(encoded.input_ids[begin:slot], dtype=torch.long)), tokens]
        begin = slot
    sequence = torch.cat([*parts, table(torch.tensor(encoded.input_ids[begin:]))])
    new: list[int] = []
    with torch.no_grad():
        while len(new) < 6:
            token = int(model.vlm.lm(inputs_embeds=sequence[None]).logits[0, -1].argmax())
            if token in model.llm.eos_ids:
                break
            new.append(token)
            sequence = torch.cat([sequence, table(torch.tensor([token]))])
    return model.llm.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_questions_about_several_images_one_and_none_share_a_batch(asked):
    model, red, blue = asked
    questions = ["Which is larger?", "What color is it?", "Which colors are there?", "Which is larger?"]
    images = [[red, blue], red, None, (blue, red)]
    answers = model.generate(images, questions, max_new_tokens=6)
    listed = [[red, blue], [red], [], [blue, red]]
    assert answers == [by_hand(model, own, question) for own, question in zip(listed, questions, strict=True)]
    assert all(answers[:3]) and len(set(answers)) > 1
    [red_tokens] = model.encode_images([red])
    assert model.generate([[red_tokens, blue], red_tokens], questions[:2], max_new_tokens=6) == answers[:2]
    rows = model.choice_probabilities([[red, blue], [blue, red]], questions[:1] * 2, ["Yes", "No"])
    assert rows.shape == (2, 2) and not torch.equal(rows[0], rows[1])


def test_a_single_question_needs_no_lists(asked, tmp_path):
    model, red, blue = asked
    red.save(tmp_path / "a.png")
    expected = model.generate([red], ["What?"], max_new_tokens=4)
    for image in (red, tmp_path / "a.png", str(tmp_path / "a.png"), model.encode_images([red])[0]):
        assert model.generate(image, "What?", max_new_tokens=4) == expected
    assert model.generate(None, "What?", max_new_tokens=4) == model.generate([None], ["What?"], max_new_tokens=4)
    assert model.generate([red, blue], "What?", max_new_tokens=4) == model.generate([[red, blue]], ["What?"], 4)


def test_a_model_says_what_it_is(asked):
    model, _, _ = asked
    names = [model.config[group].name for group in ("backbone", "projector", "llm")]
    assert all(name in repr(model) for name in names) and repr(model).startswith("Model(backbone=")
    assert repr(model).endswith(f" {len(model.encode_images([Image.new('RGB', (8, 8))])[0])} visual tokens, on cpu)")


def test_no_questions_have_no_answers(asked):
    model, _, _ = asked
    assert model.generate([], []) == []
    assert model.choice_probabilities([], [], ["Yes", "No"]).shape == (0, 2)
    losses, greedy = model.answer_losses([], [], [])
    assert losses.shape == greedy.shape == (0,) and greedy.dtype == torch.bool
    assert model.encode_images([]) == []


@pytest.mark.parametrize("images", ["a.png", None, torch.zeros(16, 48)])
def test_one_image_for_a_list_of_questions_is_refused(asked, images):
    with pytest.raises(UsageError, match="Give a list of images for a list of prompts"):
        asked[0].generate(images, ["What?", "Why?"])
    with pytest.raises(UsageError, match="1 images for 2 prompts: give one entry per prompt"):
        asked[0].generate([None], ["What?", "Why?"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "lm.model.norm.weight"}, "missing lm.model.norm.weight"),
        (
            lambda w: {k: v for k, v in w.items() if "embed" not in k and "lm_head" not in k},
            "missing lm.lm_head.weight",
        ),
        (lambda w: w | {"lm.extra": torch.zeros(2)}, "unexpected lm.extra"),
        (lambda w: w | {"lm.model.norm.weight": torch.zeros(3)}, "lm.model.norm.weight: copying a param with shape"),
        (lambda w: {k: v for k, v in w.items() if k != "feature_mean"}, "missing feature_mean"),
    ],
)
def test_what_does_not_fit_is_named(folder, change, message):
    file = folder / "model.safetensors"
    save_file(change({name: tensor.clone() for name, tensor in load_file(file).items()}), file)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError) as error:
        prism_deco.load(folder)
    assert message in " ".join(str(error.value).split())


def test_half_precision_leaves_computed_buffers_exact(folder, model):
    loaded = prism_deco.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.vlm.parameters()} == {torch.bfloat16}
    assert loaded.vlm.feature_mean.dtype == torch.bfloat16
    exact = model.vlm.lm.model.rotary_emb.inv_freq
    assert torch.equal(loaded.vlm.lm.model.rotary_emb.inv_freq, exact) and exact.dtype == torch.float32
