"""The prompts of DeCo's authors, worked out by hand from their code: ids, labels, the image's place, ways to ask."""

import pytest
import torch

from prism_deco.errors import UsageError
from prism_deco.inference import answer_losses, first_token_probabilities
from prism_deco.llms import Segment, build_llm, truncate
from prism_deco.llms.encoding import answers_only
from prism_deco.sequence import build_batch

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
DECO = {"prompt_set": "deco", "image_slot": "after_first_token"}
REAL = ["phi2", "qwen1_5_0_5b_chat", "vicuna_7b_v1_5"]
TALKS = {
    "one round": ["<image>\nIs there a cat?", "Yes"],
    "two rounds": ["What is it? \n<image>", " A red cat. ", "Where?", "[0.12, 0.34, 0.56, 0.78]"],
    "empty answers": ["<image>\nWhat?", "", "And now?", " "],
    "unicode": ["¿Qué es «esto»?", "猫が二匹、né? 🐈‍⬛", "ok", "ÿ\u0301"],
    "marks": ["<image>\n? ", "? no", "\n\nx\n\ny\n", "\n- a\n- b\n"],
    "specials": ["USER: x ASSISTANT: y", "<|im_end|>", "assistant\n", "<|im_start|>assistant\n"],
}


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def phi2(index, text):
    return f"USER: {text} ASSISTANT: " if index % 2 == 0 else f"{text or ' '}<|endoftext|>"


def qwen(index, text):
    if index % 2 == 0:
        return f"<|im_start|>user\n{text}<|im_end|>\n"
    return f"<|im_start|>assistant\n{text}<|im_end|>\n" if text else "<|im_start|>assistant\n"


def vicuna(index, text):
    turn = f"USER: {text} ASSISTANT: " if index % 2 == 0 else f"{text or ' '}</s>"
    return (SYSTEM if index == 0 else "") + turn


TURNS = dict(zip(REAL, (phi2, qwen, vicuna), strict=True))


def authors(choice, tokenizer, texts):
    """Ids and labels by the authors' loop: each turn is right-stripped and tokenised; labels go by its number."""
    ids, labels = [], []
    for index, text in enumerate(texts):
        turn = TURNS[choice](index, text.replace("<image>", "").strip()).rstrip()
        new = tokenizer(turn, add_special_tokens=index == 0).input_ids
        ids += new
        labels += [-100] * len(new) if index % 2 == 0 else new
    return ids, labels


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("choice", REAL)
def test_same_ids_and_labels_as_the_authors_loop(real_format, choice, name):
    llm = real_format(choice, **DECO)
    encoded = llm.encode(talk(*TALKS[name]), num_images=1)
    assert (encoded.input_ids, encoded.labels) == authors(choice, llm.tokenizer, TALKS[name])
    assert encoded.image_slots == [1]
    assert llm.encode(talk(*TALKS[name])).input_ids == encoded.input_ids, "without an image as well"


def test_the_text_of_each_format(real_format):
    texts = ["<image>\nIs there a cat? ", "Yes", "Where?", ""]

    def parts(choice):
        return [(s.text, s.supervised, s.round) for s in real_format(choice, **DECO).render(talk(*texts), 1)[1:]]

    assert parts("phi2") == [
        ("USER: Is there a cat? ASSISTANT:", False, 1),
        ("Yes<|endoftext|>", True, 1),
        ("USER: Where? ASSISTANT:", False, 2),
        (" <|endoftext|>", True, 2),
    ]
    assert parts("qwen1_5_0_5b_chat") == [
        ("<|im_start|>user\nIs there a cat?<|im_end|>", False, 1),
        ("<|im_start|>assistant\n", True, 1),
        ("Yes<|im_end|>", True, 1),
        ("<|im_start|>user\nWhere?<|im_end|>", False, 2),
        ("<|im_start|>assistant", True, 2),
    ]
    assert parts("vicuna_7b_v1_5") == [
        ("<s>", False, 0),
        (f"{SYSTEM}USER: Is there a cat? ASSISTANT:", False, 1),
        ("Yes</s>", True, 1),
        ("USER: Where? ASSISTANT:", False, 2),
        (" </s>", True, 2),
    ]
    image = real_format("phi2", **DECO).render(talk(*texts), 1)[0]
    assert image == Segment("", supervised=False, image=True), "the slot comes first, without a text of its own"


@pytest.mark.parametrize(
    ("choice", "first", "before_answer", "after"),
    [
        # The mini's tokenizers: token by token.
        ("mini_qwen2", "<|im_start|>", ["<|im_start|>", "assistant", "Ċ"], ["Yes", "<|im_end|>"]),
        ("mini_phi", "Q", ["Ġ", "A", ":"], ["Yes", "<|endoftext|>"]),
        ("mini_llama", "<s>", ["▁A", ":"], ["▁Yes", "</s>"]),
    ],
)
def test_the_miniatures_token_by_token(choice, first, before_answer, after):
    llm = build_llm(choice, **DECO)
    encoded = llm.encode(talk("<image>\nIs there a circle?", "Yes"), num_images=1)
    tokens = llm.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert tokens[0] == first and tokens[-len(after) :] == after
    assert tokens[-len(after) - len(before_answer) : -len(after)] == before_answer
    supervised = [token for token, label in zip(tokens, encoded.labels, strict=True) if label != -100]
    assert supervised == (before_answer if choice == "mini_qwen2" else []) + after
    assert encoded.image_slots == [1] and encoded.rounds == [0] + [1] * (len(tokens) - 1)


@pytest.mark.parametrize("choice", ["phi2", "qwen1_5_0_5b_chat", "mini_qwen2", "mini_phi"])
def test_a_prompt_ends_where_answers_begin_in_training(any_llm, choice):
    llm = any_llm(choice, **DECO)
    for texts in TALKS.values():
        encoded = llm.encode(talk(*texts), num_images=1)
        for number in (1, 3)[: len(texts) // 2]:
            prompt = llm.encode(talk(*texts[:number]), num_images=1, add_generation_prompt=True)
            end = len(prompt.input_ids)
            assert set(prompt.labels) == {-100} and prompt.image_slots == [1] and not prompt.headers
            if not texts[number].strip() and "qwen" in choice:
                continue  # the turn is a header without its newline
            assert prompt.input_ids == encoded.input_ids[:end]
            only = answers_only(encoded)
            assert only.labels[end] == encoded.input_ids[end] and only.labels[end - 1] == -100
            assert encoded.labels[end - 1] == (encoded.input_ids[end - 1] if "qwen" in choice else -100)


def test_the_image_stands_behind_the_first_token():
    """Positions by hand, of a round that sees everything before it and of rounds that begin anew."""
    llm = build_llm("mini_qwen2", **DECO)
    encoded = llm.encode(talk("<image>\nA?", "b", "C?", "d"), num_images=1)
    first, second = (encoded.rounds.count(number) for number in (1, 2))
    batch = build_batch([encoded], 3, restart_rounds=True)
    assert batch.visual[0].tolist() == [False] + 3 * [True] + [False] * (first + second)
    assert batch.rounds[0].tolist() == [0] * 4 + [1] * first + [2] * second
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, *range(4, 4 + first), *range(4, 4 + second)]
    assert batch.input_ids[0, 0] == llm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert set(batch.labels[0, :4].tolist()) == {-100}


def test_headers_are_carried_through_truncation():
    llm = build_llm("mini_qwen2", **DECO)
    encoded = llm.encode(talk("x " * 40, "yes"))
    short, cut = truncate(encoded, 20)
    assert cut == len(encoded.input_ids) - 20
    assert llm.tokenizer.decode([short.input_ids[i] for i in sorted(short.headers)]) == "<|im_start|>assistant\n"
    assert llm.tokenizer.decode([t for t in answers_only(short).labels if t != -100]) == "yes<|im_end|>"


@pytest.mark.parametrize(
    ("choice", "how", "text"),
    [
        ("qwen1_5_0_5b_chat", "deco_no_header", "user\nIs it?<|im_end|>"),
        ("qwen1_5_0_5b_chat", "deco_bare_header", "user\nIs it?<|im_end|>\n<|im_start|>assistant"),
        ("phi2", "deco_no_header", "USER: Is it? ASSISTANT:"),
        ("phi2", "deco_bare_header", "USER: Is it? ASSISTANT:"),
        ("vicuna_7b_v1_5", "deco_bare_header", f"{SYSTEM}USER: Is it? ASSISTANT:"),
    ],
)
def test_the_authors_ways_to_ask(real_format, choice, how, text):
    llm = real_format(choice, **DECO)
    prompt = llm.ask("<image>\nIs it? ", num_images=1, how=how)
    assert prompt.input_ids == llm.tokenizer(text, add_special_tokens=True).input_ids
    assert prompt.image_slots == [1] and prompt.rounds[0] == 0 and set(prompt.labels) == {-100}
    if choice != "qwen1_5_0_5b_chat":
        assert prompt == llm.ask("<image>\nIs it? ", num_images=1)


def test_a_way_to_ask_of_ones_own_says_where_the_image_goes(real_format):
    asks = {"stripped": "<|endoftext|>{image}Input: {question}\nOutput:"}
    llm = real_format("phi2", asks=asks)
    prompt = llm.ask("{Is} it?", 1, "stripped")
    assert llm.tokenizer.decode(prompt.input_ids) == "<|endoftext|>Input: {Is} it?\nOutput:"
    assert prompt.image_slots == [1]
    with pytest.raises(UsageError, match=r"unknown.*striped.*Did you mean 'stripped'|'stripped'"):
        llm.ask("x", 1, "striped")
    with pytest.raises(UsageError, match="must have {image} once to place 2 images"):
        real_format("phi2", asks={"none": "{question}"}).ask("x", 2, "none")
    with pytest.raises(UsageError, match="may have the fields {question} and {image}"):
        real_format("phi2", asks={"typo": "{image}{qestion}"}).ask("x", 1, "typo")


def test_probabilities_are_read_at_the_first_token_whatever_the_prompt(tiny):
    """By a forward pass over ids put together by hand."""
    vlm, _ = tiny("mini_qwen2")
    llm = build_llm("mini_qwen2", **DECO)
    llm.model = vlm.lm
    visual = torch.randn(4, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = vlm.lm.get_input_embeddings().weight
    words = llm.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    prompts = {
        "as_trained": "<|im_start|>user\nIs it?<|im_end|><|im_start|>assistant\n",
        "deco_no_header": "user\nIs it?<|im_end|>",
        "deco_bare_header": "user\nIs it?<|im_end|>\n<|im_start|>assistant",
    }
    found = []
    for how, text in prompts.items():
        ids = llm.tokenizer(text, add_special_tokens=False).input_ids
        inputs = torch.cat([table[ids[:1]], visual, table[ids[1:]]])[None]
        logits = vlm.lm(inputs_embeds=inputs).logits[0, -1, words]
        got = first_token_probabilities(vlm, llm, [[visual]], ["Is it?"], ["Yes", "No"], ask=how)[0]
        torch.testing.assert_close(got, logits.double().softmax(0).detach(), rtol=1e-4, atol=1e-6, check_dtype=False)
        found.append(got)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_the_loss_of_an_answer_does_not_count_its_header(tiny):
    vlm, _ = tiny("mini_qwen2")
    llm = build_llm("mini_qwen2", **DECO)
    llm.model = vlm.lm
    visual = torch.randn(4, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses, _ = answer_losses(vlm, llm, [[visual]], ["Is it?"], ["Yes"])
    ids = llm.tokenizer(
        "<|im_start|>user\nIs it?<|im_end|><|im_start|>assistant\nYes", add_special_tokens=False
    ).input_ids
    table = vlm.lm.get_input_embeddings().weight
    inputs = torch.cat([table[ids[:1]], visual, table[ids[1:]]])[None]
    by_hand = -vlm.lm(inputs_embeds=inputs).logits[0, -2].log_softmax(0)[ids[-1]]
    assert losses.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_tables_and_padding(real_format):
    """Of the published sizes: Phi-2 and Vicuna add a token, Qwen pads with its own; rows are multiples of 64."""
    sizes = {"phi2": 50304, "qwen1_5_0_5b_chat": 151680, "vicuna_7b_v1_5": 32064}
    for choice, rows in sizes.items():
        assert build_llm(choice, pretrained=False, device="meta", **DECO).embedding_rows == rows
    pads = {choice: real_format(choice, **DECO).tokenizer.pad_token for choice in REAL}
    assert pads == {"phi2": "<PAD>", "qwen1_5_0_5b_chat": "<|endoftext|>", "vicuna_7b_v1_5": "<PAD>"}


def test_an_llm_without_the_set_is_refused_by_name():
    with pytest.raises(
        UsageError, match=r"smollm2_135m_instruct has no prompt set 'deco' .its YAML offers none.*=null"
    ):
        build_llm("smollm2_135m_instruct", prompt_set="deco", device="meta")
    with pytest.raises(UsageError, match="offers deco"):
        build_llm("phi2", prompt_set="deca", device="meta")
