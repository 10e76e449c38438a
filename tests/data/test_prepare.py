"""Downloads from a local server that breaks off in the middle of files."""

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from prism_deco.config import choices, load_choice
from prism_deco.data import build_source
from prism_deco.data import prepare as prepare_module
from prism_deco.data.download import download
from prism_deco.data.prepare import Archive, Dataset, download_dataset, extract, plan_download, read_dataset
from prism_deco.data.records import open_records
from prism_deco.errors import UsageError


class Server:
    """Serves bytes by path. `budget`: bytes of an archive that a connection sends before it is cut; None sends all."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.budget: int | None = None
        self.statuses: list[int | None] = []  # answered instead of files, one per request
        self.ranges = True
        self.etags = True
        self.requests: list[tuple[str, str, str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):  # the hub's client asks
                self._answer(body=False)

            def do_GET(self):
                self._answer(body=True)

            def log_message(self, *_):
                pass

            def _answer(self, body):
                server.requests.append((self.command, self.path, self.headers.get("Range")))
                content = server.files.get(self.path.partition("?")[0])
                status = server.statuses.pop(0) if server.statuses else None
                if content is None or status is not None:
                    self.send_error(status or 404)
                    return
                start, tag = 0, f'"{hashlib.md5(content).hexdigest()}"'
                wanted = self.headers.get("Range")
                if server.ranges and wanted and self.headers.get("If-Range", tag) == tag:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                    if start >= len(content):
                        self.send_response(416)
                        self.send_header("Content-Range", f"bytes */{len(content)}")
                        self.end_headers()
                        return
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                else:
                    self.send_response(200)
                if server.etags:
                    self.send_header("ETag", tag)
                self.send_header("X-Repo-Commit", "0" * 40)  # what the hub's servers add
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                if body:
                    cut = server.budget is not None and ".zip" in self.path
                    end = start + server.budget if cut else len(content)
                    self.wfile.write(content[start:end])
                    self.close_connection = True

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def fetched(self, path: str) -> list[str | None]:
        return [wanted for method, name, wanted in self.requests if method == "GET" and name == path]


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.httpd.shutdown()
    thread.join()
    server.httpd.server_close()


NOISE = np.random.default_rng(0).bytes(100_000)


def test_a_download_goes_on_where_the_connection_broke(server, tmp_path):
    server.files["/a.zip"], server.budget = NOISE, 30_000
    seen = []
    download(f"{server.url}/a.zip", tmp_path / "a.zip", pause=0, progress=lambda *state: seen.append(state))
    assert (tmp_path / "a.zip").read_bytes() == NOISE
    assert server.fetched("/a.zip") == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]
    assert seen[-1] == (100_000, 100_000) and sorted(seen) == seen
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


def test_a_later_call_goes_on_where_the_last_one_gave_up(server, tmp_path):
    server.files["/a.zip"], server.budget = NOISE, 0
    with pytest.raises(UsageError, match="failed 3 times in a row .*[Tt]ry again later"):
        download(f"{server.url}/a.zip", tmp_path / "a.zip", pause=0, attempts=3)
    server.budget, server.statuses = 40_000, [503, None, 503, 502]
    with pytest.raises(UsageError, match="failed 2 times"):
        download(f"{server.url}/a.zip", tmp_path / "a.zip", pause=0, attempts=2)
    assert (tmp_path / "a.zip.part").stat().st_size == 40_000 and not (tmp_path / "a.zip").exists()
    server.budget = None
    server.requests.clear()
    download(f"{server.url}/a.zip", tmp_path / "a.zip", pause=0)
    assert (tmp_path / "a.zip").read_bytes() == NOISE and server.fetched("/a.zip") == ["bytes=40000-"]


def test_a_file_that_changed_is_fetched_anew(server, tmp_path):
    server.files["/a.zip"], server.budget = NOISE, 30_000
    (tmp_path / "a.zip.part").write_bytes(NOISE[:50_000])
    (tmp_path / "a.zip.part.json").write_text(json.dumps({"version": '"an older one"'}))
    download(f"{server.url}/a.zip", tmp_path / "a.zip", pause=0)
    assert (tmp_path / "a.zip").read_bytes() == NOISE
    # A part that is whole already, or longer than the file:
    for size, name in ((100_000, "b"), (100_005, "c")):
        (tmp_path / f"{name}.part").write_bytes((NOISE + b"extra")[:size])
        (tmp_path / f"{name}.part.json").write_text(json.dumps({"version": f'"{hashlib.md5(NOISE).hexdigest()}"'}))
        download(f"{server.url}/a.zip", tmp_path / name, pause=0)
        assert (tmp_path / name).read_bytes() == NOISE


@pytest.mark.parametrize(("ranges", "etags"), [(False, True), (True, False)])
def test_servers_without_ranges_or_versions_start_over(server, tmp_path, ranges, etags):
    server.files["/a.zip"], server.budget = NOISE, 60_000
    server.ranges, server.etags = ranges, etags
    with pytest.raises(UsageError, match="failed 2 times"):
        download(f"{server.url}/a.zip", tmp_path / "a.zip", pause=0, attempts=2)
    server.budget = None
    download(f"{server.url}/a.zip", tmp_path / "a.zip", pause=0)
    assert (tmp_path / "a.zip").read_bytes() == NOISE


def test_refusals_are_errors(server, tmp_path):
    with pytest.raises(UsageError, match="404 Not Found. Has the file moved"):
        download(f"{server.url}/gone.zip", tmp_path / "gone.zip")
    with pytest.raises(ValueError, match="only http and https"):
        download("file:///etc/passwd", tmp_path / "x")


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_only_wanted_members_leave_an_archive(tmp_path):
    members = {"wrapped/in/1.jpg": b"1", "wrapped/in/2.jpg": b"2", "../../evil.jpg": b"!", "sub/3.jpg": b"3"}
    (tmp_path / "a.zip").write_bytes(_zip(members))
    assert extract(tmp_path / "a.zip", tmp_path / "out", ["1.jpg", "sub/3.jpg", "4.jpg"]) == 2
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jpg")} == {"out/1.jpg", "out/sub/3.jpg"}
    damaged = bytearray((tmp_path / "a.zip").read_bytes())
    damaged[damaged.index(b"2.jpg") + 5] ^= 1
    (tmp_path / "a.zip").write_bytes(damaged)
    with pytest.raises(UsageError, match=r"a\.zip is damaged .*CRC"):
        extract(tmp_path / "a.zip", tmp_path / "out", ["2.jpg"])
    assert not (tmp_path / "out" / "2.jpg").exists()


def _jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def dataset(server, monkeypatch):
    names = [f"{folder}/{i}.jpg" for folder in ("coco/train2017", "vg/VG_100K", "vg/VG_100K_2") for i in range(4)]
    records = [
        {
            "id": name,
            "image": name,
            "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}],
        }
        for name in names
    ]
    server.files["/datasets/someone/talk/resolve/main/talk.json"] = json.dumps(records).encode()
    archives = []
    for number, folder in enumerate(("coco/train2017", "vg/VG_100K", "vg/VG_100K_2")):
        members = {f"other{number}/{i}.jpg": _jpeg(10 * number + i) for i in range(6)}
        server.files[f"/{number}.zip"] = _zip(members)
        archives.append(Archive(f"{server.url}/{number}.zip", folder, gigabytes=(2 + number) * 1e-6))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return Dataset("talk", "someone/talk", "talk.json", 1e-6, ".", tuple(archives), endpoint=server.url)


def test_a_data_set_is_downloaded_laid_out_and_completed(server, dataset, tmp_path):
    root = tmp_path / "new" / "talk"
    before = plan_download(dataset, root)
    assert list(before.downloads.values()) == [1e-6, 2e-6, 3e-6, 4e-6]  # as the configuration says
    assert before.needed == pytest.approx(10e-6 + 4e-6)  # an archive and its images at a time
    server.budget = 1500  # every connection breaks off
    download_dataset(dataset, root)
    records = open_records(root / "talk.json", tmp_path)
    for number, folder in enumerate(("coco/train2017", "vg/VG_100K", "vg/VG_100K_2")):
        for i in range(4):
            assert (root / folder / f"{i}.jpg").read_bytes() == _jpeg(10 * number + i)
        assert not (root / folder / "5.jpg").exists()  # no record shows it
    assert len(records) == 12 and not list(root.rglob("*.zip*"))
    assert plan_download(dataset, root).downloads == {}

    server.requests.clear()
    download_dataset(dataset, root)
    assert server.requests == []  # nothing is missing, nothing is asked for
    (root / "vg/VG_100K_2/1.jpg").unlink()
    stamp = (root / "vg/VG_100K_2/2.jpg").stat().st_mtime_ns
    server.budget = None
    download_dataset(dataset, root)
    assert {path for _, path, _ in server.requests} == {"/2.zip"}
    assert (root / "vg/VG_100K_2/1.jpg").is_file() and (root / "vg/VG_100K_2/2.jpg").stat().st_mtime_ns == stamp


def test_what_cannot_be_completed_is_said(server, dataset, tmp_path, monkeypatch):
    server.files["/1.zip"] = _zip({"1.jpg": _jpeg(0)})
    with pytest.raises(UsageError, match="3 images are in none of the archives, for example vg/VG_100K/0.jpg"):
        download_dataset(dataset, tmp_path / "a")
    usage = type("Usage", (), {"free": 5})
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="0.00 GB free, but talk needs"):
        download_dataset(dataset, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    monkeypatch.undo()
    del server.files["/datasets/someone/talk/resolve/main/talk.json"]
    with pytest.raises(UsageError, match=r"/datasets/someone/talk/resolve/main/talk\.json \("):
        download_dataset(dataset, tmp_path / "c")


def test_the_plan_can_be_read_without_a_server(dataset, server, tmp_path):
    (tmp_path / "vg-VG_100K-1.zip.part").write_bytes(bytes(500))
    todo = plan_download(dataset, tmp_path)
    assert todo.needed == pytest.approx(14e-6 - 0.5e-6) and server.requests == []
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    console.print(todo.render())
    assert "disk space needed: 0.00 GB" in console.file.getvalue() and "/2.zip" in console.file.getvalue()


@pytest.mark.parametrize("name", [n for n in choices("data") if "archives" in load_choice("data", n)])
def test_shipped_data_sets_are_complete_configurations(name, tmp_path):
    dataset = read_dataset(name)
    assert dataset.json.endswith(".json") and all(a.url.endswith(".zip") for a in dataset.archives)
    with pytest.raises(ValueError, match=r"data\.root=FOLDER"):
        build_source(name)
    with pytest.raises(ValueError, match="prism-deco data prepare"):
        build_source(name, root=str(tmp_path))
    (tmp_path / dataset.json).write_text("[]")
    source = build_source(name, root=str(tmp_path))
    assert (source.train, source.image_root) == (tmp_path / dataset.json, Path(tmp_path) / dataset.image_root)


def test_the_six_folders_of_the_instruction_data():
    folders = {archive.into for archive in read_dataset("llava_v1_5_mix665k").archives}
    assert folders == {
        "coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2",
    }  # fmt: skip
    with pytest.raises(ValueError, match="data=llava has nothing to download"):
        read_dataset("llava")
