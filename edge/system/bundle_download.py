"""Downloads a bundle from a folder of a web server, whose files are those of the bundle as they are.

The manifest and its signature come first. Only when the signature is right are the other files asked for, each held
against its hash as it comes: nobody but the key's owner chooses what a device parses. No archive, so nothing to unpack.
"""

import hashlib
import logging
import os
import shutil
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import SplitResult, urljoin, urlsplit
from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler, Request

from edge.system.bundle_store import SIGNATURE, Store, check_signature
from shared.errors import BundleError, one_line
from shared.manifest import MANIFEST, MAX_MANIFEST_BYTES, TOKENIZER, read_manifest

log = logging.getLogger(__name__)

REDIRECTS: Final = (301, 302, 303, 307, 308)
MAX_REDIRECTS: Final = 5
MAX_SIGNATURE_BYTES: Final = 4096
PIECE_BYTES: Final = 1 << 18


@dataclass(frozen=True)
class Bounds:
    """What a download may take. silence_s: without a byte; reserve_bytes: left free on the disk of the store."""

    total_bytes: int = 4 << 30
    total_s: float = 3600.0
    silence_s: float = 30.0
    reserve_bytes: int = 64 << 20


class RemoteBundle:
    """A bundle at an https address, that of its folder. key: what it must be signed by; None for its manifest alone.
    Raises BundleError.

    Certificates are checked against the system's authorities, or those that SSL_CERT_FILE names; proxies are those of
    https_proxy and no_proxy.
    """

    def __init__(self, address: str, key: Path | None, bounds: Bounds = Bounds()) -> None:
        parts = _checked(address)
        if parts.query or parts.fragment:
            raise BundleError(f"{address} has a query or a fragment: give the address of the bundle's folder")
        self.address = address.rstrip("/")
        self._key = key
        self._bounds = bounds
        self._give_up_s = 0.0
        self._left_bytes = 0
        self._opener = OpenerDirector()  # https alone, and no redirects that are followed unseen
        for handler in (ProxyHandler(), HTTPSHandler(context=self._context())):
            self._opener.add_handler(handler)

    def __str__(self) -> str:
        return self.address

    def stage(self, store: Store) -> Path:
        """Download into the store.  → a folder for `Store.admit` or `Store.discard`. Raises BundleError."""
        assert self._key is not None
        self._begin()
        with store.staging(self.address) as staged:
            self._fetch(MANIFEST, staged, most_bytes=MAX_MANIFEST_BYTES)
            self._fetch(SIGNATURE, staged, most_bytes=MAX_SIGNATURE_BYTES)
            check_signature(staged, self._key)
            manifest = read_manifest(staged)
            for file, sha256 in (
                (TOKENIZER, manifest.tokenizer_sha256),
                *((g.file, g.sha256) for g in manifest.graphs),
            ):
                self._fetch(file, staged, sha256=sha256)
        return staged

    def fetch_manifest(self, folder: Path) -> None:
        """Download the manifest alone into a folder, with no look at its signature. Raises BundleError."""
        self._begin()
        self._fetch(MANIFEST, folder, most_bytes=MAX_MANIFEST_BYTES)

    def _begin(self) -> None:
        self._give_up_s = time.monotonic() + self._bounds.total_s
        self._left_bytes = self._bounds.total_bytes

    def _fetch(self, file: str, staged: Path, *, most_bytes: int | None = None, sha256: str | None = None) -> None:
        """Download one file, synced to disk. most_bytes: by default what is left of the whole."""
        digest, size = hashlib.sha256(), 0
        most_bytes = self._left_bytes if most_bytes is None else min(most_bytes, self._left_bytes)
        try:
            with (staged / file).open("wb") as writable:
                for piece in self._pieces(file, most_bytes, staged):
                    writable.write(piece)
                    digest.update(piece)
                    size += len(piece)
                writable.flush()
                os.fsync(writable.fileno())
            (staged / file).chmod(0o644)
        except OSError as error:
            raise BundleError(f"{file} cannot be written to {staged.parent}: {error.strerror}") from None
        self._left_bytes -= size
        actual = digest.hexdigest()
        if sha256 not in (None, actual):
            short = f"sha256 {actual[:12]}… instead of {str(sha256)[:12]}…"
            raise BundleError(f"{self.address}/{file} does not match its manifest: {short}")
        log.info("%s: %.1f MB", file, size / 1e6)

    def _pieces(self, file: str, most_bytes: int, staged: Path) -> Iterator[bytes]:
        """A file's content. Raises BundleError for all that can go wrong with a server, and for a disk without room."""
        address, size = f"{self.address}/{file}", 0
        try:
            with closing(self._open(address)) as response:
                announced = response.length or 0  # None: it does not say
                while True:
                    if max(announced, size) > most_bytes:
                        raise BundleError(f"{address} is larger than the {most_bytes} bytes that are taken")
                    free = shutil.disk_usage(staged).free - self._bounds.reserve_bytes
                    if announced - size > free or free < PIECE_BYTES:
                        needed = max(announced - size, PIECE_BYTES) + self._bounds.reserve_bytes
                        raise BundleError(f"no room for {file}: {staged.parent} needs {needed / 1e6:.0f} MB free")
                    if not (piece := response.read(PIECE_BYTES)):
                        break
                    size += len(piece)
                    yield piece
        except (OSError, HTTPException) as error:
            raise BundleError(f"{address} cannot be downloaded: {self._explain(error)}") from None
        if size < announced:
            raise BundleError(f"{address} cannot be downloaded: the connection broke after {size} of {announced} bytes")

    def _open(self, address: str) -> HTTPResponse:
        """The answer with status 200, wherever it is. Raises BundleError, OSError, HTTPException."""
        url = address
        for _ in range(MAX_REDIRECTS + 1):
            request = Request(url, headers={"User-Agent": "edgelm"})
            response: HTTPResponse = self._opener.open(request, timeout=self._left_s())
            if response.status == 200:
                return response
            response.close()
            location = response.headers.get("Location")
            if response.status not in REDIRECTS or location is None:
                raise BundleError(f"{address} cannot be downloaded: HTTP status {response.status} {response.reason}")
            url = urljoin(url, location)
            _checked(url, f"{address} leads to ")
        raise BundleError(f"{address} cannot be downloaded: it leads on more than {MAX_REDIRECTS} times")

    def _left_s(self) -> float:
        """Timeout of the next wait. Raises TimeoutError."""
        left_s = self._give_up_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return min(left_s, self._bounds.silence_s)

    def _context(self) -> ssl.SSLContext:
        """TLS whose every read is bounded, so that a server that drips bytes cannot hold a download for long."""
        download = self

        class Bounded(ssl.SSLSocket):
            def recv_into(self, *args: Any, **named: Any) -> int:
                self.settimeout(download._left_s())
                return super().recv_into(*args, **named)

        context = ssl.create_default_context()
        context.sslsocket_class = Bounded
        return context

    def _explain(self, error: Exception) -> str:
        """What went wrong on the way, in words."""
        reason = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        if isinstance(reason, TimeoutError):
            over = time.monotonic() >= self._give_up_s
            return (
                f"it takes more than {self._bounds.total_s:g} s" if over else f"{self._bounds.silence_s:g} s of silence"
            )
        if isinstance(reason, ssl.SSLCertVerificationError):
            return (
                f"its certificate is refused ({reason.verify_message}); SSL_CERT_FILE names other authorities to trust"
            )
        if isinstance(reason, ssl.SSLError):
            return f"TLS fails ({reason.reason})"
        if isinstance(reason, OSError) and reason.strerror:
            return reason.strerror
        return one_line(str(reason)) or type(reason).__name__


def _checked(url: str, said: str = "") -> SplitResult:
    """The parts of an https address. said: what comes before it in the error. Raises BundleError."""
    try:
        parts = urlsplit(url)
        plain = url.isascii() and url.isprintable() and " " not in url
        usable = (
            plain and parts.scheme == "https" and bool(parts.hostname) and parts.username is None and parts.port != 0
        )
    except ValueError:  # a port that is none, a bracket too many
        usable = False
    if not usable:
        raise BundleError(f"{said}{url}: bundles are downloaded from https://HOST/FOLDER alone")
    return parts
