"""Both training steps at tiny sizes: that they compute the same, and what is reported of them."""

import io
import json
import mmap
import statistics

import numpy as np
import pytest
import torch
from rich.console import Console

from prism_deco.bench.hf_llava import build_peer, peer_loss
from prism_deco.bench.measure import Usage, usage
from prism_deco.bench.presets import PRESETS
from prism_deco.bench.records import MIXTURE, draw_rounds, encode
from prism_deco.bench.result import BenchRow
from prism_deco.bench.train import GROUPED, OURS, PLAIN, bench_train, train_result
from prism_deco.build import build_model
from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.sequence import build_batch

TINY = [
    "recipe=prism",
    "projector=linear",
    "backbone=mini_siglip",
    "backbone.image_size=32",
    "recipe.max_text_tokens=40",
    "recipe.packing=true",
]
CPU = torch.device("cpu")


def test_every_variant_is_measured():
    config = load_config([*TINY, "llm=mini_phi", "recipe.max_logits=5000"])
    result = bench_train(config, device=CPU, batch_size=3, steps=2, rounds=2)
    assert [row.name for row in result.rows] == [OURS, PLAIN, GROUPED]
    assert max(result.about["agreement"].values()) < 1e-5
    ours, plain, grouped = result.rows
    assert ours.facts["padding"] == 0 < grouped.facts["padding"] <= plain.facts["padding"]
    for row in result.rows:
        median = statistics.median(row.times())
        assert row.facts["samples_per_s"] == pytest.approx(6 / median) and len(row.taken) == 2
        assert row.facts["tokens_per_s"] * median == pytest.approx(
            ours.facts["tokens_per_s"] * statistics.median(ours.times())
        )
        assert min(row.times("cpu_seconds")) > 0


def test_ratios_pair_the_rounds(tmp_path):
    def row(name, peak, seconds, cpu_seconds):
        facts = {"samples_per_s": 4.0, "tokens_per_s": 8.0, "peak": peak, "padding": 0.4}
        return BenchRow(name, [Usage(*times) for times in zip(seconds, cpu_seconds, strict=True)], facts)

    rows = [
        row(OURS, 200, (1.0, 2.0, 4.0), (1.0, 1.0, 2.0)),
        row(PLAIN, 800, (3.0, 4.0, 20.0), (2.0, 2.0, 2.0)),
        row(GROUPED, None, (2.0, 3.0, 4.0), (3.0, 1.0, 2.0)),
    ]
    about = {"llm": "x", "architecture": {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9000}}
    about |= {"visual_tokens": 4, "batch_size": 2, "precision": "32-true", "hardware": "abacus", "threads": 1}
    result = train_result(rows, about, {"loss": 1e-8, "gradient": 2e-7})
    result.write(tmp_path / "out" / "bench.json")
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert content["about"]["hardware"] == "abacus" and content["agreement"]["gradient"] == 2e-7
    ours = content["rows"][0]
    assert ours[f"times {PLAIN}"] == [3.0, 2.0, 5.0] and ours[f"times {PLAIN}, processor"] == [2.0, 1.0, 2.0]
    assert ours[f"memory of {PLAIN}"] == 0.25 and ours[f"memory of {GROUPED}"] is None
    assert ours["seconds"] == [1.0, 2.0, 4.0] and ours["name"] == OURS
    console = Console(width=250, file=io.StringIO())
    console.print(result.table())
    text = console.file.getvalue()
    for part in ("abacus", "vocabulary 9,000", "3.00 (2.00-5.00)", "2.00 (1.00-2.00)", "0.25", "2e-07"):
        assert part in text


@pytest.mark.parametrize("llm, projector, tokens", [("mini_qwen2", "linear", 64), ("mini_llama", "avgpool", 16)])
def test_the_peer_places_images_where_we_do(tiny, llm, projector, tokens):
    vlm, language = tiny(llm, projector, None if projector == "linear" else tokens)
    talks = [("<image>\nWhat is it?", "a red circle", 1), ("Hi", "Hello there", 0), ("<image>\nColor?", "red", 1)]
    encoded = [
        language.encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], num_images=n)
        for q, a, n in talks
    ]
    pixels = {"mini_siglip": torch.randn(2, 3, 64, 64, dtype=torch.float64)}
    batch = build_batch(encoded, tokens, pixels=pixels)
    loss = peer_loss(build_peer(vlm), batch, len(batch.targets))
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad()
    ours = vlm(build_batch(encoded, tokens, pixels=pixels, pack=True))
    (ours.total / ours.count).backward()
    assert float((ours.total / ours.count).detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, parameter in vlm.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(theirs.pop(name), parameter.grad, atol=1e-7, rtol=1e-4)
    assert not theirs


@pytest.mark.parametrize("backbone", ["clip_vit_l_336", "siglip_so400m_384", "dinov2_siglip_384"])
def test_real_towers_have_a_peer(backbone):
    config = load_config([f"backbone={backbone}", "llm=qwen1_5_0_5b_chat", "projector=linear", "recipe=prism"])
    vlm, _ = build_model(config, device="meta")
    peer = build_peer(vlm)
    assert peer.model.vision_tower.backbone is vlm.backbone and peer.model.language_model is vlm.lm.base_model
    assert peer.model.multi_modal_projector.linear_1.in_features == vlm.backbone.embed_dim


def test_a_model_that_the_peer_cannot_express_is_refused(tiny):
    vlm, _ = tiny(turn_mask="block")
    with pytest.raises(ValueError, match="recipe=prism"):
        build_peer(vlm)
    with pytest.raises(ValueError, match="rounds=1 shows no spread"):
        bench_train(load_config(TINY), device=CPU, rounds=1)


def test_the_command_prints_a_table_and_writes_the_numbers(tmp_path, capsys):
    sizes = ["--batch-size", "2", "--steps", "1", "--rounds", "2", "--out", str(tmp_path / "bench.json")]
    smaller = ["llm=mini_qwen2", "backbone.image_size=32", "recipe.max_text_tokens=30", "trainer.threads=1"]
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "train", *sizes, *smaller]) == 0
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["about"]["batch_size"] == 2 and content["about"]["hardware"] and content["about"]["threads"] == 1
    assert [row["name"] for row in content["rows"]] == [OURS, PLAIN, GROUPED]
    assert all(row[f"times {PLAIN}"][1] > 0 for row in content["rows"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "mini_qwen2 (256 x 2, vocabulary 576), 16 visual tokens, batch 2" in printed


def test_steps_that_differ_are_not_compared(monkeypatch):
    from prism_deco.bench import train

    monkeypatch.setattr(train, "peer_loss", lambda peer, batch, targets: 1.01 * peer_loss(peer, batch, targets))
    with pytest.raises(ValueError, match="disagree numerically"):
        bench_train(load_config([*TINY, "llm=mini_qwen2"]), device=CPU, batch_size=2, steps=1, rounds=2)


def test_records_have_the_lengths_of_the_mixture():
    assert sum(source.records for source in MIXTURE.values()) == 665_298
    assert sum(source.records for source in MIXTURE.values() if source.image) == 624_610
    records = draw_rounds(6000)
    assert np.mean([MIXTURE[name].image for name, _ in records]) == pytest.approx(624_610 / 665_298, abs=0.01)
    assert np.mean([len(rounds) for name, rounds in records if name == "gqa"]) == pytest.approx(13, rel=0.05)
    # Half of these answers are boxes; the words of the others are the part's, 1.3 tokens each.
    answers = [answer for name, rounds in records if name == "vg" for _, answer in rounds]
    boxes = [answer for answer in answers if answer == 20]
    assert len(boxes) / len(answers) == pytest.approx(0.5, abs=0.03)
    assert np.mean([answer for answer in answers if answer != 20]) == pytest.approx(1.3 * 4, rel=0.1)
    rounds = next(rounds for name, rounds in records if name == "llava_conversation" and len(rounds) == 3)
    encoded = encode(rounds, True, 100, np.random.default_rng(0), max_text_tokens=2048)
    assert len(encoded.input_ids) == 1 + 3 * 8 + sum(question + answer for question, answer in rounds)
    assert sum(label >= 0 for label in encoded.labels) == 3 + sum(answer for _, answer in rounds)
    assert max(encoded.rounds) == 3 and encoded.image_slots == [1] and max(encoded.input_ids) < 100
    assert len(encode(rounds, True, 100, np.random.default_rng(0), max_text_tokens=20).input_ids) == 20


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = load_config(PRESETS[name])
    assert config.projector.name == "linear" and config.recipe.name == "prism"
    if name == "phi2_small":
        shape, full = config.llm.architecture, load_config(["llm=phi2"]).llm.architecture
        for key in (shape, full):
            assert key.intermediate_size == 4 * key.hidden_size
            assert key.hidden_size * key.num_hidden_layers / key.vocab_size == 1.6


def _held(size: int) -> mmap.mmap:
    """Memory that goes back to the system when it is closed, not to an allocator."""
    memory = mmap.mmap(-1, size)
    memory[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
    return memory


def test_the_peak_is_what_was_held_at_once():
    size = 2**26
    with usage(CPU, memory=True) as taken:
        _held(size).close()
        held = _held(2 * size)
    if taken.peak is not None:
        assert taken.peak == pytest.approx(2 * size, rel=0.1)
    assert taken.seconds > 0
    held.close()
    with usage(CPU, memory=True) as nothing:
        pass
    if nothing.peak is not None:
        assert nothing.peak < size / 8
