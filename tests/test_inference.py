import pytest
import torch

from prism_deco.inference import answer, answer_losses, first_token_probabilities
from prism_deco.llms.encoding import IGNORE

LLMS = ["mini_qwen2", "mini_phi", "mini_llama"]
QUESTIONS = ["What color is the circle?", "How many?", "Is there a red square in the image, or a blue one?"]


def _visual(vlm, count: int):
    generator = torch.Generator().manual_seed(3)
    pixels = {"mini_siglip": torch.randn(count, 3, 64, 64, generator=generator, dtype=torch.float64)}
    with torch.no_grad():
        return [[tokens] for tokens in vlm.visual_tokens(pixels)]


def _prompt_embeddings(vlm, llm, question, visual, then=()):
    """Embeddings of one prompt, spliced by hand."""
    images = 0 if visual is None else 1
    encoded = llm.encode([{"role": "user", "content": question}], num_images=images, add_generation_prompt=True)
    assert set(encoded.labels) == {IGNORE}
    text = vlm.lm.get_input_embeddings()(torch.tensor([*encoded.input_ids, *then]))
    if visual is None:
        return text[None]
    [slot] = encoded.image_slots
    return torch.cat([text[:slot], visual, text[slot:]])[None]


@pytest.mark.parametrize("llm_name", LLMS)
def test_batched_answers_equal_a_slow_greedy_loop(tiny, llm_name):
    vlm, llm = tiny(llm_name)
    vlm.eval()
    visual = _visual(vlm, 3)
    answers = answer(vlm, llm, visual, QUESTIONS, max_new_tokens=6)
    for question, [tokens], got in zip(QUESTIONS, visual, answers, strict=True):
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 6:
                logits = vlm.lm(inputs_embeds=_prompt_embeddings(vlm, llm, question, tokens, new)).logits[0, -1]
                token = int(logits.argmax())
                if token in llm.eos_ids:
                    break
                new.append(token)
        assert got == llm.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_text_only_and_image_questions_share_a_batch(tiny):
    vlm, llm = tiny()
    vlm.eval()
    visual = [*_visual(vlm, 1), []]
    together = answer(vlm, llm, visual, QUESTIONS[:2], max_new_tokens=5)
    apart = [answer(vlm, llm, [v], [q], max_new_tokens=5)[0] for v, q in zip(visual, QUESTIONS[:2], strict=True)]
    assert together == apart


@pytest.mark.parametrize("llm_name", LLMS)
def test_probabilities_of_the_first_answer_token(tiny, llm_name):
    vlm, llm = tiny(llm_name)
    vlm.eval()
    visual = _visual(vlm, 2)
    got = first_token_probabilities(vlm, llm, visual, QUESTIONS[:2], ["Yes", "No"])
    for row, question, [tokens] in zip(got, QUESTIONS[:2], visual, strict=True):
        with torch.no_grad():
            logits = vlm.lm(inputs_embeds=_prompt_embeddings(vlm, llm, question, tokens)).logits[0, -1]
        ids = []
        for word in ("Yes", "No"):
            talk = [{"role": "user", "content": question}, {"role": "assistant", "content": word}]
            encoded = llm.encode(talk, num_images=1)
            ids.append(next(label for label in encoded.labels if label != IGNORE))
        torch.testing.assert_close(row, logits[ids].float().softmax(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="do not begin with different tokens"):
        first_token_probabilities(vlm, llm, visual[:1], QUESTIONS[:1], ["Yes", "Yes"])


@pytest.mark.parametrize("llm_name", LLMS)
def test_losses_of_given_answers(tiny, llm_name):
    """Token after token by a slow loop, whatever else is in the batch; the end of the answer does not count."""
    vlm, llm = tiny(llm_name)
    vlm.eval()
    visual = [*_visual(vlm, 2), []]
    answers = ["a red square, I think", "two", "No"]
    losses, greedy = answer_losses(vlm, llm, visual, QUESTIONS, answers)
    for loss, question, images, text in zip(losses, QUESTIONS, visual, answers, strict=True):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        ids = [label for label in llm.encode(messages, num_images=len(images)).labels if label != IGNORE]
        while ids[-1] in llm.eos_ids or not llm.tokenizer.decode([ids[-1]]).strip():
            ids.pop()
        assert llm.tokenizer.decode(ids).strip() == text
        by_hand, first = 0.0, ids[0]
        for position, token in enumerate(ids):
            embedded = _prompt_embeddings(vlm, llm, question, images[0] if images else None, ids[:position])
            with torch.no_grad():
                logits = vlm.lm(inputs_embeds=embedded).logits[0, -1]
            by_hand -= logits.float().log_softmax(0)[token].item() / len(ids)
        assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    assert not greedy.any()
    vlm.lm.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: logits + 1000 * torch.eye(logits.shape[-1])[first]
    )
    losses, greedy = answer_losses(vlm, llm, visual, QUESTIONS, answers)
    assert greedy.tolist() == [False, False, True] and losses[2] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="answer is empty"):
        answer_losses(vlm, llm, visual[:1], QUESTIONS[:1], [""])
    with pytest.raises(ValueError, match="shorten the text"):
        answer_losses(vlm, llm, visual[:1], QUESTIONS[:1], ["word " * 5000])


def test_a_prompt_that_fills_the_context_is_refused(tiny):
    vlm, llm = tiny()
    with pytest.raises(ValueError, match="leaves no room for an answer"):
        answer(vlm, llm, [[]], ["word " * 5000], max_new_tokens=5)
