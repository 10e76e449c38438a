"""Models for `bench train`: overrides to begin with, the user's follow."""

_SMALL = (
    "recipe=prism",
    "projector=linear",
    "backbone=mini_siglip",
    "backbone.image_size=96",  # 144 visual tokens, as many as DeCo's
    "recipe.max_text_tokens=512",
    "recipe.packing=true",
)
PRESETS: dict[str, tuple[str, ...]] = {
    # Qwen1.5's whole vocabulary on a body that a CPU can carry.
    "qwen_small": (
        *_SMALL,
        "llm=qwen1_5_0_5b_chat",
        "llm.architecture.hidden_size=256",
        "llm.architecture.intermediate_size=704",
        "llm.architecture.num_hidden_layers=2",
        "llm.architecture.num_attention_heads=4",
        "llm.architecture.num_key_value_heads=4",
    ),
    # Phi-2's block cost is to its output layer's as 12 x width x depth to the vocabulary. Width x depth shrinks from
    # 2560 x 32 to a 32nd, 320 x 8; the vocabulary with it, from 51,200 to 1,600.
    "phi2_small": (
        *_SMALL,
        "llm=phi2",
        "llm.architecture.hidden_size=320",
        "llm.architecture.intermediate_size=1280",
        "llm.architecture.num_hidden_layers=8",
        "llm.architecture.num_attention_heads=4",
        "llm.architecture.num_key_value_heads=4",
        "llm.architecture.vocab_size=1600",
        "llm.tokenizer_size=1600",
    ),
    "real": ("recipe=prism", "projector=linear", "trainer=gpu", "recipe.packing=true"),
}
