"""A real HTTP server in this process, with the debug bundle on the fake backend: 2 ms a step."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.serving.scheduler import Scheduler
from edge.transports.http.server import HttpServer
from tests.support.http_server import served


@pytest.fixture
def server(debug_bundle: Path, tmp_path: Path) -> Iterator[HttpServer]:
    with served(debug_bundle, "fake:2", tmp_path) as made:
        yield made


@pytest.fixture
def scheduler(server: HttpServer) -> Scheduler:
    return server._scheduler
