"""The order of the records: each epoch's global batches as a pure function of (seed, epoch).

Rank r of W takes every W-th entry of a global batch, starting at r, and a filler if it is one short: all ranks must run
the same number of forward passes, or they deadlock. Samplers have no state, so a resumed run has none to restore, and
the order does not depend on loader processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest

import numpy as np
import torch

from prism_deco.config.registry import Registry
from prism_deco.errors import UsageError


@dataclass(frozen=True)
class Population:
    """What samplers know of the records."""

    words: np.ndarray  # int[n], length of each record in whitespace-separated words
    has_image: np.ndarray  # bool[n]


@dataclass(frozen=True)
class Filler:
    """Fills up a rank's batch that is one record short: the record `index`, without labels."""

    index: int


Share = list[int | Filler]
"""What one rank loads for one optimizer step: indices of records, then fillers."""

EpochSampler = Callable[[Population, int, int, int], list[np.ndarray]]
"""(population, global batch size, generator seed, world size) -> global batches, int64[<= G] each."""

SAMPLERS: Registry[EpochSampler] = Registry("sampler")


@SAMPLERS.register("shuffled")
def shuffled(population: Population, batch_size: int, seed: int, world_size: int) -> list[np.ndarray]:
    """A plain permutation; the last batch may be smaller."""
    order = np.random.default_rng(seed).permutation(len(population.words))
    return _chunks(order, batch_size)


@SAMPLERS.register("grouped")
def grouped(population: Population, batch_size: int, seed: int, world_size: int) -> list[np.ndarray]:
    """Batches of one modality and of similar length, in random order; each record exactly once.

    Records are sorted by length within windows of 32 batches only, which preserves randomness. Records that do not fill
    a batch of their modality go into mixed batches at the end.
    """
    rng = np.random.default_rng(seed)
    window = 32 * batch_size
    batches: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for modality in (True, False):
        members = rng.permutation(np.flatnonzero(population.has_image == modality))
        full = len(members) // batch_size * batch_size
        rest.append(members[full:])
        for members_window in _chunks(members[:full], window):
            by_length = members_window[np.argsort(-population.words[members_window], kind="stable")]
            batches += _chunks(by_length, batch_size)
    order = rng.permutation(len(batches))
    return [batches[i] for i in order] + _chunks(rng.permutation(np.concatenate(rest)), batch_size)


@SAMPLERS.register("llava")
def llava(population: Population, batch_size: int, seed: int, world_size: int) -> list[np.ndarray]:
    """The order of LLaVA (`LengthGroupedSampler` with `group_by_modality`); each record exactly once.

    Batches are of one modality, drawn and ordered at random; lengths only decide which rank gets which record. The last
    batches of both modalities are merged and put at the end.
    """
    rng = np.random.default_rng(seed)
    batches: list[np.ndarray] = []
    last: list[np.ndarray] = []
    for modality in (True, False):
        chunks = _chunks(rng.permutation(np.flatnonzero(population.has_image == modality)), batch_size)
        batches += chunks[:-1]
        last += chunks[-1:]
    batches = [batches[i] for i in rng.permutation(len(batches))]
    batches += _chunks(np.sort(np.concatenate(last)), batch_size)
    return [_balance(batch, population.words, world_size) for batch in batches]


@SAMPLERS.register("prismatic")
def prismatic(population: Population, batch_size: int, seed: int, world_size: int) -> list[np.ndarray]:
    """The split-modality, length-balanced order of prismatic-vlms (`SplitModalitySampler`), with its quirks: the last
    batch of a modality is filled up from its first, and the batch with the longest record (an image counts as 24 x 24
    words) is swapped to the front.
    """
    if batch_size % world_size:
        raise UsageError(f"recipe.global_batch_size={batch_size} is not divisible by {world_size} processes.")
    generator = torch.Generator().manual_seed(seed)
    permuted = {}
    for modality in (True, False):
        members = np.flatnonzero(population.has_image == modality)
        permuted[modality] = members[torch.randperm(len(members), generator=generator).numpy()]
    batches: list[np.ndarray] = []
    for members in permuted.values():
        chunks = _chunks(members, batch_size)
        if chunks and len(chunks[-1]) < batch_size:
            # Unlike the original, which fails, this repeats the first batch if the modality is smaller than the gap.
            chunks[-1] = np.concatenate([chunks[-1], np.resize(chunks[0], batch_size - len(chunks[-1]))])
        batches += [_balance(chunk, population.words, world_size) for chunk in chunks]
    batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    lengths = population.words + np.where(population.has_image, 24 * 24, 0)
    longest = int(np.argmax([lengths[batch].max() for batch in batches]))
    batches[0], batches[longest] = batches[longest], batches[0]
    return batches


def _balance(batch: np.ndarray, words: np.ndarray, world_size: int) -> np.ndarray:
    """Assigns the records of a batch, longest first, to the rank with the fewest words among those with room left.

    Returns:
        int64[len(batch)], interleaved: rank r has every `world_size`-th entry, starting at r.
    """
    capacity = math.ceil(len(batch) / world_size)
    buckets: list[list[int]] = [[] for _ in range(world_size)]
    totals = [0.0] * world_size
    for index in sorted(batch.tolist(), key=lambda i: words[i], reverse=True):
        rank = totals.index(min(totals))
        buckets[rank].append(index)
        totals[rank] = math.inf if len(buckets[rank]) == capacity else totals[rank] + float(words[index])
    interleaved = chain.from_iterable(zip_longest(*buckets))
    return np.array([index for index in interleaved if index is not None], dtype=np.int64)


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def rank_share(batch: np.ndarray, rank: int, world_size: int) -> Share:
    """One rank's part of a global batch; all parts have the same length."""
    share: Share = batch[rank::world_size].tolist()
    missing = math.ceil(len(batch) / world_size) - len(share)
    return share + [Filler(int(batch[0]))] * missing


def in_order(count: int, batch_size: int, rank: int, world_size: int) -> list[Share]:
    """Validation batches of one rank over `count` records, in order. All ranks have equally many, of the same
    sizes."""
    share = rank_share(np.arange(count), rank, world_size) if count else []
    return [share[i : i + batch_size] for i in range(0, len(share), batch_size)]


@dataclass
class StepSampler:
    """Batch sampler of one rank: yields one list of records and fillers per optimizer step.

    Attributes:
        sampler: name of the order in `SAMPLERS`.
        global_batch_size: records per optimizer step, over all ranks.
        start_step: optimizer steps already taken, which the iteration skips.
    """

    sampler: str
    population: Population
    global_batch_size: int
    epochs: int
    seed: int
    rank: int = 0
    world_size: int = 1
    start_step: int = 0

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; every epoch has the same number."""
        return len(self._batches(0))

    def _batches(self, epoch: int) -> list[np.ndarray]:
        order = SAMPLERS.get(self.sampler)
        return order(self.population, self.global_batch_size, self.seed + epoch, self.world_size)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs - self.start_step

    def __iter__(self) -> Iterator[Share]:
        first, skip = divmod(self.start_step, self.steps_per_epoch)
        for epoch in range(first, self.epochs):
            for batch in self._batches(epoch)[skip:]:
                yield rank_share(batch, self.rank, self.world_size)
            skip = 0
