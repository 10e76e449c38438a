"""Models for `bench train`: overrides that the user's arguments follow."""

_SMALL = (
    "recipe=prism",
    "projector=linear",
    "backbone=mini_siglip",
    "backbone.image_size=96",  # 144 visual tokens, as many as DeCo's
    "recipe.max_text_tokens=512",
    "recipe.packing=true",
)
PRESETS: dict[str, tuple[str, ...]] = {
    # Qwen1.5's full vocabulary with decoder layers small enough for a CPU.
    "qwen_small": (
        *_SMALL,
        "llm=qwen1_5_0_5b_chat",
        "llm.architecture.hidden_size=256",
        "llm.architecture.intermediate_size=704",
        "llm.architecture.num_hidden_layers=2",
        "llm.architecture.num_attention_heads=4",
        "llm.architecture.num_key_value_heads=4",
    ),
    # Phi-2's blocks cost 12 x width x depth where its output layer costs the vocabulary. To keep that ratio, both
    # shrink to a 32nd: width x depth from 2560 x 32 to 320 x 8, the vocabulary from 51,200 to 1,600.
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
