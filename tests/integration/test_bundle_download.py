"""`edgelm bundle install https://…` from a real web server with TLS of a private authority."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from edge.system.bundle_download import MAX_REDIRECTS, Bounds, RemoteBundle
from edge.system.bundle_store import Store, check_files
from shared.errors import BundleError
from tests.integration.harness import run_module
from tests.integration.test_bundle_command import bundle_command, contents, links, needs_minisign, refusal
from tests.support.https_server import Answer, HttpsServer, body, redirect

pytestmark = [
    needs_minisign,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, debug_bundle: Path) -> Path:
    """A folder with the bundle `debug`, signed, and the keys `right.pub` and `wrong.pub`."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(debug_bundle, folder / "debug")
    for name in ("right", "wrong"):
        pair = ["-p", str(folder / f"{name}.pub"), "-s", str(folder / f"{name}.key")]
        subprocess.run(["minisign", "-G", "-W", *pair], check=True, capture_output=True)
    sign = ["minisign", "-S", "-s", str(folder / "right.key"), "-m", str(folder / "debug" / "manifest.json")]
    subprocess.run(sign, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def module_site(signed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpsServer]:
    server = HttpsServer(signed, tmp_path_factory.mktemp("certificates"))
    yield server
    server.close()


@pytest.fixture
def site(module_site: HttpsServer, monkeypatch: pytest.MonkeyPatch) -> HttpsServer:
    """The server, trusted by this process and those it starts, and well-behaved."""
    monkeypatch.setenv("SSL_CERT_FILE", str(module_site.ca))
    module_site.answers.clear()
    module_site.asked.clear()
    return module_site


USUAL = Bounds()


def graphs(bundle: Path) -> list[str]:
    return [graph["file"] for graph in json.loads((bundle / "manifest.json").read_text())["graphs"]]


def refused(site: HttpsServer, signed: Path, store: Path, *, key: str = "right", bounds: Bounds = USUAL) -> str:
    """Why a download is refused. The store is as it was, and nothing is asked for behind a signature that is wrong."""
    with pytest.raises(BundleError) as caught, Store(store).locked():
        RemoteBundle(f"{site.url}/debug", signed / f"{key}.pub", bounds).stage(Store(store))
    assert contents(store) == set()
    assert ".partial" not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_bundle_download_is_served_when_signed(site: HttpsServer, signed: Path, tmp_path: Path) -> None:
    """The folder may end in a slash, and its server may send us on."""
    store, graph = tmp_path / "store", graphs(signed / "debug")[0]
    site.answers[f"/debug/{graph}"] = redirect(f"/elsewhere/{graph}", 308)
    content = (signed / "debug" / graph).read_bytes()
    site.answers[f"/elsewhere/{graph}"] = body(content, None)  # of a length that it does not say
    done = bundle_command(store, "install", f"{site.url}/debug/", "--key", signed / "right.pub")
    assert done.returncode == 0, done.stderr
    name = done.stdout.split()[0]
    assert links(store) == (name, None) and contents(store) == {name}
    check_files(store / name)
    assert (store / name / "manifest.json.minisig").exists()
    assert site.asked[:2] == ["/debug/manifest.json", "/debug/manifest.json.minisig"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (store / name).iterdir())


def test_bundle_download_without_a_key_asks_nobody(site: HttpsServer, tmp_path: Path) -> None:
    done = bundle_command(tmp_path / "store", "install", f"{site.url}/debug")
    assert done.returncode == 78 and "a bundle that is downloaded must be signed" in done.stderr
    assert site.asked == [] and not (tmp_path / "store").exists()


def test_bundle_download_refusal_is_one_line_of_the_command(site: HttpsServer, signed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    said = refusal(bundle_command(store, "install", f"{site.url}/none", "--key", signed / "right.pub"))
    assert said == f"{site.url}/none/manifest.json cannot be downloaded: HTTP status 404 File not found"
    assert contents(store) == set()


@pytest.mark.parametrize("fault", ["another key", "another manifest", "none"])
def test_bundle_download_stops_at_a_wrong_signature(
    fault: str, site: HttpsServer, signed: Path, tmp_path: Path
) -> None:
    manifest, signature = "/debug/manifest.json", "/debug/manifest.json.minisig"
    if fault == "another manifest":
        content = (signed / "debug" / "manifest.json").read_bytes() + b"\n"
        site.answers[manifest] = body(content, len(content))
    elif fault == "none":
        site.answers[signature] = lambda handler: handler.send_error(404)
    said = refused(site, signed, tmp_path / "store", key="wrong" if fault == "another key" else "right")
    assert f"{site.url}{signature} cannot be downloaded: HTTP status 404" in said or "is not signed by" in said
    assert site.asked == [manifest, signature], "nothing else"


def drip(handler: SimpleHTTPRequestHandler) -> None:
    """A byte now and then: never silent, never done."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b".")
        time.sleep(0.02)


def silence(handler: SimpleHTTPRequestHandler) -> None:
    handler.rfile.read(1)  # until the client leaves


def headers_without_end(handler: SimpleHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for _ in range(600):
        handler.wfile.write(b"x")
        time.sleep(0.02)


def nonsense(handler: SimpleHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


QUICK = Bounds(silence_s=0.5, total_s=1.0)
FAULTS: dict[str, tuple[str, Answer, Bounds, str]] = {
    "damaged": ("GRAPH", body(b"?" * 100, 100), Bounds(), "does not match its manifest: sha256 "),
    "missing": ("GRAPH", lambda handler: handler.send_error(404), Bounds(), "HTTP status 404 Not Found"),
    "cut off": ("GRAPH", body(b"?" * 100, 5000), Bounds(), "the connection broke after 100 of 5000 bytes"),
    "to http": ("GRAPH", redirect("http://localhost/graph"), Bounds(), "leads to http://localhost/graph: bundles are"),
    "to a file": ("GRAPH", redirect("file:///etc/passwd"), Bounds(), "leads to file:///etc/passwd: bundles are"),
    "in circles": ("GRAPH", redirect("?again"), Bounds(), f"it leads on more than {MAX_REDIRECTS} times"),
    "says it is large": ("manifest.json", body(b"", 1 << 40), Bounds(), "is larger than the 1048576 bytes"),
    "is large": ("manifest.json", body(b" " * 2_000_000, None), Bounds(), "is larger than the 1048576 bytes"),
    "a large signature": ("manifest.json.minisig", body(b" " * 5000, None), Bounds(), "is larger than the 4096 bytes"),
    "all too large": ("", body(b"", 0), Bounds(total_bytes=100_000), "bytes that are taken"),
    "no room": ("", body(b"", 0), Bounds(reserve_bytes=1 << 60), "no room for manifest.json: "),
    "silent": ("GRAPH", silence, QUICK, "cannot be downloaded: 0.5 s of silence"),
    "slow": ("manifest.json", drip, QUICK, "cannot be downloaded: it takes more than 1 s"),
    "slow headers": ("manifest.json", headers_without_end, QUICK, "cannot be downloaded: it takes more than 1 s"),
    "no HTTP": ("GRAPH", nonsense, Bounds(), "cannot be downloaded: SSH-2.0-OpenSSH_9.2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bundle_download_failure_is_one_sentence_and_leaves_nothing(
    fault: str, site: HttpsServer, signed: Path, tmp_path: Path
) -> None:
    file, answer, bounds, sentence = FAULTS[fault]
    file = graphs(signed / "debug")[0] if file == "GRAPH" else file
    if file:
        site.answers[f"/debug/{file}"] = answer
        site.answers[f"/debug/{file}?again"] = answer
    said = refused(site, signed, tmp_path / "store", bounds=bounds)
    assert sentence in said
    if fault not in ("all too large", "no room"):
        assert f"{site.url}/debug/{file}" in said


def test_bundle_download_distrusts_an_unknown_authority(
    site: HttpsServer, signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    said = refused(site, signed, tmp_path / "store")
    assert "its certificate is refused (" in said and "SSL_CERT_FILE" in said
    assert site.asked == []


def test_bundle_download_checks_the_name_of_the_server(site: HttpsServer, signed: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"its certificate is refused \(IP address mismatch"):
        (tmp_path / "store").mkdir()
        RemoteBundle(f"https://127.0.0.1:{site.port}/debug", signed / "right.pub").stage(Store(tmp_path / "store"))


def test_bundle_download_of_a_server_that_is_none_is_named(signed: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer_in_plain_text() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        plain = threading.Thread(target=answer_in_plain_text)
        plain.start()
        for expected in ("TLS fails", "Connection refused"):
            (tmp_path / "store").mkdir(exist_ok=True)
            with pytest.raises(BundleError, match=expected):
                RemoteBundle(f"https://localhost:{port}/x", signed / "right.pub").stage(Store(tmp_path / "store"))
            plain.join()
            listener.close()


BAD_ADDRESSES = [
    "http://localhost/debug",
    "file:///etc",
    "https://",
    "https://user:word@localhost/debug",
    "https://localhost:port/debug",
    "https://localhost:99999/debug",
    "https://local host/debug",
    "https://localhost/de\nbug",
    "https://löcalhost/debug",
    "https://[::1/debug",
    "https://localhost/debug?x=1",
    "https://localhost/debug#x",
]


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_bundle_download_address_that_is_none_is_refused(address: str, signed: Path) -> None:
    with pytest.raises(BundleError, match=r"are downloaded from https|give the address of the bundle's folder"):
        RemoteBundle(address, signed / "right.pub")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_bundle_download_onto_a_full_disk_changes_nothing(site: HttpsServer, signed: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(disk)], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        assert "no room for manifest.json: " in refused(site, signed, disk / "store")
        said = refused(site, signed, disk / "store", bounds=Bounds(reserve_bytes=-(1 << 30)))  # looks at no free space
        assert said.endswith(f"cannot be written to {disk / 'store'}: No space left on device")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_bundle_download_goes_through_the_proxy_of_the_environment(
    site: HttpsServer, signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tunnel: "Callable[[], str]"
) -> None:
    monkeypatch.setenv("https_proxy", tunnel())
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    store = Store(tmp_path / "store")
    with store.locked():
        check_files(RemoteBundle(f"{site.url}/debug", signed / "right.pub").stage(store))


@pytest.fixture
def tunnel(site: HttpsServer) -> Iterator[Callable[[], str]]:
    """A proxy that knows CONNECT, and leads to the site alone; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            assert head.startswith(f"CONNECT localhost:{site.port} ".encode())
            server = socket.create_connection(("127.0.0.1", site.port))
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            upward = threading.Thread(target=pump, args=(client, server))
            upward.start()
            pump(server, client)
            upward.join()
            server.close()
            client.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield lambda: f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_bundle_download_is_explained_by_help() -> None:
    assert "https://files.example/" in run_module("edge.bundle", "--help").stdout
