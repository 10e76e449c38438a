"""Parquet files of a hub that runs on this machine, read by huggingface_hub's own client in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ = """
import json, sys
from pathlib import Path
from prism_deco.config import cache_dir
from prism_deco.data import build_source
from prism_deco.data.records import open_records

source = build_source("hub", repo="someone/talk", files=sys.argv[1])
records = open_records(source.train, cache_dir())
left = [str(path) for path in (cache_dir() / "hub").iterdir()]
print(json.dumps({"questions": [r.messages[0]["content"] for r in records], "left": left, "hash": records.data_hash}))
"""


class _Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that listing and downloading a data set need."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        headers = {"X-Repo-Commit": COMMIT}
        if path == "/api/datasets/someone/talk/revision/main":
            body = json.dumps({"id": "someone/talk", "sha": COMMIT}).encode()
        elif path == f"/api/datasets/someone/talk/tree/{COMMIT}":
            files = self.server.files.items()
            entries = [{"type": "file", "path": name, "size": len(data), "oid": _hash(data)} for name, data in files]
            body = json.dumps([{"type": "directory", "path": "data", "oid": "0" * 40}, *entries]).encode()
        elif (name := path.removeprefix(f"/datasets/someone/talk/resolve/{COMMIT}/")) in self.server.files:
            body = self.server.files[name]
            headers |= {"ETag": f'"{_hash(body)}"'}
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _hash(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.files = {"README.md": b"# Talk"}
    sets = {"data/train-0.parquet": [0, 1], "data/train-1.parquet": [2], "data/test-0.parquet": [3]}
    for name, numbers in (sets | {"other/x.parquet": [9]}).items():
        rows = [{"texts": [{"user": f"What is {i}?", "assistant": "This."}]} for i in numbers]
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        server.files[name] = buffer.getvalue().to_pybytes()
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _read(hub, cache, pattern):
    own = {"PRISM_DECO_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache / "hf"), "NO_PROXY": "*"}
    own |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", READ, pattern]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_files_are_read_once_and_not_kept(hub, tmp_path):
    done = _read(hub, tmp_path, "data/*.parquet")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert first["questions"] == ["What is 0?", "What is 1?", "What is 2?"]
    [listing] = first["left"]
    assert listing.endswith(".hub") and not list(tmp_path.rglob("*.parquet"))
    assert not any(path.endswith("x.parquet") for path in hub.asked)
    # What was listed and read once needs no hub.
    hub.asked.clear()
    again = _read(hub, tmp_path, "data/*.parquet")
    assert json.loads(again.stdout) == first and not hub.asked


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(hub, tmp_path):
    done = _read(hub, tmp_path, "train/*.parquet")
    assert "data.files=train/*.parquet matches no Parquet file of someone/talk. There are some in data, other." in (
        done.stderr
    )


def test_a_hub_that_does_not_answer_is_named(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    done = _read(hub, tmp_path, "data/*.parquet")
    assert "UsageError: data.repo=someone/talk (revision main) cannot be listed on the hub" in done.stderr
    assert "data=embedded" in done.stderr


def test_a_file_that_is_damaged_or_gone_is_named(hub, tmp_path):
    hub.files["other/x.parquet"] = b"not Parquet"
    done = _read(hub, tmp_path, "other/*.parquet")
    assert "UsageError: someone/talk/other/x.parquet (commit 01234567) cannot be read" in done.stderr
    del hub.files["other/x.parquet"]  # it is listed already
    done = _read(hub, tmp_path, "other/*.parquet")
    assert "UsageError: someone/talk/other/x.parquet (commit 01234567) cannot be downloaded" in done.stderr
