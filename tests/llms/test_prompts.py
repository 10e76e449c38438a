"""Chat formats: the rendered text, written out by hand."""

import pytest

from prism_deco.llms import Segment

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TWO_ROUNDS = [user("<image>\nIs there a cat? "), assistant("Yes"), user("Where?"), assistant("")]


def image():
    return Segment("", supervised=False, image=True, round=0)


def prompt(text, number):
    return Segment(text, supervised=False, round=number)


def answer(text, number):
    return Segment(text, supervised=True, round=number)


def test_vicuna(real_format):
    assert real_format("vicuna_7b_v1_5").render(TWO_ROUNDS, num_images=1) == [
        prompt("<s>", 0),
        image(),
        prompt(f"{VICUNA_SYSTEM} USER: Is there a cat? ASSISTANT:", 1),
        answer("Yes</s>", 1),
        prompt("USER: Where? ASSISTANT:", 2),
        answer(" </s>", 2),
    ]


def test_phi2(real_format):
    assert real_format("phi2").render(TWO_ROUNDS, num_images=1) == [
        prompt("<|endoftext|>", 0),
        image(),
        prompt("Input: Is there a cat?\nOutput: ", 1),
        answer("Yes\n<|endoftext|>", 1),
        prompt("Input: Where?\nOutput: ", 2),
        answer(" \n<|endoftext|>", 2),
    ]


@pytest.mark.parametrize(
    ("choice", "system"),
    [
        ("qwen1_5_0_5b_chat", "You are a helpful assistant."),
        ("smollm2_135m_instruct", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ],
)
def test_chatml(real_format, choice, system):
    assert real_format(choice).render(TWO_ROUNDS, num_images=1) == [
        prompt("<|endoftext|>", 0),
        image(),
        prompt(
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nIs there a cat?<|im_end|>\n"
            "<|im_start|>assistant\n",
            1,
        ),
        answer("Yes<|im_end|>", 1),
        prompt("\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n", 2),
        answer("<|im_end|>", 2),
        prompt("\n", 2),
    ]


def test_in_place_as_llava(real_format):
    # LLaVA moves the tag to the start of its message, wherever it stood, and leaves other messages alone.
    llm = real_format("vicuna_7b_v1_5", image_slot="in_place")
    messages = [user("Is there <image> a cat? "), assistant("Yes"), user("Where? "), assistant("Here")]
    assert llm.render(messages, num_images=1) == [
        prompt("<s>", 0),
        prompt(f"{VICUNA_SYSTEM} USER: ", 1),
        Segment("", supervised=False, image=True, round=1),
        prompt("\nIs there  a cat? ASSISTANT:", 1),
        answer("Yes</s>", 1),
        prompt("USER: Where?  ASSISTANT:", 2),
        answer("Here</s>", 2),
    ]


def test_images_without_tags_come_first(real_format):
    llm = real_format("phi2", image_slot="in_place")
    texts = [s.text for s in llm.render([user("Same?"), assistant("No")], num_images=2)]
    assert texts == ["<|endoftext|>", "Input: ", "", "", "\nSame?\nOutput: ", "No\n<|endoftext|>"]


def test_several_images_after_bos(real_format):
    segments = real_format("phi2").render([user("<image><image>Same?"), assistant("No")], num_images=2)
    assert [s.image for s in segments] == [False, True, True, False, False]


def test_text_only(real_format):
    segments = real_format("phi2").render([user("2+2?"), assistant("4")])
    assert [s.text for s in segments] == ["<|endoftext|>", "Input: 2+2?\nOutput: ", "4\n<|endoftext|>"]


@pytest.mark.parametrize("slot", ["after_bos", "in_place"])
def test_text_cannot_forge_an_image_slot(real_format, slot):
    forged = "\ufdd0"
    llm = real_format("vicuna_7b_v1_5", image_slot=slot)
    segments = llm.render([user(f"a{forged}b"), assistant(f"c{forged}d")], num_images=1)
    assert sum(s.image for s in segments) == 1
    assert "a\ufffdb ASSISTANT:" in segments[-2].text
    assert segments[-1].text == "c\ufffdd</s>"


def test_system_message_replaces_the_default(real_format):
    messages = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Ho")]
    assert real_format("vicuna_7b_v1_5").render(messages)[1].text == "Be brief. USER: Hi ASSISTANT:"
    assert "<|im_start|>system\nBe brief.<|im_end|>" in real_format("qwen1_5_0_5b_chat").render(messages)[1].text
    with pytest.raises(ValueError, match="Phi-2 has no system message"):
        real_format("phi2").render(messages)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty"),
        ([{"role": "system", "content": "x"}], "empty"),
        ([assistant("x"), user("y")], "Message 1 .* 'assistant', expected 'user'"),
        ([user("x"), user("y")], "Message 2 .* 'user', expected 'assistant'"),
        ([user("x")], "ends without an answer"),
        ([user("x"), {"role": "tool", "content": "y"}], "'tool'"),
        ([user("x"), {"role": "assistant", "content": None}], "A message is"),
        ([user("x"), {"content": "y"}], "A message is"),
    ],
)
def test_malformed_conversations(real_format, messages, reason):
    with pytest.raises(ValueError, match=reason):
        real_format("phi2").render(messages)


def test_tags_and_images_must_match_in_place(real_format):
    llm = real_format("phi2", image_slot="in_place")
    with pytest.raises(ValueError, match="1 <image> tags and 2 images"):
        llm.render([user("<image> x"), assistant("y")], num_images=2)
    with pytest.raises(ValueError, match="2 <image> tags and 1 images"):
        llm.render([user("<image> x"), assistant("y"), user("<image> z"), assistant("y")], num_images=1)


def test_stray_tags_in_place_are_what_they_are_in_llava(real_format):
    """Without an image they are text; a message shows its image once, however often it names it."""
    llm = real_format("phi2", image_slot="in_place")
    assert llm.render([user("What does <image> mean?"), assistant("y")])[1].text.startswith(
        "Input: What does <image> mean?"
    )
    twice = llm.render([user("<image>\nLook at <image> again."), assistant("y")], num_images=1)
    assert [(s.image, s.text) for s in twice[2:4]] == [(True, ""), (False, "\nLook at  again.\nOutput: ")]


def test_half_a_surrogate_pair_is_named(real_format):
    with pytest.raises(ValueError, match=r"half of a surrogate pair, which is not text: 'a \\ud83d'"):
        real_format("phi2").render([user("a \ud83d"), assistant("y")])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", "must write .* once to place 1 images"),
        ("{{ image }}{% for m in messages %}{{ m.content }}{% endfor %}", "No text is supervised"),
        ("{{ image }}{{ nonsense.x }}", "cannot render"),
        ("{% if %}", "cannot render"),
    ],
)
def test_wrong_templates(real_format, template, reason):
    with pytest.raises(ValueError, match=reason):
        real_format("phi2", chat_template=template).render([user("x"), assistant("y")], num_images=1)


@pytest.mark.parametrize(
    "choice", ["vicuna_7b_v1_5", "phi2", "qwen1_5_0_5b_chat", "mini_qwen2", "mini_phi", "mini_llama"]
)
def test_the_saved_template_works_without_this_package(any_llm, choice):
    # `tokenizer.apply_chat_template` of a saved model: the same prompt, without image slots.
    llm = any_llm(choice)
    messages = [user("Is it?"), assistant("Yes"), user("Why?")]
    segments = llm.render([*messages, assistant("Because.")])
    answer = max(index for index, segment in enumerate(segments) if segment.supervised)
    ours = "".join(segment.text for segment in segments[:answer])
    theirs = llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs.replace(" ASSISTANT: Yes", " ASSISTANT:Yes").replace(" A: Yes", " A:Yes") == ours.replace(
        " A: Yes", " A:Yes"
    )


def test_unknown_ways(real_format):
    with pytest.raises(ValueError, match="after_bos"):
        real_format("phi2", image_slot="after_boss").render(TWO_ROUNDS)
    with pytest.raises(ValueError, match="per_turn"):
        real_format("phi2", tokenize="per turn").render(TWO_ROUNDS)
