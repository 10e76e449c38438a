"""Architectures against the parameter counts of the published models, and everything else `build_llm` promises."""

import importlib.util

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prism_deco.config import choices, load_choice
from prism_deco.errors import UsageError
from prism_deco.llms import build_llm, hub


@pytest.fixture
def offline(monkeypatch):
    """A machine without the hub and with an empty cache."""

    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("no network\nand more advice")

    monkeypatch.setattr(hub, "snapshot_download", refuse)


@pytest.mark.parametrize(
    ("choice", "rows", "count", "embed_dim", "positions"),
    [
        # Published counts; after the resizing that PRISM does for Vicuna (32064 rows) and Phi-2 (50304).
        ("qwen1_5_0_5b_chat", 151936, 463_987_712, 1024, 32768),
        ("phi2", 50304, 2_775_095_424, 2560, 2048),
        ("vicuna_7b_v1_5", 32064, 6_738_939_904, 4096, 4096),
        ("smollm2_135m_instruct", 49152, 134_515_008, 576, 8192),
        # As the hub counts the weights of each repository, shared heads once (Qwen3-0.6B's file holds both).
        ("smollm2_360m_instruct", 49152, 361_821_120, 960, 8192),
        ("smollm2_1_7b_instruct", 49152, 1_711_376_384, 2048, 8192),
        ("smollm3_3b", 128256, 3_075_098_624, 2048, 65536),
        ("qwen2_5_0_5b_instruct", 151936, 494_032_768, 896, 32768),
        ("qwen2_5_1_5b_instruct", 151936, 1_543_714_304, 1536, 32768),
        ("qwen2_5_7b_instruct", 152064, 7_615_616_512, 3584, 32768),
        ("qwen3_0_6b", 151936, 596_049_920, 1024, 40960),
        ("qwen3_1_7b", 151936, 1_720_574_976, 2048, 40960),
        ("llama3_2_1b_instruct", 128256, 1_235_814_400, 2048, 131072),
        ("llama3_2_3b_instruct", 128256, 3_212_749_824, 3072, 131072),
        ("gemma3_270m_it", 262144, 268_098_176, 640, 32768),
        ("gemma3_1b_it", 262144, 999_885_952, 1152, 32768),
        ("phi4_mini_instruct", 200064, 3_836_021_760, 3072, 131072),
        ("olmo2_1b_instruct", 100352, 1_484_916_736, 2048, 4096),
    ],
)
def test_published_models(offline, choice, rows, count, embed_dim, positions):
    llm = build_llm(choice, pretrained=False, device="meta")
    assert next(llm.model.parameters()).device.type == "meta"
    assert sum(p.numel() for p in llm.model.parameters()) == count
    assert llm.embedding_rows == rows
    assert llm.model.get_output_embeddings().weight.shape == (rows, embed_dim)
    assert (llm.embed_dim, llm.max_positions) == (embed_dim, positions)
    assert {p.dtype for p in llm.model.parameters()} == {torch.float32}
    assert llm.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("choice", "count"), [("phi2", 2_779_683_840), ("vicuna_7b_v1_5", 6_738_415_616)])
def test_published_models_before_resizing(choice, count):
    llm = build_llm(choice, pretrained=False, device="meta", tokenizer_size=None, pad_to_multiple_of=None)
    assert sum(p.numel() for p in llm.model.parameters()) == count


@pytest.mark.parametrize("choice", choices("llm"))
def test_every_yaml_builds_and_renders_without_files(offline, choice):
    llm = build_llm(choice, pretrained=False, device="meta")
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert llm.model.config.vocab_size == llm.embedding_rows
    if load_choice("llm", choice)["chat_template"] is None:
        with pytest.raises(
            UsageError, match=f"The tokenizer of {llm.spec.hub} is not in the local .*llm.tokenizer=PATH"
        ):
            llm.render(conversation, num_images=1)
        return
    assert sum(s.image for s in llm.render(conversation, num_images=1)) == 1


@pytest.mark.parametrize(
    ("choice", "eos", "added_pad", "rows"),
    [("mini_qwen2", (2, 0), False, 576), ("mini_phi", (0,), True, 576), ("mini_llama", (2,), True, 704)],
)
def test_minis(choice, eos, added_pad, rows):
    llm = build_llm(choice)
    assert (llm.eos_ids, llm.embedding_rows, llm.embed_dim) == (eos, rows, 128)
    assert rows - 64 < len(llm.tokenizer) <= rows
    assert llm.tokenizer.pad_token_id == (len(llm.tokenizer) - 1 if added_pad else 0)
    ids = torch.tensor([llm.encode([{"role": "user", "content": "Hi"}], add_generation_prompt=True).input_ids])
    output = llm.model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.shape == (1, ids.shape[1], rows)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in llm.model.parameters())


def test_grouped_queries():
    attention = build_llm("mini_llama").model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (128, 64)


@pytest.mark.parametrize(("choice", "tied"), [("mini_qwen2", True), ("mini_phi", False), ("mini_llama", False)])
def test_tied_embeddings_stay_tied(choice, tied):
    for options in ({}, {"pad_to_multiple_of": 100, "tokenizer_size": 645}):
        model = build_llm(choice, **options).model
        same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert same is tied
    assert model.get_input_embeddings().weight.shape[0] == 700


def test_random_weights_follow_the_global_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return build_llm("mini_phi", pretrained=False).model.state_dict()

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_options_replace_keys_of_the_yaml():
    llm = build_llm("mini_qwen2", dtype="bfloat16", attention="eager", stop_tokens=["<|im_start|>"])
    assert llm.model.dtype == torch.bfloat16
    assert llm.model.config._attn_implementation == "eager"
    assert llm.eos_ids == (1,)


def test_own_yaml(tmp_path):
    # Any causal LM of transformers, by its own numbers.
    (tmp_path / "mine.yaml").write_text(
        "pretrained: false\ntokenizer: asset:phi\n"
        "architecture: {model_type: gpt2, vocab_size: 600, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}\n"
        "special_tokens: {bos_token: <|endoftext|>, eos_token: <|endoftext|>, pad_token: <|endoftext|>}\n"
        'chat_template: \'{{ bos_token }}{{ image }}{% for m in messages %}{% if m.role == "user" %}{{ m.content }}'
        "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}'\n"
    )
    llm = build_llm(str(tmp_path / "mine.yaml"))
    assert (llm.spec.name, llm.embed_dim, llm.max_positions, llm.eos_ids) == ("mine", 16, 64, (0,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenise": "whole"}, "Did you mean 'tokenize'"),
        ({"dtype": "float23"}, "float23"),
        ({"special_tokens": {}}, "no `special_tokens`"),
        ({"architecture": None}, "no `architecture`"),
        ({"architecture": {"hidden_size": 8}}, "no model_type"),
    ],
)
def test_wrong_specs(change, reason):
    with pytest.raises(ValueError, match=reason):
        build_llm("mini_qwen2", pretrained=False, **change)


def test_unknown_choice():
    with pytest.raises(ValueError, match="Did you mean 'phi2'"):
        build_llm("phi3")


def test_missing_weights_are_one_clear_error(offline):
    with pytest.raises(ValueError) as error:
        build_llm("phi2")
    for part in ("phi2", "microsoft/phi-2", "5.6 GB", "llm.weights=PATH", "no network"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mini_without_its_weights_has_none_to_download(offline):
    with pytest.raises(ValueError, match="llm.weights=PATH"):
        build_llm("mini_qwen2", weights=None)


def test_missing_tokenizer_is_one_clear_error(offline):
    llm = build_llm("phi2", pretrained=False, device="meta")
    with pytest.raises(ValueError, match=r"tokenizer of microsoft/phi-2 .* llm.tokenizer=PATH"):
        _ = llm.tokenizer
    with pytest.raises(ValueError, match="asset:typo: the package ships llama, phi, qwen2"):
        _ = build_llm("mini_phi", tokenizer="asset:typo").tokenizer


def test_tokenizers_that_do_not_belong_to_the_model():
    with pytest.raises(ValueError, match="has no bos_token '<s>'"):
        _ = build_llm("mini_llama", tokenizer="asset:phi").tokenizer
    with pytest.raises(ValueError, match=r"has (\d+) tokens, the model only 512 embeddings: set llm.tokenizer_size=\1"):
        _ = build_llm("mini_phi", tokenizer_size=512).tokenizer
    with pytest.raises(ValueError, match="has no token '<stop>' .llm.stop_tokens"):
        _ = build_llm("mini_phi", stop_tokens=["<stop>"]).eos_ids


def test_the_tokenizer_is_asked_for_its_size(real_format):
    # Without tokenizer_size: 402 tokens of the fixture's Phi tokenizer, rounded up.
    assert real_format("phi2").embedding_rows == 448


def test_yamls_list_the_keys_to_override():
    # The command line accepts the keys that a YAML holds.
    for choice in choices("llm"):
        assert {"tokenizer", "tokenize", "dtype", "attention", "chat_template"} <= set(load_choice("llm", choice))


@pytest.mark.parametrize(
    ("choice", "pad", "unk"), [("vicuna_7b_v1_5", "<PAD>", "<unk>"), ("qwen1_5_0_5b_chat", "<|endoftext|>", None)]
)
def test_padding_adds_a_token_or_takes_the_unknown_one(real_format, choice, pad, unk):
    prism, llava = (real_format(choice, added_tokens=added) for added in (True, False))
    assert prism.tokenizer.pad_token == pad and llava.tokenizer.pad_token == (unk or pad)
    assert len(prism.tokenizer) - len(llava.tokenizer) == bool(unk)
    assert llava.embedding_rows == 512 and llava.tokenizer.pad_token_id < len(llava.tokenizer)


def test_without_an_unknown_token_there_is_a_hint(real_format):
    content = load_choice("llm", "qwen1_5_0_5b_chat")
    tokens = content["special_tokens"] | {"pad_token": "<new>"}
    with pytest.raises(ValueError, match="has no unknown token to pad with: set recipe.added_tokens=true"):
        _ = real_format("qwen1_5_0_5b_chat", special_tokens=tokens, added_tokens=False).tokenizer


def test_attention_that_is_not_installed_is_named():
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    with pytest.raises(ValueError, match="llm.attention=flash_attention_2 cannot be used here.*llm.attention=sdpa"):
        build_llm("mini_qwen2", attention="flash_attention_2", pretrained=False)


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_an_architecture_without_this_attention_is_one_line_with_the_key(family, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 576}
    architecture = {"model_type": family, "max_position_embeddings": 128, **sizes}
    says = r"^llm\.attention=sdpa cannot be used here: \w+ForCausalLM does not .* Set llm\.attention=eager\.$"
    with pytest.raises(UsageError, match=says):
        build_llm("mini_qwen2", architecture=architecture, pretrained=False, device="meta")
    AutoConfig.for_model(**architecture).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=says.replace("here: ", "here: .*")):
        build_llm("mini_qwen2", architecture=architecture, pretrained=True, weights=str(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match=rf"^{tmp_path} holds no tokenizer that can be read .*llm\.tokenizer"):
        _ = build_llm("mini_qwen2", tokenizer=str(tmp_path), pretrained=False, device="meta").tokenizer


def own(**architecture):
    """A small Llama, with these settings instead."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"model_type": "llama", "vocab_size": 600, "max_position_embeddings": 64}
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return {"name": "mine", "pretrained": False, "tokenizer": "asset:phi", "special_tokens": tokens,
            "architecture": sizes | architecture}  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"model_type": "lama"}, "Unknown model_type of a causal LM .*mine.* 'lama'. Did you mean 'llama'"),
        ({"model_type": "t5"}, "Unknown model_type of a causal LM .*mine.* 't5'"),
        ({"model_type": "llava"}, "Unknown model_type of a causal LM .*mine.* 'llava'"),
        ({"model_type": 5}, "Unknown model_type of a causal LM .*mine.* '5'"),
        (
            {"num_hidden_layers": "x"},
            "cannot build the architecture of mine.*'num_hidden_layers' expected int, got str",
        ),
        (
            {"num_attention_heads": 5},
            "cannot build the architecture of mine.*not a multiple of the number of attention",
        ),
        ({"model_type": "smollm3"}, "cannot build the architecture of mine.*Padding_idx must be within"),
        ({"hidden_act": "reluu"}, "cannot build the architecture of mine.*KeyError: 'reluu'"),
        ({"head_dim": 0}, "cannot build the architecture of mine.*ZeroDivisionError"),
        ({"hidden_size": -64}, "cannot build the architecture of mine.*negative dimension"),
        ({"num_hiden_layers": 2}, "llm.architecture.num_hiden_layers of mine has no effect: did you mean num_hidden"),
    ],
)
def test_a_wrong_value_in_an_architecture_is_named(setting, reason, tmp_path):
    with pytest.raises(UsageError, match=reason):
        build_llm(own(**setting))
    save_file({"none": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=reason):
        build_llm(own(**setting), pretrained=True, weights=str(tmp_path / "weights.safetensors"))


def test_keys_that_the_class_does_not_know_are_those_of_published_configurations():
    """Older spellings, and keys of other versions of an architecture."""
    legacy = {"rope_theta": 5000.0, "torch_dtype": "float32", "eoi_token_id": 7, "use_sliding_window": False}
    assert build_llm(own(**legacy)).model.config.rope_parameters["rope_theta"] == 5000.0
    # Written into its configuration after it is built.
    assert (
        build_llm(own(model_type="bailing_hybrid", num_experts_per_token=2, pad_token_id=0), device="meta").embed_dim
        == 64
    )


def test_a_bug_in_an_architecture_of_ones_own_stays_a_bug():
    class Own(LlamaConfig):
        model_type = "own_llama"

    class OwnModel(LlamaForCausalLM):
        config_class = Own

        def __init__(self, config):
            super().__init__(config)
            self.depth = 1 / 0

    AutoConfig.register("own_llama", Own)
    AutoModelForCausalLM.register(Own, OwnModel)
    with pytest.raises(ZeroDivisionError):
        build_llm(own(model_type="own_llama"))
