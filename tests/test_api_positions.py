"""The LLM's positions bound image and text together, from the configuration to the manifest."""

import json

import pytest

import prism_deco
from prism_deco.build import build_model
from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.sequence import sequence_length


@pytest.mark.parametrize(("side", "fits"), [(630, True), (644, False)])
def test_phi2_has_2048_positions_for_image_and_text(side, fits):
    """45 x 45 patches of 14 px leave 23 positions, 46 x 46 leave none."""
    choices = ["backbone=clip_vit_l_336", "llm=phi2", "projector=linear", "recipe=prism"]
    config = load_config([*choices, f"backbone.image_size={side}"])
    if fits:
        vlm, llm = build_model(config, device="meta")
        assert (vlm.projector.num_tokens, llm.max_positions) == (45 * 45, 2048)
    else:
        with pytest.raises(ValueError, match="2116 visual tokens leave no room for text in .*2048 positions"):
            build_model(config, device="meta")


def test_what_is_cut_is_counted(colors, tmp_path):
    """Nine records, read once: the manifest counts the tokens that do not fit beside 16 visual ones."""
    positions = 40
    command = [
        "train", "data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}",
        "data.val_fraction=0", "data.num_workers=0", "recipe.global_batch_size=3", "recipe.micro_batch_size=3",
        f"llm.architecture.max_position_embeddings={positions}", "recipe.max_text_tokens=200", "trainer.threads=1",
        "evaluate.benchmarks=null", f"runs_dir={tmp_path}", "run_id=short",
    ]  # fmt: skip
    assert main(command) == 0
    llm = prism_deco.load(tmp_path / "short").llm
    lengths = []
    for record in json.loads((colors / "train.json").read_text()):
        talk = [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
                for turn in record["conversations"]]  # fmt: skip
        lengths.append(sequence_length(llm.encode(talk, num_images=int("image" in record)), 16))
    by_hand = sum(max(0, length - positions) for length in lengths)
    assert 0 < by_hand == json.loads((tmp_path / "short" / "manifest.json").read_text())["text_tokens_cut"]
