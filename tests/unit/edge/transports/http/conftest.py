"""A real HTTP server in this process, with the debug bundle on the fake backend: 2 ms a step."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.config import Config, HttpConfig
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from edge.transports.http.server import HttpServer


@pytest.fixture
def server(debug_bundle: Path, tmp_path: Path) -> Iterator[HttpServer]:
    loaded = LoadedBundle.load(debug_bundle, "fake:2")
    worker = Scheduler(loaded, queue_size=4)
    made = HttpServer(Config(state=tmp_path, http=HttpConfig(listen="127.0.0.1:0")), worker)
    made.start()
    worker.start()
    yield made
    worker.stop()
    made.close()
    loaded.close()


@pytest.fixture
def scheduler(server: HttpServer) -> Scheduler:
    return server._scheduler
