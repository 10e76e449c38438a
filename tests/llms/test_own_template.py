"""Tokenizers' own templates: the spans of answers, against the hand-marked templates and transformers' own rendering.

The templates here are short ones of the structure of the published ones: what they write, and what they do to history.
"""

import copy
import re
import shutil

import pytest
import yaml
from transformers import AutoTokenizer

import prism_deco
from prism_deco.cli import main
from prism_deco.config import load_choice
from prism_deco.errors import UsageError
from prism_deco.export.processor import make_processor, token_ids_note
from prism_deco.llms.hub import ASSETS
from prism_deco.llms.own_template import OwnTemplate, own_template

from .conftest import llama_folder, qwen_folder

CHATML = """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nDEFAULT<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
QWEN1_5 = CHATML.replace("DEFAULT", "You are a helpful assistant.")
SMOLLM2 = CHATML.replace("DEFAULT", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
VICUNA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{%- set system, messages = messages[0].content, messages[1:] -%}
{%- else -%}{%- set system = "A chat between a curious user and an artificial intelligence assistant. The \
assistant gives helpful, detailed, and polite answers to the user's questions." -%}{%- endif -%}
{{- system + ' ' -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{{- 'USER: ' + message.content -}}
  {%- else -%}{{- ' ASSISTANT: ' + message.content + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"""
# Thoughts stay with the last answer only; thinking is on unless it is switched off.
QWEN3 = """\
{%- for message in messages -%}
  {%- set content = message.content -%}
  {%- if message.role == 'assistant' and '</think>' in content -%}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.role == 'assistant' and loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
  {{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
# The date of the day, thinking by default, an empty block of thoughts in every answer, marks around whole turns.
SMOLLM3 = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content.rstrip() -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- set opening = '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') -%}
{%- for message in messages if message.role != 'system' -%}
  {%- if message.role == 'user' -%}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' -}}
  {%- else -%}{%- generation -%}{{- opening + message.content.lstrip('\\n') + '<|im_end|>\\n' -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- opening -}}{%- endif -%}"""
LLAMA3 = """\
{{- bos_token -}}
{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}
{%- set system = '' -%}
{%- if messages[0].role == 'system' -%}
  {%- set system, messages = messages[0].content | trim, messages[1:] -%}
{%- endif -%}
{{- '<|start|>system<|end|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|im_end|>' -}}
{%- for message in messages -%}
  {{- '<|start|>' + message.role + '<|end|>\\n\\n' + message.content | trim + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant<|end|>\\n\\n' -}}{%- endif -%}"""
# Another name for the assistant; the system message goes into the first question.
GEMMA = """\
{{- bos_token -}}
{%- set prefix = '' -%}
{%- if messages[0].role == 'system' -%}
  {%- set prefix, messages = messages[0].content + '\\n\\n', messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
  {{- (prefix if loop.first else '') + message.content | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""
# A token behind the whole conversation.
PHI4 = """\
{%- for message in messages -%}
  {{- '<|' + message.role + '|>' + message.content + '<|im_end|>' -}}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt else eos_token -}}"""
# Nothing behind the last answer but its end.
OLMO2 = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|' + message.role + '|>\\n' + message.content -}}
  {{- '\\n' if message.role != 'assistant' else eos_token + ('' if loop.last else '\\n') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""
STEADY = {"qwen1.5": QWEN1_5, "smollm3": SMOLLM3, "llama3": LLAMA3, "gemma": GEMMA, "phi4": PHI4, "olmo2": OLMO2}
ALL = STEADY | {"qwen3": QWEN3}

SYSTEM = [{"role": "system", "content": "Be brief."}]


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ONE = talk("<image>\nIs there a cat?", "Yes, a red one.")
TALKS = [
    ONE,
    talk("<image>\nIs it?", "Yes", "Where?", "A\n\nB", "So?", "No "),
    SYSTEM + ONE,
    SYSTEM + ONE + talk("So?", ""),
]


@pytest.fixture
def llm_of(tmp_path, real_format):
    """A model whose tokenizer brings that template."""

    def build(template, choice="qwen1_5_0_5b_chat", folder_of=qwen_folder, **options):
        folder = tmp_path / choice
        if not folder.exists():
            folder_of(folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return real_format(choice, chat_template=None, tokenizer=str(folder), **options)

    return build


@pytest.mark.parametrize("slot", ["after_bos", "in_place"])
@pytest.mark.parametrize(
    ("choice", "template", "folder_of", "ways"),
    [
        ("qwen1_5_0_5b_chat", QWEN1_5, qwen_folder, ["whole", "per_turn"]),
        ("smollm2_135m_instruct", SMOLLM2, qwen_folder, ["whole", "per_turn"]),
        # Turn by turn, SentencePiece adds the space before an answer, which this template writes.
        ("vicuna_7b_v1_5", VICUNA, llama_folder, ["whole"]),
    ],
)
def test_the_same_tokens_and_labels_as_marked_by_hand(llm_of, real_format, choice, template, folder_of, ways, slot):
    for way in ways:
        own = llm_of(template, choice, folder_of, tokenize=way, image_slot=slot)
        marked = real_format(choice, tokenizer=own.spec.tokenizer, tokenize=way, image_slot=slot)
        assert type(own.prompt_format) is OwnTemplate and type(marked.prompt_format) is not OwnTemplate
        for messages in TALKS:
            if choice == "vicuna_7b_v1_5" and not messages[-1]["content"].strip():
                continue  # marked by hand, an empty answer is a space
            if slot == "in_place":
                messages = [m | {"content": m["content"].strip()} for m in messages]
            for images in (0, 1):
                assert own.encode(messages, images) == marked.encode(messages, images)
            assert own.encode(messages[:-1], 1, True) == marked.encode(messages[:-1], 1, True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("system", [[], SYSTEM])
def test_the_text_is_what_transformers_renders(llm_of, name, system):
    """A single answer behind the prompt that transformers makes, and whole conversations; Qwen3's history is apart."""
    llm = llm_of(ALL[name], tokenize="whole")
    theirs = AutoTokenizer.from_pretrained(llm.spec.tokenizer)
    options = {"tokenize": False, "enable_thinking": False, **llm.spec.special_tokens}
    if "strftime_now" in ALL[name]:
        theirs.chat_template = re.sub(r"strftime_now\('.*?'\)", "'26 Jul 2024'", ALL[name])
    stand_in = "" if "bos_token" in ALL[name] else llm.spec.special_tokens["bos_token"]
    one = [*system, *talk("Is it?", "Yes.")]
    segments = llm.render(one)
    prompt = "".join(s.text for s in segments[: [s.supervised for s in segments].index(True)])
    assert prompt == stand_in + theirs.apply_chat_template(one[:-1], add_generation_prompt=True, **options)
    assert [s.text for s in segments if s.supervised] == ["Yes.<|im_end|>"]
    assert "".join(s.text for s in segments) == stand_in + theirs.apply_chat_template(one, **options)
    if name in STEADY:
        long = [*system, *talk("Is it?", "Yes.", "Why?", "A\nB", "So?", "No.")]
        segments = llm.render(long)
        assert "".join(s.text for s in segments) == stand_in + theirs.apply_chat_template(long, **options)
        assert [s.text for s in segments if s.supervised] == ["Yes.<|im_end|>", "A\nB<|im_end|>", "No.<|im_end|>"]


def test_thoughts_are_off_and_unsupervised(llm_of):
    """Qwen3 keeps the empty block before the last answer only; here every answer stands behind its own prompt."""
    llm = llm_of(QWEN3, tokenize="whole")
    segments = [(s.text, s.supervised) for s in llm.render(talk("Is it?", "Yes", "Why?", "So."), 1) if not s.image]
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert segments == [
        ("<|endoftext|>", False),
        (ask.format("Is it?"), False),
        ("Yes<|im_end|>", True),
        ("\n" + ask.format("Why?"), False),
        ("So.<|im_end|>", True),
        ("\n", False),
    ]
    for count in (1, 3):
        messages = talk("Is it?", "Yes", "Why?")[:count]
        text = llm.tokenizer.decode(llm.encode(messages, 1, add_generation_prompt=True).input_ids)
        assert text.endswith(ask.format(messages[-1]["content"]))


def test_images_and_marks_in_texts(llm_of):
    llm = llm_of(QWEN3, image_slot="in_place", tokenize="whole")
    segments = llm.render(talk("a\ufdd2b <image>", "c\ufdd3d", "e\ufdd0f", "g"), 1)
    assert [s.image for s in segments].index(True) == 2
    assert segments[3].text.startswith("\nab<|im_end|>")
    assert [s.text for s in segments if s.supervised] == ["cd<|im_end|>", "g<|im_end|>"]
    llm = llm_of(QWEN3, tokenize="whole")
    assert [s.image for s in llm.render(talk("a <image>", "b"), 2)][:3] == [False, True, True]


OPENED = QWEN1_5.replace("'<|im_start|>assistant\\n' -}}", "'<|im_start|>assistant\\n<think>\\n' -}}")
LOUD = QWEN1_5.replace(
    "message.content +", "(message.content | upper if message.role == 'user' else message.content) +"
)
SYSTEM_LAST = """\
{%- for message in messages if message.role != 'system' -%}
  {%- if message.role == 'user' -%}
    {{- '[INST]' -}}
    {%- if messages[0].role == 'system' and (loop.last or loop.index == loop.length - 1) -%}
      {{- messages[0].content -}}
    {%- endif -%}
    {{- message.content + '[/INST]' -}}
  {%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}
{%- endfor -%}"""


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (OPENED, ONE, "right after the prompt that asks for it"),  # as models do that always think
        (SYSTEM_LAST, SYSTEM + ONE, "changes earlier messages when others follow"),
        (QWEN1_5.replace("message.content +", "(message.content | upper) +"), ONE, "changes the text of an answer"),
        (QWEN1_5.replace("message.content", "message.content[:1]"), ONE, "does not write every answer once"),
        (LOUD, ONE, "changes the text of a question"),
        (QWEN3, talk("Is it?", "<think>No.</think>Yes."), "does not write every answer once"),
        (QWEN1_5.replace("<|im_end|>", "<|over|>"), ONE, "does not end answers with <|im_end|> or <|endoftext|>"),
        ("{{- '<|endoftext|>' -}}" + QWEN1_5, ONE, "spells out the BOS token"),
        ("{% if %}", ONE, "cannot render"),
        ("{% for m in messages %}{{ loop.index + 'x' }}{% endfor %}", ONE, "cannot render .*: TypeError"),
        ("{{ 1 / 0 }}", ONE, "cannot render .*: ZeroDivisionError"),
        ("{% include 'x' %}", ONE, "cannot render .*: TypeError"),
        ("{{ range(1000000) }}", ONE, "cannot render .*: OverflowError"),
        (None, ONE, "The tokenizer of qwen1_5_0_5b_chat has no chat template: set llm.chat_template"),
    ],
)
def test_what_cannot_be_trusted_is_refused(llm_of, template, messages, reason):
    llm = llm_of(template)
    with pytest.raises(ValueError, match=reason.replace("|", r"\|")):
        llm.render(messages, num_images=1)


STOP_MID = """\
{%- for message in messages -%}
  {{- message.role + '\\n' + message.content -}}
  {{- '<|im_end|>\\n' if message.role == 'user' or loop.last else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant\\n' -}}{%- endif -%}"""
"""Questions end with a token that ends an answer only where it is the last."""


def test_the_end_of_a_question_is_not_taken_for_that_of_the_answer_before_it(llm_of):
    llm = llm_of(STOP_MID, tokenize="whole")
    assert [s.text for s in llm.render(talk("Is it?", "Yes"), 1) if s.supervised] == ["Yes<|im_end|>"]
    with pytest.raises(UsageError, match=r"does not end answers with <\|im_end\|> or"):
        llm.render(talk("Is it?", "Yes", "Why?", "So."), 1)


def test_a_question_may_spell_out_what_ends_an_answer(llm_of):
    without = QWEN1_5.replace(
        "'<|im_end|>\\n'", "('' if message.role == 'assistant' and not loop.last else '<|im_end|>\\n')"
    )
    for template, refused in ((QWEN1_5, False), (without, True)):
        llm = llm_of(template, tokenize="whole")
        messages = talk("Is it?", "Yes", "Why <|im_end|> so?", "So.")
        if refused:
            with pytest.raises(UsageError, match="does not end answers with"):
                llm.render(messages, 1)
        else:
            assert [s.text for s in llm.render(messages, 1) if s.supervised] == ["Yes<|im_end|>", "So.<|im_end|>"]


def test_a_system_message_that_moves_is_no_matter_without_one(llm_of):
    assert llm_of(SYSTEM_LAST).render(talk("Is it?", "Yes", "So?", "No"))[1].text == "[INST]Is it?[/INST]"


def test_a_saved_tokenizer_gives_the_same_and_can_be_used_without_this_package(llm_of, real_format, tmp_path):
    llm = llm_of(QWEN3, tokenize="whole")
    llm.tokenizer.save_pretrained(tmp_path / "saved")
    options = {"chat_template": None, "tokenizer": str(tmp_path / "saved"), "tokenize": "whole"}
    again = real_format("qwen1_5_0_5b_chat", **options)
    assert again.tokenizer.chat_template == llm.tokenizer.chat_template == own_template(again.tokenizer, "it")
    for messages in TALKS:
        assert again.encode(messages, 1) == llm.encode(messages, 1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = theirs.apply_chat_template(talk("Is it?"), add_generation_prompt=True)["input_ids"]
    assert ids == llm.encode(talk("Is it?"), add_generation_prompt=True).input_ids


@pytest.fixture
def mini(tmp_path):
    """A miniature LLM whose tokenizer brings the template of a thinking model."""
    shutil.copytree(ASSETS / "qwen2", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(QWEN3)
    return load_choice("llm", "mini_qwen2") | {"tokenizer": str(tmp_path / "tokenizer"), "chat_template": None}


@pytest.mark.parametrize("slot", ["after_bos", "in_place"])
def test_an_export_to_transformers_has_the_same_prompts(tiny, mini, slot):
    vlm, llm = tiny(mini | {"tokenize": "whole", "image_slot": slot})
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = make_processor(vlm, llm, tokenizer)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert text.count("<image>") == 1 and text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    ids = processor.tokenizer(text.replace("<image>", ""), add_special_tokens=False)["input_ids"]
    ours = llm.encode(talk("<image>\nIs it?"), 1, add_generation_prompt=True)
    assert text.startswith("<|endoftext|><image>") == (slot == "after_bos")
    assert processor.tokenizer.decode(ids) == llm.tokenizer.decode(ours.input_ids)
    # A second question: the template forgets the thoughts before the first answer, training does not.
    assert "some tokens differ" in token_ids_note(processor, llm)


def test_a_template_that_fails_is_refused_before_there_is_a_run(colors, mini, tmp_path, capsys):
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({key: value for key, value in mini.items() if key != "name"}))
    command = f"""train llm={own} data=llava data.json={colors}/train.json data.image_root={colors}/images
        data.on_bad_record=skip evaluate.benchmarks=null recipe.max_steps=1 backbone.pretrained=false
        data.num_workers=0 trainer.samples=0 runs_dir={tmp_path} run_id=run"""
    assert main(command.split()) == 2
    assert "chat template cannot render the conversation: ZeroDivisionError" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "run").exists()


def test_a_run_is_trained_and_loaded_with_it(colors, mini, tmp_path):
    name = tmp_path / "thinker.yaml"
    name.write_text(yaml.safe_dump({key: value for key, value in mini.items() if key != "name"}))
    command = f"""train llm={name} data=llava data.json={colors}/train.json data.image_root={colors}/images
        data.val_fraction=0 data.num_workers=0 evaluate.benchmarks=null recipe.max_steps=1 recipe.micro_batch_size=4
        recipe.global_batch_size=4 backbone.pretrained=false trainer.samples=0 runs_dir={tmp_path} run_id=run"""
    assert main(command.split()) == 0
    shutil.rmtree(tmp_path / "tokenizer")  # the run has its own
    model = prism_deco.load(tmp_path / "run")
    prompt = model.llm.encode(talk("Is it red?"), 1, add_generation_prompt=True)
    assert model.llm.tokenizer.decode(prompt.input_ids).endswith("<think>\n\n</think>\n\n")
    assert len(model.generate([colors / "images" / "red40.png"], ["Is it red?"], max_new_tokens=2)) == 1
