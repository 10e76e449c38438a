import pytest
import torch

from prism_deco.llms.encoding import IGNORE, Encoded
from prism_deco.sequence import build_batch, sequence_length


def _encoded(n: int, slots: list[int], rounds: list[int] | None = None) -> Encoded:
    ids = list(range(1, n + 1))
    return Encoded(input_ids=ids, labels=[IGNORE, *ids[1:]], rounds=rounds or [0] + [1] * (n - 1), image_slots=slots)


@pytest.mark.parametrize(("slots", "left_pad"), [([1], False), ([0], False), ([4], True), ([1, 3], False), ([], True)])
def test_layout_against_a_list_built_by_hand(slots, left_pad):
    examples, images = [_encoded(4, slots), _encoded(6, [1])], 3
    batch = build_batch(examples, images, left_pad=left_pad)
    longest = max(4 + 3 * len(slots), 6 + 3)
    for row, (n, where) in enumerate([(4, slots), (6, [1])]):
        expected: list[object] = []
        for i in range(n + 1):
            expected += ["image"] * (images * where.count(i))
            if i < n:
                expected.append(i + 1)
        padding = ["pad"] * (longest - len(expected))
        expected = padding + expected if left_pad else expected + padding
        got = [
            "pad" if not mask else "image" if visual else int(token)
            for mask, visual, token in zip(
                batch.attention_mask[row], batch.visual[row], batch.input_ids[row], strict=True
            )
        ]
        assert got == expected
        supervised = [int(label) for label in batch.labels[row] if label != IGNORE]
        assert supervised == list(range(2, n + 1))
        positions = batch.position_ids[row][batch.attention_mask[row]].tolist()
        assert positions == list(range(n + 3 * len(where)))
    assert sequence_length(examples[0], 3) == 4 + 3 * len(slots)


def test_visual_positions_are_unsupervised_and_in_the_round_of_the_text_before():
    batch = build_batch([_encoded(5, [1], rounds=[0, 1, 1, 2, 2])], 2)
    assert batch.rounds[0].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert (batch.labels[batch.visual] == IGNORE).all()


def test_restarted_rounds_all_begin_where_the_shared_prefix_ends():
    batch = build_batch([_encoded(7, [1], rounds=[0, 1, 1, 1, 2, 2, 3])], 2, restart_rounds=True)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3]


def test_targets_are_counted_as_the_shifted_loss_sees_them():
    batch = build_batch([_encoded(4, []), _encoded(2, [])], 0)
    assert len(batch.targets) == 3 + 1
    first = build_batch([Encoded([5, 6], [5, 6], [0, 1], [])], 0)  # a label at position 0 has nothing before it
    assert len(first.targets) == 1


def test_a_packed_row_is_the_padded_rows_without_their_padding():
    examples = [_encoded(4, [1]), _encoded(6, []), Encoded([7, 8], [7, 8], [0, 1], [])]
    padded, packed = (build_batch(examples, 3, pack=pack, ids=["a", "b", "c"]) for pack in (False, True))
    real = padded.attention_mask
    assert packed.lengths == (7, 6, 2) and packed.input_ids.shape == (1, 15) and packed.attention_mask.all()
    for name in ("input_ids", "labels", "visual", "position_ids", "rounds"):
        assert getattr(packed, name)[0].tolist() == getattr(padded, name)[real].tolist(), name
    # The third record supervises its first position, which nothing predicts, in a row of its own or behind others.
    assert len(packed.targets) == len(padded.targets) == 3 + 5 + 1
    assert padded.lengths is None and packed.ids == padded.ids


def test_moving_a_batch_moves_every_tensor():
    batch = build_batch([_encoded(3, [1])], 2, pixels={"a": torch.zeros(1, 3, 2, 2)}, ids=["x"])
    moved = batch.to(torch.device("meta"))
    assert moved.pixels is not None and moved.ids == ("x",)
    tensors = [*[v for v in vars(moved).values() if isinstance(v, torch.Tensor)], *moved.pixels.values()]
    assert len(tensors) == 8 and all(t.device.type == "meta" for t in tensors)
