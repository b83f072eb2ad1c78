"""The hub as a source: the real client against a local server that answers as the hub does."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from host.data.shards import load_data

REVISION = "a" * 40
NO_HUB = "http://127.0.0.1:9"  # nothing listens there


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


FILES = {
    "README.md": b"---\nlicense: mit\n---\nStories.\n",
    "data/train-00000-of-00001.parquet": parquet([f"Story {i} to train on." for i in range(120)]),
    "data/validation-00000-of-00001.parquet": parquet([f"Story {i} to validate on." for i in range(7)]),
    "data/test-00000-of-00001.parquet": parquet([f"Story {i} to test on." for i in range(5)]),
}


def described(path: str) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(FILES[path]), "oid": hashlib.sha1(FILES[path]).hexdigest()}


def listed(folder: str) -> list[dict[str, object]]:
    """The entries of one folder of the repository, "" being its root."""
    inside = [path for path in FILES if path.startswith(folder)]
    deeper = {folder + path.removeprefix(folder).split("/")[0] for path in inside if "/" in path.removeprefix(folder)}
    files = [described(path) for path in inside if "/" not in path.removeprefix(folder)]
    return files + [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(deeper)]


class Hub(BaseHTTPRequestHandler):
    """Metadata, listings and files (whole or ranges) of one repository, as huggingface.co serves them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/resolve/" in path:
            self.file(path.split(f"/resolve/{REVISION}/")[1])
        elif path.startswith(f"/api/datasets/owner/stories/tree/{REVISION}"):
            folder = path.split(REVISION)[1].strip("/")
            self.answer(200, json.dumps(listed(folder + "/" if folder else "")).encode())
        elif path in ("/api/datasets/owner/stories", f"/api/datasets/owner/stories/revision/{REVISION}"):
            siblings = [{"rfilename": name} for name in FILES]
            card = {"id": "owner/stories", "sha": REVISION, "cardData": {"license": "mit"}, "siblings": siblings}
            self.answer(200, json.dumps({**card, "private": False, "gated": False, "tags": []}).encode())
        else:
            self.answer(404, b"{}")

    do_HEAD = do_GET

    def file(self, name: str) -> None:
        if name not in FILES:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        body = FILES[name]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            self.answer(206, body[first : last + 1], headers)
        else:
            self.answer(200, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run_data(endpoint: str, tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "host.data", "--out", str(tmp_path / "out"), "--vocab-size", "300", *arguments],
        cwd=Path(__file__).parents[4],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_hub_data_set_is_streamed_with_its_own_splits_and_licence(endpoint: str, tmp_path: Path) -> None:
    done = run_data(endpoint, tmp_path, "--source", "owner/stories")
    assert done.returncode == 0, done.stderr
    meta = load_data(tmp_path / "out", verify=True).meta
    assert (meta.source, meta.licence) == ("owner/stories", "mit")
    assert (meta.train.stories, meta.valid.stories, meta.test.stories) == (120, 7, 5)

    again = run_data(NO_HUB, tmp_path, "--source", "owner/stories")
    assert (again.returncode, again.stdout) == (0, f"{tmp_path / 'out'} is up to date\n")


def test_hub_without_a_network_fails_at_once(tmp_path: Path) -> None:
    done = run_data(NO_HUB, tmp_path)
    assert done.returncode == 65
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: roneneldan/TinyStories could not be downloaded from the Hugging Face Hub (")
    assert sentence.endswith("local stories need no network, give them with --source FILE_OR_FOLDER")
    assert not (tmp_path / "out").exists()
