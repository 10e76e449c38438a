import numpy as np
import pytest
import torch

from prism_deco.data.samplers import SAMPLERS, Population, StepSampler


def _population(images: int, texts: int, seed: int = 0) -> Population:
    rng = np.random.default_rng(seed)
    has_image = rng.permutation(np.array([True] * images + [False] * texts))
    return Population(words=rng.integers(3, 400, images + texts), has_image=has_image)


@pytest.mark.parametrize("name", ["shuffled", "grouped", "llava"])
@pytest.mark.parametrize(("images", "texts"), [(103, 21), (64, 0), (0, 30), (5, 2)])
def test_every_record_comes_exactly_once_per_epoch(name, images, texts):
    batches = SAMPLERS.get(name)(_population(images, texts), 8, 3, 1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(images + texts))
    assert all(len(batch) == 8 for batch in batches[:-1])


@pytest.mark.parametrize("name", SAMPLERS.names())
def test_the_order_is_a_function_of_the_seed(name):
    population, sampler = _population(96, 32), SAMPLERS.get(name)
    once, again, other = (np.concatenate(sampler(population, 8, seed, 2)).tolist() for seed in (3, 3, 4))
    assert once == again
    assert once != other


@pytest.mark.parametrize("name", ["grouped", "prismatic"])
def test_batches_are_of_one_modality_except_the_mixed_tail(name):
    population = _population(96, 32)
    mixed = [b for b in SAMPLERS.get(name)(population, 8, 0, 1) if 0 < population.has_image[b].sum() < len(b)]
    assert len(mixed) == 0
    tail = SAMPLERS.get("grouped")(_population(97, 33), 8, 0, 1)
    assert len(tail[-1]) == 2


def test_grouping_brings_similar_lengths_together():
    population = _population(1024, 0)
    spread = {
        name: np.mean([np.ptp(population.words[b]) for b in SAMPLERS.get(name)(population, 16, 0, 1)])
        for name in ("shuffled", "grouped")
    }
    assert spread["grouped"] < 0.2 * spread["shuffled"]


def _llava_order(words, has_image, global_batch, ranks, seed):
    """The reference's order (LLaVA's `get_modality_length_grouped_indices`), written out slowly: per step and rank the
    records it trains on."""
    rng = np.random.default_rng(seed)
    steps, last = [], []
    for modality in (True, False):
        members = rng.permutation([i for i in range(len(words)) if has_image[i] == modality]).tolist()
        while len(members) > global_batch:
            steps.append(members[:global_batch])
            members = members[global_batch:]
        last += members
    steps = [steps[k] for k in rng.permutation(len(steps))]
    last.sort()
    steps += [last[i : i + global_batch] for i in range(0, len(last), global_batch)]
    dealt = []
    for step in steps:
        buckets = [[] for _ in range(ranks)]
        for index in sorted(step, key=lambda i: -words[i]):
            free = [bucket for bucket in buckets if len(bucket) < -(-len(step) // ranks)]
            min(free, key=lambda bucket: sum(words[i] for i in bucket)).append(index)
        dealt.append(buckets)
    return dealt


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("images", "texts"), [(48, 16), (43, 13), (44, 14)])
def test_llava_is_the_reference_order(world_size, images, texts):
    """With full last batches, with one that holds them both, with two."""
    population = _population(images, texts)
    batches = SAMPLERS.get("llava")(population, 8, 5, world_size)
    expected = _llava_order(population.words.tolist(), population.has_image.tolist(), 8, world_size, 5)
    assert [sorted(batch) for batch in batches] == [sorted(i for rank in step for i in rank) for step in expected]
    for batch, step in zip(batches, expected, strict=True):
        if len(batch) == 8:  # else a rank may be one short
            assert [batch[rank::world_size].tolist() for rank in range(world_size)] == step


def test_llava_does_not_bring_similar_lengths_together():
    population = _population(1024, 0)
    spread = {
        name: np.mean([np.ptp(population.words[b]) for b in SAMPLERS.get(name)(population, 16, 0, 1)])
        for name in ("shuffled", "llava")
    }
    assert spread["llava"] > 0.9 * spread["shuffled"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_prismatic_fills_balances_and_puts_the_longest_first(world_size):
    population = _population(43, 13)
    batches = SAMPLERS.get("prismatic")(population, 8, 5, world_size)
    assert [len(b) for b in batches] == [8] * (6 + 2)  # ceil(43 / 8) + ceil(13 / 8), filled up
    counts = np.bincount(np.concatenate(batches), minlength=56)
    assert counts.min() == 1 and counts.sum() == 64
    lengths = population.words + np.where(population.has_image, 576, 0)
    assert lengths[batches[0]].max() == lengths.max()
    for batch in batches:  # greedy: each rank's share, dealt longest first to the lightest rank with room
        expected: list[list[int]] = [[] for _ in range(world_size)]
        for index in sorted(batch.tolist(), key=lambda i: -population.words[i]):
            open_ranks = [r for r in range(world_size) if len(expected[r]) < 8 // world_size]
            expected[min(open_ranks, key=lambda r: sum(population.words[i] for i in expected[r]))].append(index)
        got = [sorted(population.words[batch[r::world_size]]) for r in range(world_size)]
        assert got == [sorted(population.words[e]) for e in expected]


def _split_modality_order(words, has_image, global_batch, world_size, seed):
    """The reference's order, written out slowly: per step and rank the records it trains on."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for modality in (True, False):
        members = [i for i in range(len(words)) if has_image[i] == modality]
        members = [members[k] for k in torch.randperm(len(members), generator=generator)]
        chunks = [members[i : i + global_batch] for i in range(0, len(members), global_batch)]
        first = list(chunks[0])
        while len(chunks[-1]) < global_batch:
            chunks[-1].append(first.pop(0))
        batches += chunks
    steps = []
    for batch in batches:
        buckets = [[] for _ in range(world_size)]
        for index in sorted(batch, key=lambda i: -words[i]):
            free = [b for b in buckets if len(b) < global_batch // world_size]
            min(free, key=lambda b: sum(words[i] for i in b)).append(index)
        steps.append(buckets)
    steps = [steps[k] for k in torch.randperm(len(steps), generator=generator)]
    longest = [max(words[i] + 576 * has_image[i] for bucket in step for i in bucket) for step in steps]
    at = longest.index(max(longest))
    steps[0], steps[at] = steps[at], steps[0]
    return steps


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("seed", [7, 8])
def test_prismatic_is_the_reference_order_to_the_record(world_size, seed):
    population = _population(70, 21)
    ranks = [
        list(
            StepSampler(
                "prismatic", population, global_batch_size=8, epochs=1, seed=seed, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    expected = _split_modality_order(population.words.tolist(), population.has_image.tolist(), 8, world_size, seed)
    assert [list(step) for step in zip(*ranks, strict=True)] == expected


def test_prismatic_fills_a_modality_that_is_smaller_than_its_gap():
    batches = SAMPLERS.get("prismatic")(_population(16, 2), 8, 0, 2)
    assert [len(b) for b in batches] == [8, 8, 8]
    assert set(np.concatenate(batches).tolist()) == set(range(18))


def test_prismatic_refuses_a_batch_that_ranks_do_not_divide():
    with pytest.raises(ValueError, match="global_batch_size=6 is not divisible by 4"):
        SAMPLERS.get("prismatic")(_population(12, 0), 6, 0, 4)


@pytest.mark.parametrize("name", ["shuffled", "grouped", "llava"])
def test_ranks_divide_the_same_global_batches(name):
    def steps(world_size, start=0):
        ranks = [
            list(
                StepSampler(
                    name,
                    _population(50, 13),
                    global_batch_size=8,
                    epochs=3,
                    seed=1,
                    rank=rank,
                    world_size=world_size,
                    start_step=start,
                )
            )
            for rank in range(world_size)
        ]
        steps = list(zip(*ranks, strict=True))
        assert all(len({len(share) for share in step}) == 1 for step in steps)  # fillers make up for what is missing
        return [sorted(i for share in step for i in share if isinstance(i, int)) for step in steps]

    alone = steps(1)
    assert len(alone) == 3 * 8
    assert steps(2) == alone
    assert steps(4) == alone
    assert steps(1, start=11) == alone[11:]
    assert alone[:8] != alone[8:16]  # another order in the next epoch
