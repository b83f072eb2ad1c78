"""The daemon, brokers and listeners of a test, all gone at its end."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Broker, Daemon, Listener


@pytest.fixture
def start_daemon(tmp_path: Path, debug_bundle: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons with flags and EDGELM_ settings; all are stopped at the end."""
    daemons: list[Daemon] = []

    def start(*args: str, backend: str = "fake", **settings: Any) -> Daemon:
        daemons.append(Daemon(tmp_path, debug_bundle, "--backend", backend, *args, **settings))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.close()


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory, debug_bundle: Path) -> Iterator[Daemon]:
    """One daemon for all tests of a file that leave it as they found it; a step takes it 2 ms."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), debug_bundle, "--backend", "fake:2")
    yield daemon
    daemon.close()


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Brokers with further lines of configuration, not yet started; all are stopped at the end."""
    brokers: list[Broker] = []

    def make(*settings: str) -> Broker:
        brokers.append(Broker(tmp_path, *settings))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.stop()


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    """Listeners on a broker's topics; all are closed at the end."""
    listeners: list[Listener] = []

    def make(broker: Broker, topic: str = "edgelm/#") -> Listener:
        listeners.append(Listener(broker.port, topic))
        return listeners[-1]

    yield make
    for listener in listeners:
        listener.close()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    """A running broker."""
    return make_broker().start()
