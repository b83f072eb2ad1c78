"""A web server with TLS of a private authority, which serves a folder, or misbehaves at some of its paths."""

import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.certificates import make_authority, make_certificate

Answer = Callable[[SimpleHTTPRequestHandler], None]


class HttpsServer:
    """On a port of 127.0.0.1, with a certificate for `localhost`. ca: the authority to trust. asked: paths, in order.

    answers: what is done at a path instead of serving its file.
    """

    def __init__(self, folder: Path, certificates: Path) -> None:
        make_authority(certificates, "ca")
        make_certificate(certificates, "server", "localhost", authority="ca", names="DNS:localhost")
        self.ca = certificates / "ca.pem"
        self.asked: list[str] = []
        self.answers: dict[str, Answer] = {}
        site = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                site.asked.append(self.path)
                answer = site.answers.get(self.path, SimpleHTTPRequestHandler.do_GET)
                try:
                    answer(self)
                except OSError:  # the client left, as it should
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem", certificates / "server.key")

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def finish_request(self, request: Any, client_address: Any) -> None:
                # The handshake, in the thread of the connection; a client that does not trust it leaves.
                with suppress(OSError), context.wrap_socket(request, server_side=True) as secure:
                    super().finish_request(secure, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_port
        self.url = f"https://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def redirect(to: str, status: int = 302) -> Answer:
    """Leads elsewhere."""

    def answer(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Location", to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def body(content: bytes, length: int | None) -> Answer:
    """Sends that content, and announces a length, or none."""

    def answer(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(200)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = True

    return answer
