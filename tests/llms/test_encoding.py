"""Token ids and labels, for tokenizers of each real type."""

import pytest

from prism_deco.llms import Encoded, truncate

CHOICES = [
    "vicuna_7b_v1_5",
    "phi2",
    "qwen1_5_0_5b_chat",
    "smollm2_135m_instruct",
    "mini_qwen2",
    "mini_phi",
    "mini_llama",
]

# What a supervised answer decodes to. Llama's dummy space is the tokenizer's own, and gone after decoding.
ENDINGS = {
    "vicuna_7b_v1_5": lambda a: f"{a or ' '}</s>",
    "phi2": lambda a: f"{a or ' '}\n<|endoftext|>",
    "qwen1_5_0_5b_chat": lambda a: f"{a}<|im_end|>",
    "smollm2_135m_instruct": lambda a: f"{a}<|im_end|>",
    "mini_qwen2": lambda a: f"{a}<|im_end|>",
    "mini_phi": lambda a: f"{a}<|endoftext|>",
    "mini_llama": lambda a: f"{a}</s>",
}

CONVERSATIONS = {
    "single": ["Is there a cat?", "Yes"],
    "multi": ["<image>\nWhat is it?", "A red cat.", "Where?", "[0.12, 0.34, 0.56, 0.78]", "Sure?", "No"],
    "unicode": ["¿Qué es «esto»?", "猫が二匹、né? 🐈‍⬛", "ok", "ÿ\u0301"],
    "empty": ["What?", "", "And now?", "Nothing"],
    "template words": [
        "USER: x ASSISTANT: y",
        "Output: USER: Input: Q: A:",
        "system\nuser\nassistant\n",
        "<|im_start|>user",
    ],
    "lines": ["First\n\nsecond", "One\ntwo\n\nthree   four"],
}


def messages_of(texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def supervised_texts(llm, encoded):
    rounds = sorted(set(encoded.rounds) - {0})
    picked = [[t for t, r in zip(encoded.labels, encoded.rounds, strict=True) if t >= 0 and r == k] for k in rounds]
    return [llm.tokenizer.decode(ids) for ids in picked]


@pytest.mark.parametrize("tokenize", ["per_turn", "whole"])
@pytest.mark.parametrize("slot", ["after_bos", "in_place"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("choice", CHOICES)
def test_supervised_tokens_are_the_answers_and_prompts_are_prefixes(any_llm, choice, name, slot, tokenize):
    llm = any_llm(choice, image_slot=slot, tokenize=tokenize)
    texts = CONVERSATIONS[name]
    images = sum(text.count("<image>") for text in texts)
    encoded = llm.encode(messages_of(texts), num_images=images)
    assert len(encoded.input_ids) == len(encoded.labels) == len(encoded.rounds)
    assert all(label in (-100, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    decoded = supervised_texts(llm, encoded)
    expected = [ENDINGS[choice](answer.strip()) for answer in texts[1::2]]
    if tokenize == "whole":  # the space between prompt and answer may be learned with it
        decoded, expected = ([text.lstrip(" ") for text in texts] for texts in (decoded, expected))
    assert decoded == expected
    for number in range(1, len(texts), 2):
        prompt = llm.encode(messages_of(texts[:number]), num_images=images, add_generation_prompt=True)
        length = len(prompt.input_ids)
        assert prompt.input_ids == encoded.input_ids[:length]
        assert prompt.rounds == encoded.rounds[:length]
        assert prompt.image_slots == encoded.image_slots
        assert set(prompt.labels) == {-100}
        assert encoded.labels[length] >= 0 and encoded.labels[length - 1] == -100


def prism_vicuna(tokenizer, texts):
    """Ids and labels as in PRISM's loop over turns: special tokens with the first turn only, turns right-stripped."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    ids, labels = [], []
    for index, text in enumerate(texts):
        human = index % 2 == 0
        text = text.replace("<image>", "").strip()
        turn = f"USER: {text} ASSISTANT: " if human else f"{text or ' '}</s>"
        turn = ((system if index == 0 else "") + turn).rstrip()
        new = tokenizer(turn, add_special_tokens=index == 0).input_ids
        ids += new
        labels += [-100] * len(new) if human else new
    return ids, labels


def prism_phi(tokenizer, texts):
    """The same for Phi-2: no stripping, the BOS token is part of the first turn's text."""
    ids, labels = [], []
    for index, text in enumerate(texts):
        human = index % 2 == 0
        text = text.replace("<image>", "").strip()
        turn = f"Input: {text}\nOutput: " if human else f"{text or ' '}\n<|endoftext|>"
        new = tokenizer(("<|endoftext|>" if index == 0 else "") + turn, add_special_tokens=False).input_ids
        ids += new
        labels += [-100] * len(new) if human else new
    return ids, labels


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(("choice", "reference"), [("vicuna_7b_v1_5", prism_vicuna), ("phi2", prism_phi)])
def test_same_ids_as_the_loop_of_prism(real_format, choice, reference, name):
    llm = real_format(choice)
    encoded = llm.encode(messages_of(CONVERSATIONS[name]), num_images=1)
    assert (encoded.input_ids, encoded.labels) == reference(llm.tokenizer, CONVERSATIONS[name])
    assert encoded.image_slots == [1]


def test_phi_prompt_keeps_its_trailing_space(real_format):
    llm = real_format("phi2")
    prompt = llm.encode(messages_of(["Is there a cat?"]), add_generation_prompt=True)
    assert llm.tokenizer.convert_ids_to_tokens(prompt.input_ids)[-2:] == [":", "Ġ"]
    assert llm.tokenizer.convert_ids_to_tokens(llm.encode(messages_of(["x", "Is"])).input_ids)[-3:] == [
        "Is",
        "Ċ",
        "<|endoftext|>",
    ]


def test_whole_lets_tokens_cross_into_the_answer(real_format):
    tokens = {}
    for choice in ("vicuna_7b_v1_5", "phi2"):
        llm = real_format(choice, tokenize="whole")
        encoded = llm.encode(messages_of(["Is there a cat?", "Is it"]))
        first = next(label for label in encoded.labels if label >= 0)
        tokens[choice] = llm.tokenizer.convert_ids_to_tokens([first])[0]
    # One token is the space of the prompt and the word of the answer: it is learned.
    assert tokens == {"vicuna_7b_v1_5": "▁Is", "phi2": "ĠIs"}


def test_whole_is_one_call_of_the_tokenizer(real_format):
    llm = real_format("qwen1_5_0_5b_chat", tokenize="whole", image_slot="in_place")
    encoded = llm.encode(messages_of(["Is it?", "Yes", "Why?", "No"]), num_images=1)
    before = "<|endoftext|><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    after = (
        "\nIs it?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n"
    )
    parts = [llm.tokenizer(text, add_special_tokens=False).input_ids for text in (before, after)]
    assert encoded.input_ids == parts[0] + parts[1]
    assert encoded.image_slots == [len(parts[0])]


def test_rounds(real_format):
    encoded = real_format("phi2").encode(messages_of(["a", "b", "c", "d"]), num_images=1)
    # <|endoftext|> | Input : Ġ a Ċ Output : Ġ b Ċ <|endoftext|> | the same for the second round
    assert encoded.rounds[0] == 0
    assert encoded.rounds == sorted(encoded.rounds)
    ends = [i for i, token in enumerate(encoded.input_ids) if token == encoded.input_ids[0]]
    assert ends[0] == 0 and len(ends) == 3
    assert set(encoded.rounds[1 : ends[1] + 1]) == {1}
    assert set(encoded.rounds[ends[1] + 1 :]) == {2}


def encoded_of(labels, slots=(1,)):
    """Token i at position i."""
    labels = [i if supervised else -100 for i, supervised in enumerate(labels)]
    return Encoded(list(range(len(labels))), labels, [0] + [1] * (len(labels) - 1), list(slots))


def test_truncate_cuts_the_end():
    encoded = encoded_of([0, 0, 0, 1, 1, 0, 0, 1])
    assert truncate(encoded, 8) == (encoded, 0)
    short, cut = truncate(encoded, 5)
    assert cut == 3
    assert short == Encoded([0, 1, 2, 3, 4], [-100, -100, -100, 3, 4], [0, 1, 1, 1, 1], [1])
    assert truncate(encoded, 4)[0].labels == [-100, -100, -100, 3]


def test_truncate_keeps_an_answer():
    # 9 tokens of prompt, 2 of answer, room for 6: 4 of the prompt (its first and last 2) and the answer.
    short, cut = truncate(encoded_of([0] * 9 + [1, 1], slots=(1, 5)), 6)
    assert cut == 5
    assert short.input_ids == [0, 1, 7, 8, 9, 10]
    assert short.labels == [-100] * 4 + [9, 10]
    # The image at 5 stood in what was cut: its place is between what is left.
    assert short.image_slots == [1, 2]


def test_truncate_cuts_a_long_answer_behind_a_long_prompt():
    short, cut = truncate(encoded_of([0] * 9 + [1] * 9), 6)
    assert cut == 12
    assert short.input_ids == [0, 1, 8, 9, 10, 11]
    assert short.labels == [-100, -100, -100, 9, 10, 11]


def test_truncate_needs_room():
    with pytest.raises(ValueError, match="max_text_tokens=1"):
        truncate(encoded_of([0, 1]), 1)


def test_a_question_without_room_for_its_answer_may_be_cut_as_in_prism():
    encoded = encoded_of([0] * 9 + [1, 1])
    cut = truncate(encoded, 6, shorten=False)
    assert cut[0].input_ids == encoded.input_ids[:6] and cut[1] == 5
    assert set(cut[0].labels) == {-100}
    assert truncate(encoded, 10, shorten=False) == truncate(encoded, 10), (
        "an answer that begins is kept as far as it goes"
    )
