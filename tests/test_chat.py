"""The terminal conversation: what the model is shown, what it streams, and how one leaves."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from prism_deco.api import Model
from prism_deco.build import build_model
from prism_deco.commands.chat import Chat, converse
from prism_deco.config import load_config

PLAIN = ["llm.pretrained=false", "llm=mini_qwen2", "recipe.standardise_features=false", "run_id=test"]


@pytest.fixture(scope="module")
def models():
    """Random models by `recipe.turn_mask`."""
    result = {}
    for mask in ("causal", "block"):
        config = load_config([*PLAIN, f"recipe.turn_mask={mask}"])
        torch.manual_seed(2)
        vlm, llm = build_model(config)
        result[mask] = Model(vlm.eval(), llm, config)
    return result


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (50, 40), (220, 20, 20)).save(path)
    return path


def by_hand(model: Model, image, messages) -> str:
    """Greedy decoding by a slow loop over the whole sequence."""
    encoded = model.llm.encode(messages, num_images=1, add_generation_prompt=True)
    [visual] = model.encode_images([image])
    table = model.vlm.lm.get_input_embeddings()
    text = table(torch.tensor(encoded.input_ids))
    [slot] = encoded.image_slots
    sequence = torch.cat([text[:slot], visual, text[slot:]])
    new: list[int] = []
    with torch.no_grad():
        while len(new) < 12:
            token = int(model.vlm.lm(inputs_embeds=sequence[None]).logits[0, -1].argmax())
            if token in model.llm.eos_ids:
                break
            new.append(token)
            sequence = torch.cat([sequence, table(torch.tensor([token]))])
    return model.llm.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_history_is_shown_through_the_llms_template(models, image, capsys):
    chat = Chat(models["causal"], max_new_tokens=12)
    chat.show([image])
    messages = []
    for question in ("What color is it?", "How many circles are there?", "Why?"):
        messages.append({"role": "user", "content": question})
        expected = by_hand(models["causal"], image, messages)
        assert chat.ask(question) == expected
        assert capsys.readouterr().out.strip() == expected
        messages.append({"role": "assistant", "content": expected})
    assert chat.messages == messages
    chat.obey("/reset")
    assert chat.ask("Why?") == by_hand(models["causal"], image, [{"role": "user", "content": "Why?"}])


def test_rounds_trained_apart_are_asked_apart(models, image):
    chat = Chat(models["block"], max_new_tokens=12)
    chat.show([image])
    chat.ask("What color is it?")
    assert chat.ask("Why?") == by_hand(models["block"], image, [{"role": "user", "content": "Why?"}])


def test_a_conversation_about_two_images(models, image, tmp_path, capsys):
    blue = tmp_path / "a blue.png"
    Image.new("RGB", (30, 60), "blue").save(blue)
    model = models["causal"]
    chat = Chat(model, max_new_tokens=8, relevance=tmp_path / "maps")
    lines = iter([f"/image {image} '{blue}'", "Which is larger?", f"/image {blue}", f"/image '{blue}", "/quit"])
    converse(chat, lambda: next(lines))
    [answer] = model.generate([[image, blue]], ["Which is larger?"], max_new_tokens=8)
    text = capsys.readouterr().out
    assert f"Now looking at {image} and {blue}.\n{answer}\n" in text
    assert f"Now looking at {blue}.\n" in text and "No closing quotation" in text
    assert not (tmp_path / "maps").exists(), "relevance is that of a single image"


def test_another_conversation_replaces_no_picture(models, image, tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(Chat, "_explain", lambda chat, folder, *_: folder.mkdir(parents=True) or folders.append(folder))
    monkeypatch.setattr("prism_deco.inference.reply", lambda *_, **__: "Red.")
    for questions in (2, 1):
        chat = Chat(models["block"], relevance=tmp_path / "maps")
        chat.show([image])
        for _ in range(questions):
            chat.ask("Why?")
    assert [folder.name for folder in folders] == ["answer_01", "answer_02", "answer_03"]


def test_an_image_that_cannot_be_read_is_named(models, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    lines = iter([f"/image {tmp_path}/gone.png", f"/image {tmp_path}", f"/image {tmp_path}/text.png", "/quit"])
    converse(Chat(models["causal"]), lambda: next(lines))
    said = capsys.readouterr().out
    assert "gone.png cannot be read" in said and f"{tmp_path} cannot be read" in said
    assert "text.png cannot be decoded as an image (its format is none of JPEG" in said


def test_words_are_written_before_the_answer_is_whole(models, image, monkeypatch):
    """At each token, what was written before."""
    written: list[str] = []
    lengths = []
    chat = Chat(models["causal"], max_new_tokens=12)
    chat.show([image])
    monkeypatch.setattr("builtins.print", lambda text, **_: written.append(text))
    forward = models["causal"].vlm.lm.forward
    monkeypatch.setattr(
        models["causal"].vlm.lm, "forward", lambda *a, **k: lengths.append(len(written)) or forward(*a, **k)
    )
    answer = chat.ask("What color is it?")
    assert "".join(written) == answer and 0 < lengths[-1] < len(written)


def test_a_conversation_that_fills_the_context_can_be_begun_anew(models, capsys):
    chat = Chat(models["causal"], max_new_tokens=2)
    lines = iter(["word " * 3000, "/reset", "Hello"])
    converse(chat, lambda: next(lines, "/quit"))
    assert "leaves no room for an answer" in capsys.readouterr().out
    assert [message["content"] for message in chat.messages][:1] == ["Hello"]


def test_half_a_surrogate_pair_is_said_and_the_conversation_goes_on(models, capsys):
    """A terminal hands on bytes that are not UTF-8 like that."""
    lines = iter(["a \udcff", "Hello", "/quit"])
    converse(Chat(models["causal"], max_new_tokens=2), lambda: next(lines))
    assert capsys.readouterr().out.count("half of a surrogate pair") == 1
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        models["causal"].generate([None], ["a \ud83d"])
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        models["causal"].answer_losses([None], ["q"], ["a \ud83d"])


def test_ctrl_c_leaves(models, capsys):
    def interrupted() -> str:
        raise KeyboardInterrupt

    converse(Chat(models["causal"]), interrupted)
    assert capsys.readouterr().out.endswith("\n\n")


@pytest.mark.slow
def test_the_command_reads_a_pipe(models, image, tmp_path):
    models["block"].save(tmp_path / "export")
    lines = ["What color is it?", "/image gone.png", f"/image {image}", "/dance", "How many?", "/quit", "never asked"]
    arguments = [str(tmp_path / "export"), "--image", str(image), "--max-new-tokens", "4", "--relevance"]
    several = [*arguments[:3], "--image", str(image), *arguments[3:]]
    command = [sys.executable, "-m", "prism_deco.cli", "chat", *arguments]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    shown = done.stdout
    for line in ("gone.png", f"Now looking at {image}.", "Unknown command /dance"):
        assert line in shown
    done = subprocess.run([*command[:4], *several], input="How many?", capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "--relevance explains answers about one image, not 2" in done.stderr
    overlays = sorted((tmp_path / "export" / "chat").glob("answer_*/r-gae/sentence.png"))
    assert 1 <= len(overlays) <= 2  # an empty answer has none
    assert all(f"[{path}]" in shown for path in overlays)
    width, height = Image.open(overlays[0]).size
    assert width / height == pytest.approx(50 / 40, rel=0.01)
