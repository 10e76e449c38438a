"""Examples, fillers and the batches of several ranks."""

import json
import pickle

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from prism_deco.data.encoder import Encoder
from prism_deco.data.loader import Collate, Examples, build_loader, loader_workers
from prism_deco.data.records import open_records
from prism_deco.data.samplers import Filler, Population, StepSampler, in_order
from prism_deco.errors import UsageError

IGNORE = -100


@pytest.fixture
def examples(colors, tmp_path, tiny):
    vlm, llm = tiny()
    records = open_records(colors / "train.json", tmp_path)
    return Examples(records, colors / "images", Encoder(llm, max_text_tokens=200), vlm.backbone.transform)


def test_a_filler_has_the_shape_of_its_record_and_counts_for_nothing(examples):
    whole, filler = examples[1], examples[Filler(1)]
    assert filler.encoded.input_ids == whole.encoded.input_ids
    assert filler.encoded.labels == [IGNORE] * len(whole.encoded.labels) != whole.encoded.labels
    assert filler.pixels[0]["mini_siglip"].equal(whole.pixels[0]["mini_siglip"])
    alone, step = Collate(4, 2)([whole]), Collate(4, 2)([whole, filler])
    assert (step.records, step.num_targets) == (1, alone.num_targets)


def test_packed_passes_hold_the_same_records_without_padding(examples):
    chosen = [examples[0], examples[8], examples[1]]
    padded, packed = Collate(4, 2)(chosen), Collate(4, 2, pack=True)(chosen)
    assert [b.ids for b in packed.batches] == [b.ids for b in padded.batches]
    assert packed.num_targets == padded.num_targets
    for a, b in zip(padded.batches, packed.batches, strict=True):
        assert b.lengths == tuple(a.attention_mask.sum(dim=1).tolist()) and b.input_ids.shape == (1, sum(b.lengths))


@pytest.mark.parametrize("sampler", ["shuffled", "grouped", "prismatic"])
@pytest.mark.parametrize(("world_size", "global_batch", "micro"), [(2, 4, 1), (4, 8, 2), (4, 4, 1), (3, 6, 2)])
def test_ranks_run_the_same_number_of_passes_in_every_step(examples, sampler, world_size, global_batch, micro):
    """Nine records, one of them text only: no split of them is even."""
    population = Population(examples.records.words, examples.records.has_image)
    collate = Collate(4, micro)
    ranks = []
    for rank in range(world_size):
        order = StepSampler(
            sampler, population, global_batch_size=global_batch, epochs=1, seed=0, rank=rank, world_size=world_size
        )
        ranks.append(list(build_loader(examples, collate, order, num_workers=0)))
    assert len({len(steps) for steps in ranks}) == 1
    seen: list[str] = []
    for step in zip(*ranks, strict=True):
        assert len({len(part.batches) for part in step}) == 1
        assert len({tuple(len(b.ids) for b in part.batches) for part in step}) == 1
        for part in step:
            learned = [i for b in part.batches for i, row in zip(b.ids, b.labels, strict=True) if (row != IGNORE).any()]
            assert len(learned) == part.records
            seen += learned
    everything = sorted(r.id for r in examples.records)
    if sampler == "prismatic":  # its own fillers are learned from
        assert set(seen) == set(everything) and len(seen) % global_batch == 0
    else:
        assert sorted(seen) == everything


@pytest.mark.parametrize(("count", "world_size"), [(9, 2), (9, 4), (3, 4), (8, 4), (0, 2)])
def test_validation_covers_every_record_once_and_evenly(count, world_size):
    ranks = [in_order(count, 2, rank, world_size) for rank in range(world_size)]
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    real = [i for batches in ranks for batch in batches for i in batch if isinstance(i, int)]
    assert sorted(real) == list(range(count))


@pytest.mark.parametrize("policy", ["skip", "blank"])
def test_a_bad_image_is_handled_alike_whoever_loads_it(colors, tmp_path, tiny, policy):
    """The same records come to the same tokens, targets and counts on one rank and on four."""
    vlm, llm = tiny()
    entries = json.loads((colors / "train.json").read_text())
    entries[2]["image"] = "gone.png"
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    entries[5]["image"] = "broken.png"
    for image in (colors / "images").iterdir():
        (tmp_path / image.name).symlink_to(image)
    (tmp_path / "t.json").write_text(json.dumps(entries))
    records = open_records(tmp_path / "t.json", tmp_path)
    encoder = Encoder(llm, max_text_tokens=200)
    examples = Examples(records, tmp_path, encoder, vlm.backbone.transform, on_bad_image=policy)
    population = Population(records.words, records.has_image)

    def totals(world_size):
        steps = [
            step
            for rank in range(world_size)
            for step in build_loader(
                examples,
                Collate(4, 2),
                StepSampler(
                    "shuffled", population, global_batch_size=4, epochs=1, seed=0, rank=rank, world_size=world_size
                ),
                num_workers=0,
            )
        ]
        return [sum(getattr(step, name) for step in steps) for name in ("bad_images", "num_targets", "records")]

    bad, targets, seen = totals(1)
    assert (bad, seen) == (2, 9)
    assert totals(2) == totals(4) == [bad, targets, seen]
    by_hand = sum(
        label != IGNORE
        for i, r in enumerate(records)
        if policy == "blank" or i not in (2, 5)
        for label in llm.encode(r.messages, num_images=len(r.images)).labels
    )
    assert targets == by_hand


def test_a_file_of_another_format_is_named_with_its_record(colors, tmp_path, tiny):
    vlm, llm = tiny()
    (tmp_path / "red40.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\n")
    records = open_records(colors / "train.json", tmp_path)
    examples = Examples(records, tmp_path, Encoder(llm, max_text_tokens=200), vlm.backbone.transform)
    with pytest.raises(
        UsageError, match=r"Record red40: .*red40\.png cannot be decoded .*none of JPEG, PNG, .*on_bad_image"
    ):
        examples[0]


def test_text_makes_room_for_every_image(examples, tiny):
    _, llm = tiny()
    record = examples.records[0]
    full = llm.encode(record.messages, num_images=1).input_ids
    room = len(full) - 3
    encoded, cut = Encoder(llm, max_text_tokens=200, max_positions=room + 4, tokens_per_image=4)(record)
    assert (len(encoded.input_ids), cut, len(encoded.image_slots)) == (room, 3, 1)
    assert any(label != IGNORE for label in encoded.labels)
    with pytest.raises(ValueError, match="no room"):
        Encoder(llm, max_text_tokens=200, max_positions=5, tokens_per_image=4)(record)


def test_worker_processes_give_the_same_steps_and_get_no_model(examples):
    assert len(pickle.dumps(examples)) < 2e6  # the tokenizer and the index arrays; the weights alone take more
    order = [[0, 1, 2], [3, 4], [8, Filler(0)]]
    alone = list(build_loader(examples, Collate(4, 2), order, num_workers=0))
    parallel = list(build_loader(examples, Collate(4, 2), order, num_workers=2))
    for a, b in zip(alone, parallel, strict=True):
        assert [batch.ids for batch in a.batches] == [batch.ids for batch in b.batches]
        assert all(x.input_ids.equal(y.input_ids) for x, y in zip(a.batches, b.batches, strict=True))


class _Probe(Dataset):
    """Loads examples (or nothing), and says what that did to its process: (pid, private bytes)."""

    def __init__(self, examples: Examples | None):
        self._examples = examples

    def __getitem__(self, index: int) -> tuple[int, int]:
        if self._examples is not None:
            self._examples[index]
        process = psutil.Process()
        return process.pid, process.memory_full_info().uss if index % 50 == 0 else 0


def _private_megabytes(examples: Examples | None, order: list[list[int]], workers: int) -> list[float]:
    most: dict[int, int] = {}
    for batch in DataLoader(_Probe(examples), batch_sampler=order, num_workers=workers, collate_fn=list):  # type: ignore[arg-type]
        for pid, used in batch:
            most[pid] = max(most.get(pid, 0), used)
    assert len(most) == workers
    return [used / 2**20 for used in most.values()]


@pytest.mark.slow
def test_665_000_records_cost_a_worker_no_memory_of_its_own(tmp_path, colors, tiny):
    number = 665_000
    with (tmp_path / "train.json").open("w") as file:
        for i in range(number):
            turns = f"<image>\\nWhat is number {i}?", f"It is {i}. {'word ' * 9}"
            file.write(
                f'{"," if i else "["}{{"id": "{i:012}", "image": "red40.png", "conversations": '
                f'[{{"from": "human", "value": "{turns[0]}"}}, {{"from": "gpt", "value": "{turns[1]}"}}]}}'
            )
        file.write("]")
    records = open_records(tmp_path / "train.json", tmp_path)
    assert len(records) == number and records[number - 1].messages[1]["content"].startswith(f"It is {number - 1}. ")
    encoder = Encoder(tiny()[1], max_text_tokens=2048)
    examples = Examples(records, colors / "images", encoder, lambda _: {"x": torch.zeros(1)})
    order = np.random.default_rng(0).permutation(number)[:4000].reshape(-1, 50).tolist()
    [idle, *_] = sorted(_private_megabytes(None, order, workers=2))
    busy = max(_private_megabytes(examples, order, workers=2))
    assert busy - idle < 50, f"{idle:.0f} MB idle, {busy:.0f} MB after 4000 records"


def test_gpus_have_a_worker_per_core_and_cpus_none_unless_told(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(20)), raising=False)
    assert [loader_workers(None, gpu=True, ranks=ranks) for ranks in (1, 4, 40)] == [8, 5, 1]
    assert [loader_workers(asked, gpu=False, ranks=1) for asked in (None, 0, 3)] == [0, 0, 3]
    assert [loader_workers(asked, gpu=True, ranks=1) for asked in (0, 20)] == [0, 20]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert loader_workers(None, gpu=True, ranks=4) == 3
