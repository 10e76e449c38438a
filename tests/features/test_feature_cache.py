"""Cached features against those of the towers, and caches that are not what they were."""

import hashlib
import json
import os
import pickle
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from prism_deco.data.images import open_image
from prism_deco.features import Layout
from prism_deco.features.key import BATCH
from prism_deco.features.shards import Locks, Shards


def _live(backbone, pictures, names, batch):
    """The towers' features of these images, so many at a time: float[n, N, D]."""
    pixels = [backbone.transform(open_image(pictures / name))["mini_siglip"] for name in names]
    with torch.no_grad():
        return torch.cat([backbone({"mini_siglip": torch.stack(p)}) for p in _chunks(pixels, batch)])


def _chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


@pytest.mark.parametrize("name", ["avgpool", "maxpool", "linear"])
def test_features_are_the_towers_own(make, complete, backbone, pictures, name):
    cache, projector = make(name)
    assert complete(cache, projector) == [0, 1, 2]
    names = list(cache.shards.names)
    # A shard's last batch is smaller: 32, 32 and 6 images.
    live = [projector.compress(_live(backbone, pictures, part, BATCH)) for part in _chunks(names, BATCH)]
    reader = cache.open()
    read = torch.stack([reader.read(image) for image in names])
    assert read.equal(torch.cat(live))
    assert read.shape[1:] == ((64, 96) if name == "linear" else (16, 96)) and read.dtype == torch.float32
    # Kernels may round otherwise for another number of images.
    for batch in (1, 5):
        torch.testing.assert_close(read[:10], projector.compress(_live(backbone, pictures, names[:10], batch)))


@pytest.mark.parametrize("compute", ["bfloat16", "autocast"])
def test_half_precision(make, complete, backbone, pictures, compute):
    cache, projector = make(compute=compute)
    tower = deepcopy(backbone).to(torch.bfloat16) if compute == "bfloat16" else backbone
    cache.build([0, 1, 2], tower, projector.compress, device=torch.device("cpu"))
    first = cache.shards.names[:BATCH]
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):
        live = projector.compress(_live(tower, pictures, first, BATCH))
    assert live.dtype == (torch.bfloat16 if compute == "bfloat16" else torch.float32)
    assert torch.stack([cache.open().read(name) for name in first]).equal(live.to(torch.bfloat16))


def test_the_files_are_as_large_as_planned_and_plain_safetensors(make, complete):
    cache, projector = make()
    assert cache.missing == 70
    complete(cache, projector)
    sizes = [cache.shards.path(n).stat().st_size for n in range(3)]
    assert sum(sizes) == cache.layout.bytes and sizes == [cache.layout.size(n) for n in range(3)]
    with safe_open(cache.shards.path(2), "pt") as file:
        assert list(file.keys()) == ["features"]
        stored = file.get_slice("features")
        assert stored.get_shape() == [6, 16, 96]
        assert stored[5].equal(cache.open().read(cache.shards.names[69]))


def test_shards_of_the_paper_s_largest_towers():
    # 624,610 images in shards of at most 256 MiB, of whole batches: 416 images of 626,688 bytes.
    large = Layout(624_610, 144, 2176, torch.bfloat16)
    assert (large.rows, large.shards) == (416, 1502)
    assert 0 < large.bytes - 624_610 * 144 * 2176 * 2 < 1502 * 128
    assert Layout(0, 1, 1, torch.float32).bytes == 0


def test_what_the_key_depends_on(make, backbone):
    key = make()[0].key
    others = [
        replace(key, weights="other"),
        replace(key, data="other"),
        replace(key, images="other"),
        replace(key, compute="autocast"),
        replace(key, pooling="max"),
        replace(key, grid=(2, 2)),
        replace(key, backbone={"name": "m", "layer": -1}),
        replace(key, transform=_other_transform(backbone)),
    ]
    assert len({key.digest, *(other.digest for other in others)}) == 9
    assert replace(key, backbone={"name": "m", "weights": "/elsewhere", "pretrained": False}).digest == key.digest


def _other_transform(backbone):
    towers = {name: replace(tower, resize="pad") for name, tower in backbone.transform.towers.items()}
    return replace(backbone.transform, towers=towers)


def _stamps(cache):
    return [cache.shards.path(n).stat().st_mtime_ns for n in range(3)]


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _truncate(path):
    os.truncate(path, path.stat().st_size - 4)


@pytest.mark.parametrize("damage", [_flip, _truncate, os.remove], ids=lambda f: f.__name__)
def test_a_damaged_shard_is_built_again_and_the_others_are_not(make, complete, caplog, damage):
    cache, projector = make()
    complete(cache, projector)
    whole, before = cache.shards.path(1).read_bytes(), _stamps(cache)
    damage(cache.shards.path(1))
    caplog.clear()
    assert complete(cache, projector) == [1]
    assert cache.shards.path(1).read_bytes() == whole and [_stamps(cache)[n] for n in (0, 2)] == [before[0], before[2]]
    assert ("00001.safetensors" in caplog.text) == (damage is not os.remove)


def test_a_copied_cache_is_hashed_once_and_used(make, complete, tmp_path, monkeypatch):
    cache, projector = make()
    complete(cache, projector)
    shutil.copytree(cache.shards.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    copied = Shards(tmp_path / "copy", cache.layout, cache.shards.names, cache.shards.images)
    hashed = []
    monkeypatch.setattr("prism_deco.features.shards.file_sha256", lambda path: hashed.append(path) or _sha256(path))
    assert [copied.problem(n) for n in (0, 1, 2, 0, 1, 2)] == [None] * 6
    assert hashed == [copied.path(n) for n in range(3)]
    assert cache.find_damaged() == [] and len(hashed) == 3  # one's own files are known


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_images_of_the_same_names_are_noticed(make, complete, caplog, pictures):
    cache, projector = make()
    complete(cache, projector)
    Image.new("RGB", (30, 30), (200, 10, 10)).save(pictures / "032.png")
    old = cache.open().read("032.png")
    assert cache.find_damaged() == [1]
    complete(cache, projector)
    assert "was made of another image 032.png" in caplog.text and not cache.open().read("032.png").equal(old)


def test_an_unreadable_image_is_kept_as_a_blank_one_until_it_can_be_read(make, complete, backbone, pictures, caplog):
    whole = (pictures / "040.png").read_bytes()
    (pictures / "040.png").write_bytes(whole[:50])
    cache, projector = make()
    complete(cache, projector)
    reader = cache.open()
    assert [name for name in cache.shards.names if reader.is_bad(name)] == ["040.png"] and "040.png" in caplog.text
    with torch.no_grad():
        blank = projector.compress(backbone({"mini_siglip": torch.zeros(1, 3, 64, 64)}))[0]
    torch.testing.assert_close(reader.read("040.png"), blank)
    (pictures / "040.png").write_bytes(whole)
    assert cache.find_damaged() == [1]
    complete(cache, projector)
    assert not cache.open().is_bad("040.png")


def test_a_build_that_was_killed_goes_on(make, complete, backbone):
    cache, projector = make()

    class Killed(BaseException):
        pass

    def compress(features, calls=[]):  # noqa: B006  # counts over calls
        calls.append(features)
        if len(calls) == 2:
            raise Killed
        return projector.compress(features)

    with pytest.raises(Killed):
        cache.build([0, 1, 2], backbone, compress, device=torch.device("cpu"))
    assert cache.missing == 38 and cache.shards.is_recorded(0)
    assert [path.name for path in cache.shards.folder.glob(".*")] == [".00001.safetensors.tmp"]
    before = cache.shards.path(0).stat().st_mtime_ns
    assert complete(cache, projector) == [1, 2]
    assert cache.shards.path(0).stat().st_mtime_ns == before and not list(cache.shards.folder.glob(".*"))


def test_a_shard_counts_once_its_record_is_there(make, complete):
    cache, projector = make()
    complete(cache, projector)
    for broken in ("{", '{"sha256": ""}'):
        cache.shards.path(0).with_suffix(".json").write_text(broken)
        assert cache.find_damaged() == [0]
    assert complete(cache, projector) == [0]
    record = json.loads(cache.shards.path(0).with_suffix(".json").read_text())
    assert record["sha256"] == _sha256(cache.shards.path(0)) and record["bad"] == []


def test_the_reader_is_small_and_goes_to_loader_processes(make, complete):
    cache, projector = make()
    complete(cache, projector, num_workers=2)
    reader = pickle.loads(pickle.dumps(cache.open()))
    assert len(pickle.dumps(reader)) < 5000 < cache.layout.bytes
    assert (reader.tokens, reader.dtype) == (16, torch.float32)
    assert reader.read("069.png").equal(cache.open().read("069.png"))
    _truncate(cache.shards.path(2))
    with pytest.raises(OSError, match=r"00002\.safetensors was cut short"):
        reader.read("069.png")


def test_a_disk_that_is_too_small_is_said_before(make, monkeypatch):
    cache, _ = make()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ValueError, match=r"needs 0\.0 GB, 0\.0 GB are free.*PRISM_DECO_CACHE"):
        cache.check_space()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "not supported")

    with Locks(tmp_path) as locks:
        monkeypatch.setattr("prism_deco.features.shards.fcntl.lockf", refuse)
        with pytest.raises(ValueError, match=r"locks cannot be locked .*trainer\.feature_cache=off"):
            locks.take(0)


def test_the_run_s_random_numbers_stay_as_they_are(make, complete):
    cache, projector = make()
    state = torch.get_rng_state()
    complete(cache, projector, num_workers=1)
    assert torch.get_rng_state().equal(state)
