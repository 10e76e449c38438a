from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from prism_deco.sequence import build_batch

LLMS = ["mini_qwen2", "mini_phi", "mini_llama"]
TALK = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "a red circle"},
    {"role": "user", "content": "Is there a blue square?"},
    {"role": "assistant", "content": "No"},
]
TEXT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]


def _pixels(vlm, count: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, vlm.backbone.image_size, vlm.backbone.image_size)
    return {tower: torch.randn(shape, generator=generator, dtype=torch.float64) for tower in vlm.backbone.towers}


@pytest.mark.parametrize("llm", LLMS)
def test_loss_and_gradients_equal_transformers_own(tiny, llm):
    vlm, language = tiny(llm)
    encoded = [language.encode(TALK, num_images=1), language.encode(TEXT)]
    batch = build_batch(encoded, 4, pixels=_pixels(vlm, 1))
    loss = vlm(batch)
    (loss.total / loss.count).backward()
    got = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}

    # By hand: concatenate the embeddings of one conversation after the other, let transformers do the rest.
    vlm.zero_grad()
    tokens = vlm.projector(vlm.backbone(_pixels(vlm, 1)))[0]
    embed = vlm.lm.get_input_embeddings()
    total, count = 0.0, 0
    for example, images in zip(encoded, ([tokens], []), strict=True):
        slot = example.image_slots[0] if images else 0
        text = embed(torch.tensor(example.input_ids))
        embeddings = torch.cat([text[:slot], *images, text[slot:]])[None]
        labels = example.labels[:slot] + [-100] * (4 * len(images)) + example.labels[slot:]
        logits = vlm.lm(inputs_embeds=embeddings).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    assert int(loss.count) == count == len(batch.targets)
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-6)
    (total / count).backward()
    for name, parameter in vlm.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-7, rtol=1e-5)
    assert {n for n in got if n.startswith("projector.")} == {
        f"projector.{n}" for n, _ in vlm.projector.named_parameters()
    }
    assert not any(name.startswith("backbone.") for name in got)


@pytest.mark.parametrize("llm", LLMS)
def test_a_block_masked_round_is_a_conversation_of_its_own(tiny, llm):
    vlm, language = tiny(llm, turn_mask="block")
    pixels = _pixels(vlm, 1)
    both = vlm(build_batch([language.encode(TALK, num_images=1)], 4, pixels=pixels, restart_rounds=True))
    alone = [
        vlm(build_batch([language.encode(turns, num_images=1)], 4, pixels=pixels, restart_rounds=True))
        for turns in (TALK[:2], TALK[2:])
    ]
    assert int(both.count) == sum(int(a.count) for a in alone)
    assert float(both.total) == pytest.approx(sum(float(a.total) for a in alone), rel=1e-6)
    vlm.turn_mask = "causal"
    plain = vlm(build_batch([language.encode(TALK, num_images=1)], 4, pixels=pixels))
    assert float(plain.total) != pytest.approx(float(both.total), rel=1e-6)


@pytest.mark.parametrize("llm", LLMS)
def test_padding_on_the_right_keeps_the_kernel_for_causal_attention(tiny, llm, monkeypatch):
    vlm, language = tiny(llm)
    seen = []

    def recorded(*args, attn_mask=None, is_causal=False, **options):
        seen.append((attn_mask is None, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    encoded = [language.encode(TALK, num_images=1), language.encode(TEXT)]
    pixels = _pixels(vlm, 1)
    visual = vlm.visual_tokens(pixels)
    seen.clear()
    vlm.hidden_states(build_batch(encoded, 4), visual)
    assert seen and set(seen) == {(True, True)}
    seen.clear()
    vlm.hidden_states(build_batch(encoded, 4, left_pad=True), visual)
    assert set(seen) == {(False, False)}


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("turn_mask", ["causal", "block"])
def test_padding_changes_nothing(tiny, llm, turn_mask):
    vlm, language = tiny(llm, turn_mask=turn_mask)
    talks = [language.encode(TALK, num_images=1), language.encode(TALK[:2], num_images=1)]
    pixels = _pixels(vlm, 2)
    together = vlm(build_batch(talks, 4, pixels=pixels))
    apart = [
        vlm(build_batch([talk], 4, pixels={k: v[i : i + 1] for k, v in pixels.items()})) for i, talk in enumerate(talks)
    ]
    assert float(together.total) == pytest.approx(sum(float(a.total) for a in apart), rel=1e-6)


def _step(vlm, encoded, pixels, sizes, pack: bool):
    """The mean loss over all tokens of a global batch, in passes of these sizes, and its gradients."""
    vlm.zero_grad()
    passes, at, image = [], 0, 0
    for size in sizes:
        members = encoded[at : at + size]
        images = sum(len(e.image_slots) for e in members)
        own = {k: v[image : image + images] for k, v in pixels.items()} if images else None
        passes.append(build_batch(members, 4, pixels=own, pack=pack, restart_rounds=vlm.turn_mask == "block"))
        at, image = at + size, image + images
    targets = sum(len(batch.targets) for batch in passes)
    total = 0.0
    for batch in passes:
        loss = vlm(batch).total / targets
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("turn_mask", ["causal", "block"])
@pytest.mark.parametrize("llm", LLMS)
def test_the_step_is_the_same_in_any_number_of_passes_packed_or_padded(tiny, llm, turn_mask):
    vlm, language = tiny(llm, turn_mask=turn_mask)
    talks = [(TALK, 1), (TEXT, 0), (TALK[:2], 1), (TEXT, 0), (TALK, 1), (TALK[:2], 1), (TALK, 1), (TEXT, 0)]
    encoded = [language.encode(talk, num_images=images) for talk, images in talks]
    pixels = _pixels(vlm, 5)
    loss, gradients = _step(vlm, encoded, pixels, [8], pack=False)
    for pack, sizes, max_logits in (
        (True, [8], None),
        (True, [2, 2, 2, 2], 4 * 576),
        (False, [4, 4], None),
        (False, [1] * 8, 576),
    ):
        vlm.max_logits = max_logits
        other, others = _step(vlm, encoded, pixels, sizes, pack)
        assert other == pytest.approx(loss, rel=1e-6)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-7, rtol=1e-5, msg=f"{name} {pack} {sizes}")


def test_an_all_text_batch_still_gives_the_projector_gradients(tiny):
    vlm, language = tiny()
    vlm.train()
    loss = vlm(build_batch([language.encode(TEXT)], 4))
    loss.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in vlm.projector.parameters())
    vlm.eval()
    assert float(vlm(build_batch([language.encode(TEXT)], 4)).total) == pytest.approx(float(loss.total), rel=1e-9)


def test_several_images_go_to_their_slots_in_order(tiny):
    vlm, language = tiny()
    talk = [{"role": "user", "content": "<image> <image>\nSame?"}, {"role": "assistant", "content": "No"}]
    encoded = language.encode(talk, num_images=2)
    pixels = _pixels(vlm, 2)
    batch = build_batch([encoded], 4, pixels=pixels)
    tokens = vlm.visual_tokens(pixels)
    embeddings = vlm.embed(batch)[0][batch.visual[0]]
    torch.testing.assert_close(embeddings, tokens.reshape(8, -1))


def test_options_on_features_and_tokens(tiny):
    vlm, language = tiny(standardise_features=True, token_scale=0.5)
    pixels = _pixels(vlm, 3)
    raw = vlm.backbone(pixels)
    vlm.fit_features(pixels)
    features = vlm.features(pixels)
    torch.testing.assert_close(features.mean((0, 1)), torch.zeros(96, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std((0, 1)), torch.ones(96, dtype=torch.float64), atol=1e-5, rtol=0)
    expected = 0.5 * vlm.projector((raw - raw.mean((0, 1))) / raw.std((0, 1)))
    torch.testing.assert_close(vlm.visual_tokens(pixels), expected, atol=1e-5, rtol=1e-5)

    blind, _ = tiny(blind=True)
    batches = [build_batch([language.encode(TALK, num_images=1)], 4, pixels=_pixels(blind, 1, seed)) for seed in (1, 2)]
    assert float(blind(batches[0]).total) == float(blind(batches[1]).total)
    with pytest.raises(ValueError, match="without standardise_features"):
        blind.fit_features(pixels)


def test_the_backbone_stays_frozen_and_in_eval_mode(tiny):
    vlm, _ = tiny()
    vlm.train()
    assert vlm.projector.training and vlm.lm.training
    assert not any(m.training for m in vlm.backbone.modules())
    assert not any(p.requires_grad for p in vlm.backbone.parameters())
    assert all(p.requires_grad for p in [*vlm.projector.parameters(), *vlm.lm.parameters()])


def test_parts_that_do_not_fit_are_refused(tiny):
    from prism_deco.projectors import build_projector
    from prism_deco.vlm import VLM

    vlm, _ = tiny()
    wrong = build_projector("avgpool", 96, 128, (6, 6), 4)
    with pytest.raises(ValueError, match=r"built for grid \(6, 6\) of 96 channels, the backbone gives grid \(8, 8\)"):
        VLM(vlm.backbone, wrong, vlm.lm)
    with pytest.raises(ValueError, match="Unknown turn_mask 'window'"):
        VLM(vlm.backbone, vlm.projector, vlm.lm, turn_mask="window")


def test_nothing_flows_back_into_the_features(tiny):
    vlm, _ = tiny()
    vlm.backbone.requires_grad_(True)
    assert not vlm.features(_pixels(vlm, 1)).requires_grad


@pytest.mark.parametrize(("projector", "inside"), [("d_abstractor", torch.float32), ("avgpool", torch.bfloat16)])
def test_half_precision_leaves_out_a_projector_that_asks_for_more(tiny, projector, inside):
    vlm, language = tiny("mini_llama", projector)
    vlm.float().cast(torch.bfloat16)
    assert {p.dtype for p in vlm.projector.parameters()} == {inside}
    assert {p.dtype for part in (vlm.backbone, vlm.lm) for p in part.parameters()} == {torch.bfloat16}
    pixels = {name: value.bfloat16() for name, value in _pixels(vlm, 1).items()}
    tokens = vlm.visual_tokens(pixels)
    assert tokens.dtype == torch.bfloat16 and tokens.isfinite().all()
    vlm(build_batch([language.encode(TALK, num_images=1)], 4, pixels=pixels))


@pytest.mark.parametrize("pack", [False, True])
def test_a_step_does_not_wait_for_the_device(tiny, pack):
    """Fake tensors have no data: an operation whose result's size depends on values, for which a GPU is waited for,
    fails on them."""
    vlm, language = tiny(LLMS[0])
    encoded = [language.encode(TALK, num_images=1), language.encode(TEXT)]
    batch = build_batch(encoded, 4, pixels=_pixels(vlm, 1), pack=pack)
    with FakeTensorMode() as fake:
        tensors = {**dict(vlm.named_parameters()), **dict(vlm.named_buffers())}
        replaced = {name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
        moved = {
            name: fake.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
        }
        pixels = {name: fake.from_tensor(value) for name, value in batch.pixels.items()}
        loss = functional_call(vlm, replaced, (replace(batch, **moved, pixels=pixels),))
        (loss.total / loss.count).backward()
