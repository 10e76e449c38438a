"""Both training steps at tiny sizes: that they compute the same, and what is reported of them."""

import io
import json
import mmap
import statistics

import numpy as np
import pytest
import torch
from rich.console import Console

from prism_deco.bench.hf_llava import WholeTowers, build_peer, peer_loss
from prism_deco.bench.measure import usage
from prism_deco.bench.presets import PRESETS
from prism_deco.bench.records import MIXTURE, encode, json_bytes, sample
from prism_deco.bench.train import ABLATION, bench_train
from prism_deco.bench.train_report import GROUPED, OURS, PLAIN, Agreement, TrainReport, VariantRow, render
from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.sequence import build_batch

TINY = [
    "recipe=prism",
    "projector=linear",
    "backbone=mini_siglip",
    "backbone.image_size=32",
    "recipe.max_text_tokens=40",
]


@pytest.fixture(scope="module")
def report():
    config = load_config([*TINY, "llm=mini_phi", "recipe.max_logits=5000"])
    return bench_train(config, batch_size=3, steps=2, rounds=2, ablation=True)


def test_every_way_is_measured(report):
    assert [row.name for row in report.rows] == [OURS, PLAIN, GROUPED, *ABLATION]
    assert report.agreement.loss < 1e-5 and report.agreement.gradient < 1e-5
    ours, plain, grouped, *alone = report.rows
    assert ours.padding == 0 < grouped.padding <= plain.padding
    assert [row.padding == 0 for row in alone] == [name == "packing" for name in ABLATION]
    for row in report.rows:
        assert row.samples_per_s == pytest.approx(6 / statistics.median(row.seconds)) and len(row.seconds) == 2
        assert row.tokens_per_s * statistics.median(row.seconds) == pytest.approx(
            ours.tokens_per_s * statistics.median(ours.seconds)
        )
        assert row.mfu > 0 and all(s > 0 for s in row.cpu_seconds)


def test_ratios_pair_the_rounds(tmp_path):
    rows = [
        VariantRow(OURS, 4.0, 8.0, 200, 0.5, 0.0, (1.0, 2.0, 4.0), (1.0, 1.0, 2.0)),
        VariantRow(PLAIN, 2.0, 4.0, 800, 0.2, 0.4, (3.0, 4.0, 20.0), (2.0, 2.0, 2.0)),
        VariantRow(GROUPED, 2.0, 4.0, None, 0.2, 0.1, (2.0, 3.0, 4.0), (3.0, 1.0, 2.0)),
    ]
    about = {"llm": "x", "architecture": {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9000}}
    about |= {"visual_tokens": 4, "batch_size": 2, "precision": "32-true", "hardware": "abacus", "threads": 1}
    report = TrainReport(about, Agreement(1e-8, 2e-7), rows)
    assert report.ratio(OURS, PLAIN) == (3.0, 2.0, 5.0)
    assert report.ratio(OURS, PLAIN, "cpu_seconds") == (2.0, 1.0, 2.0)
    assert report.memory_ratio(OURS, PLAIN) == 0.25 and report.memory_ratio(OURS, GROUPED) is None
    report.write(tmp_path / "out" / "bench.json")
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert content["about"]["hardware"] == "abacus" and content["agreement"]["gradient"] == 2e-7
    assert content["rows"][0][f"times {PLAIN}"] == [3.0, 2.0, 5.0]
    assert content["rows"][0][f"memory of {PLAIN}"] == 0.25
    console = Console(width=250, file=io.StringIO())
    console.print(render(report))
    text = console.file.getvalue()
    for part in ("abacus", "vocabulary 9,000", "3.00 (2.00-5.00)", "2.00 (1.00-2.00)", "0.25", "2e-07"):
        assert part in text


@pytest.mark.parametrize("llm", ["mini_qwen2", "mini_llama"])
def test_the_peer_places_images_where_we_do(tiny, llm):
    vlm, language = tiny(llm, projector="linear", tokens=None)
    whole = WholeTowers(vlm.backbone, vlm.backbone)
    talks = [("<image>\nWhat is it?", "a red circle", 1), ("Hi", "Hello there", 0), ("<image>\nColor?", "red", 1)]
    encoded = [
        language.encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], num_images=n)
        for q, a, n in talks
    ]
    pixels = {"mini_siglip": torch.randn(2, 3, 64, 64, dtype=torch.float64)}
    batch = build_batch(encoded, 64, pixels=pixels)
    loss = peer_loss(build_peer(vlm, whole), batch, batch.num_targets)
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad()
    ours = vlm(build_batch(encoded, 64, pixels=pixels, pack=True))
    (ours.total / ours.count).backward()
    assert float((ours.total / ours.count).detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, parameter in vlm.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(theirs.pop(name), parameter.grad, atol=1e-7, rtol=1e-4)
    assert not theirs


def test_towers_run_to_the_end_give_the_same_features():
    from prism_deco.backbones import build_backbone

    for name in ("mini_dinov2_siglip", "mini_clip"):
        torch.manual_seed(0)
        backbone = build_backbone(name, pretrained=False)
        whole = WholeTowers(backbone, build_backbone(name, pretrained=False, layer=-1))
        pixels = {tower: torch.randn(2, 3, 64, 64) for tower in backbone.towers}
        last = whole.blocks[-1]
        ran = []
        last.register_forward_hook(lambda *_, ran=ran: ran.append(True))
        torch.testing.assert_close(whole(pixels), backbone(pixels))
        assert ran and len(whole.blocks) == len(backbone.blocks) + len(backbone.towers)


def test_a_model_that_the_peer_cannot_express_is_refused(tiny):
    vlm, _ = tiny(projector="avgpool")
    with pytest.raises(ValueError, match="projector=linear recipe=prism"):
        build_peer(vlm, vlm.backbone)
    with pytest.raises(ValueError, match="rounds=1 shows no spread"):
        bench_train(load_config(TINY), rounds=1)


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
        bench_train(load_config([*TINY, "llm=mini_qwen2"]), batch_size=2, steps=1, rounds=2)


def test_records_have_the_lengths_of_the_mixture():
    assert sum(source.records for source in MIXTURE.values()) == 665_298
    assert sum(source.records for source in MIXTURE.values() if source.image) == 624_610
    shapes = sample(6000)
    assert np.mean([shape.image for shape in shapes]) == pytest.approx(624_610 / 665_298, abs=0.01)
    assert json_bytes(shapes) == pytest.approx(1548, rel=0.12)
    assert np.mean([len(s.rounds) for s in shapes if s.source == "gqa"]) == pytest.approx(13, rel=0.05)
    shape = next(shape for shape in shapes if shape.source == "llava_conversation" and len(shape.rounds) == 3)
    encoded = encode(shape, 100, np.random.default_rng(0), max_text_tokens=2048)
    words = [turn[0] for turns in shape.rounds for turn in turns]
    assert len(encoded.input_ids) == 1 + 3 * 8 + sum(round(1.3 * n) for n in words)
    supervised = sum(label >= 0 for label in encoded.labels)
    assert supervised == 3 + sum(round(1.3 * turns[1][0]) for turns in shape.rounds)
    assert max(encoded.rounds) == 3 and encoded.image_slots == [1] and max(encoded.input_ids) < 100
    assert len(encode(shape, 100, np.random.default_rng(0), max_text_tokens=20).input_ids) == 20


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
    with usage(torch.device("cpu")) as taken:
        _held(size).close()
        held = _held(2 * size)
    if taken.peak is not None:
        assert taken.peak == pytest.approx(2 * size, rel=0.1)
    assert taken.seconds > 0
    held.close()
    with usage(torch.device("cpu")) as nothing:
        pass
    if nothing.peak is not None:
        assert nothing.peak < size / 8
