"""A bundle behind the HTTP server, without a daemon around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.config import Config, HttpConfig
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from edge.transports.http.server import HttpServer


@contextmanager
def served(bundle: Path, backend: str, state: Path) -> Iterator[HttpServer]:
    """A bundle behind HTTP on a free port of 127.0.0.1."""
    loaded = LoadedBundle.load(bundle, backend, threads=1)
    worker = Scheduler(loaded, queue_size=4)
    made = HttpServer(Config(state=state, http=HttpConfig(listen="127.0.0.1:0")), worker)
    made.start()
    worker.start()
    yield made
    worker.stop()
    made.close()
    loaded.close()
