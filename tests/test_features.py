"""Cached features against those of the towers, and caches that are not what they were."""

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from prism_deco import features
from prism_deco.backbones import build_backbone
from prism_deco.data.encoder import Encoder
from prism_deco.data.images import open_image
from prism_deco.data.loader import Examples
from prism_deco.data.records import open_records
from prism_deco.errors import UsageError
from prism_deco.features import BATCH, FeatureCache
from prism_deco.llms import build_llm
from prism_deco.training.feature_cache import TOWER, CachedExamples

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
NAMES = [f"{i:03d}.png" for i in range(70)]
"""Two whole shards of 32 and a part of one."""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_IMAGES", 32)


@pytest.fixture
def pictures(tmp_path):
    """Images of noise in several sizes, and `train.json`, a record for each."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        Image.fromarray(rng.integers(0, 255, (20 + i % 7, 30, 3), dtype=np.uint8)).save(folder / name)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise"}]
    records = [{"id": name, "image": name, "conversations": turns} for name in reversed(NAMES)]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_backbone("mini_siglip", pretrained=False)


@pytest.fixture(scope="module")
def llm():
    return build_llm("mini_qwen2", pretrained=False, device="meta")


@pytest.fixture
def make(tmp_path, pictures, backbone, llm):
    """(options) -> FeatureCache of the pictures; options replace what it is made of."""

    def build(root=pictures, records=None, settings=(), weights="w", compute="float32", tower=backbone, policy="blank"):
        records = open_records(pictures / "train.json", tmp_path / "index") if records is None else records
        examples = Examples(records, root, Encoder(llm, max_text_tokens=99), tower.transform, on_bad_image=policy)
        return FeatureCache(tmp_path / "features", tower, dict(settings), weights, compute, examples)

    return build


@pytest.fixture
def cache(make):
    """A complete cache."""
    built = make()
    built.build(CPU)
    return built


def _damaged(cache):
    return [shard for shard in range(3) if cache.problem(shard)]


def _live(backbone, pictures, names, batch=BATCH):
    """The towers' own features, so many images at a time: float[n, N, D]."""
    pixels = [backbone.transform(open_image(pictures / name))["mini_siglip"] for name in names]
    with torch.no_grad():
        found = [backbone({"mini_siglip": torch.stack(pixels[i : i + batch])}) for i in range(0, len(names), batch)]
    return torch.cat(found)


def _stored(cache):
    examples = CachedExamples(cache)
    return torch.stack([examples.features(name) for name in NAMES])


def test_features_are_the_towers_own(cache, backbone, pictures):
    stored = _stored(cache)
    assert stored.shape == (70, 64, 96) and stored.dtype == torch.float32
    assert stored.equal(_live(backbone, pictures, NAMES))
    # Kernels may round differently for another number of images.
    for batch in (1, 5):
        torch.testing.assert_close(stored[:10], _live(backbone, pictures, NAMES[:10], batch))


@pytest.mark.parametrize("compute", ["bfloat16", "autocast"])
def test_half_precision(make, backbone, pictures, compute):
    cache = make(compute=compute)
    cache.build(CPU)
    tower = deepcopy(backbone).to(torch.bfloat16) if compute == "bfloat16" else backbone
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):
        live = _live(tower, pictures, NAMES)
    assert live.dtype == (torch.bfloat16 if compute == "bfloat16" else torch.float32)
    assert _stored(cache).equal(live.to(torch.bfloat16))
    assert next(backbone.parameters()).dtype == torch.float32


def test_an_example_differs_in_nothing_but_its_pixels(cache):
    cached, live = CachedExamples(cache), cache.examples
    assert len(cached) == len(live) == 70
    for index in (0, 69):
        mine, its = cached[index], live[index]
        assert (mine.id, mine.encoded, mine.bad_images) == (its.id, its.encoded, its.bad_images)
        assert [image.keys() for image in mine.pixels] == [{TOWER}]
        assert mine.pixels[0][TOWER].equal(cached.features(mine.id))


def test_shards_are_plain_safetensors_of_whole_batches(cache, make, monkeypatch):
    assert [len(names) for names in cache.shards] == [32, 32, 6]
    with safe_open(cache.path(2), "pt") as file:
        assert list(file.keys()) == ["features"] and file.get_slice("features").get_shape() == [6, 64, 96]
    assert json.loads((cache.folder / "key.json").read_text()) == json.loads(json.dumps(cache.key))
    # Two towers of the paper: 729 patches of 2176 channels in two bytes, of which 84 are less than 256 MiB.
    large = build_backbone("dinov2_siglip_384", pretrained=False, device="meta")
    monkeypatch.setattr(features, "SHARD_IMAGES", 512)
    assert make(tower=large, compute="autocast").shard_images == 64


def test_what_a_cache_depends_on(make, cache, pictures, backbone):
    other = deepcopy(backbone)
    other.transform = build_backbone("mini_siglip", pretrained=False, device="meta", resize="pad").transform
    shutil.copytree(pictures, pictures.with_name("elsewhere"))
    others = [
        make(weights="other"),
        make(compute="autocast"),
        make(settings={"layer": -1}),
        make(tower=other),
        make(root=pictures.with_name("elsewhere")),
        make(records=cache.examples.records.select(slice(10))),
    ]
    assert len({cache.digest, *(other.digest for other in others)}) == 7
    # The place of the weights says nothing: their hash is in the key.
    assert make(settings={"weights": "/elsewhere", "pretrained": False}).digest == cache.digest


def _flip(cache):
    content = bytearray(cache.path(1).read_bytes())
    content[-1] ^= 1
    cache.path(1).write_bytes(content)


def _truncate(cache):
    os.truncate(cache.path(1), cache.path(1).stat().st_size - 4)


def _remove(cache):
    cache.path(1).unlink()


def _remove_record(cache):
    cache.path(1).with_suffix(".json").unlink()


def _break_record(cache):
    cache.path(1).with_suffix(".json").write_text("{")


@pytest.mark.parametrize("damage", [_flip, _truncate, _remove, _remove_record, _break_record], ids=lambda f: f.__name__)
def test_a_damaged_shard_is_built_again_and_the_others_are_not(cache, caplog, damage):
    whole = cache.path(1).read_bytes()
    times = [cache.path(shard).stat().st_mtime_ns for shard in range(3)]
    damage(cache)
    assert _damaged(cache) == [1]
    cache.build(CPU)
    assert _damaged(cache) == [] and cache.path(1).read_bytes() == whole
    assert [cache.path(shard).stat().st_mtime_ns for shard in (0, 2)] == [times[0], times[2]]
    assert ("00001.safetensors" in caplog.text) == (damage is not _remove)


def test_a_copied_cache_is_hashed_once_and_used(cache, monkeypatch):
    hashed = []
    real = features.file_sha256
    monkeypatch.setattr(features, "file_sha256", lambda path: hashed.append(path) or real(path))
    assert _damaged(cache) == [] and hashed == []  # its own files are known
    cache.folder.rename(cache.folder.with_name("original"))
    shutil.copytree(cache.folder.with_name("original"), cache.folder, copy_function=shutil.copyfile)
    assert _damaged(cache) == [] and _damaged(cache) == []
    assert hashed == [cache.path(shard) for shard in range(3)]


def test_a_record_has_the_hash_of_its_shard(cache):
    record = json.loads(cache.path(0).with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(cache.path(0).read_bytes()).hexdigest() and record["unreadable"] == []


def test_an_unreadable_image_is_kept_as_a_blank_one_until_it_can_be_read(make, backbone, pictures, caplog):
    whole = (pictures / "040.png").read_bytes()
    (pictures / "040.png").write_bytes(whole[:50])
    cache = make()
    cache.build(CPU)
    assert "040.png" in caplog.text and cache.unreadable() == {"040.png"} and _damaged(cache) == []
    examples = CachedExamples(cache)
    with torch.no_grad():
        blank = backbone({"mini_siglip": torch.zeros(1, 3, 64, 64)})[0]
    torch.testing.assert_close(examples.features("040.png"), blank)
    assert examples[29].id == "040.png" and examples[29].bad_images == 1
    with pytest.raises(UsageError, match=r"Record 040\.png: .*040\.png cannot be decoded .*data\.on_bad_image=skip"):
        CachedExamples(make(policy="fail"))[29]
    (pictures / "040.png").write_bytes(whole)
    assert _damaged(cache) == [1]
    cache.build(CPU)
    assert cache.unreadable() == set() and CachedExamples(cache)[29].bad_images == 0


def _build(cache, log):
    logging.basicConfig(filename=log, level=logging.INFO, force=True)
    torch.set_num_threads(1)
    cache.build(CPU)


def _until(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def stuck(make, pictures, tmp_path):
    """(cache, the process that builds it, and waits forever for the first image of the second shard, that image)."""
    image = (pictures / "032.png").read_bytes()
    (pictures / "032.png").unlink()
    os.mkfifo(pictures / "032.png")
    cache = make()
    process = FORK.Process(target=_build, args=(cache, tmp_path / "first.log"))
    process.start()
    _until(lambda: cache.path(0).with_suffix(".json").is_file())
    yield cache, process, image
    process.kill()
    process.join()


def _mend(pictures, image):
    (pictures / ".032.png").write_bytes(image)
    os.replace(pictures / ".032.png", pictures / "032.png")


def test_a_build_that_was_killed_goes_on(stuck, pictures, backbone):
    cache, process, image = stuck
    os.kill(process.pid, signal.SIGKILL)
    process.join(100)
    _mend(pictures, image)
    assert _damaged(cache) == [1, 2]
    before = cache.path(0).stat().st_mtime_ns
    cache.path(1).with_name(f".{cache.path(1).name}.tmp").write_bytes(b"half a shard")
    cache.build(CPU)
    assert _damaged(cache) == [] and cache.path(0).stat().st_mtime_ns == before
    assert not list(cache.folder.glob("*.tmp")) and not list(cache.folder.glob(".*.tmp"))
    assert _stored(cache).equal(_live(backbone, pictures, NAMES))


def test_another_run_waits_for_the_one_that_computes(stuck, pictures, tmp_path):
    cache, earlier, image = stuck
    log = tmp_path / "second.log"
    second = FORK.Process(target=_build, args=(cache, log))
    second.start()
    try:
        _until(lambda: log.is_file() and "waiting for another process" in log.read_text())
        time.sleep(0.3)
        assert second.is_alive() and _unrecorded(cache) == [1, 2]
        _mend(pictures, image)
        earlier.kill()
        second.join(100)
        assert second.exitcode == 0 and _damaged(cache) == []
        assert "computing 38 images" in log.read_text()
    finally:
        second.kill()


def _unrecorded(cache):
    return [shard for shard in range(3) if not cache.path(shard).with_suffix(".json").is_file()]


def test_ranks_take_every_nth_shard(make):
    cache = make()
    cache.build(CPU, rank=1, ranks=2)
    assert _damaged(cache) == [0, 2]
    cache.build(CPU, rank=0, ranks=2)
    assert _damaged(cache) == []


def test_loader_processes_take_the_examples_along(make):
    cache = make()
    cache.build(CPU, num_workers=2)
    examples = CachedExamples(cache)
    again = pickle.loads(pickle.dumps(examples))
    assert len(pickle.dumps(examples)) - len(pickle.dumps(cache.examples)) < 5000
    assert again.features("069.png").equal(examples.features("069.png"))
    os.truncate(cache.path(2), 1000)
    with pytest.raises(ValueError, match=r"00002\.safetensors cannot be read .*Run again"):
        again.features("069.png")


def test_a_disk_that_is_too_small_is_said_before(make, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ValueError, match=r"needs 0\.0 GB, but only 0\.0 GB are free: point PRISM_DECO_CACHE"):
        make().check_space()


def test_a_cache_that_cannot_be_written_is_said_before(make, tmp_path):
    (tmp_path / "file").write_text("")
    cache = make()
    cache.folder = tmp_path / "file" / "features"
    with pytest.raises(ValueError, match=r"features cannot be written \(Not a directory\).*feature_cache=false"):
        cache.check_space()


def test_a_file_system_without_locks_is_named(make, monkeypatch):
    def refuse(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(features.fcntl, "lockf", refuse)
    with pytest.raises(ValueError, match=r"lock0 cannot be locked .*trainer\.feature_cache=false"):
        make().build(CPU)


def test_the_run_s_random_numbers_stay_as_they_are(make):
    state, cache = torch.get_rng_state(), make()
    cache.build(CPU, num_workers=1)
    CachedExamples(cache)[0]
    assert torch.get_rng_state().equal(state)
