"""What the tests of an installed service ask of it."""

import json
import shutil
from typing import Any

from shared.manifest import sha256_of
from tests.systemd.machine import Machine

INSTALL = "/srv/checkout/deploy/install.sh"
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels"}
PYTHON = "/opt/edgelm/current/bin/python"
STORY = {"prompt": "Once upon a time", "seed": 1}
SHIPPED_MODEL = "tinystories"


def ask(device: Machine, **fields: object) -> dict[str, Any]:
    """The answer to a short story."""
    line = device.line()
    try:
        return line.ask(STORY | {"steps": 8} | fields)
    finally:
        line.close()


def served(device: Machine) -> str:
    """The name of the bundle that answers."""
    answer = ask(device)
    assert answer["status"] == "ok"
    return str(answer["model"]).partition("@")[0]


def current(device: Machine) -> str:
    return (device.root / "opt/edgelm/bundles/current").readlink().name


def bundle_command(device: Machine, *arguments: str) -> tuple[int, str]:
    """Exit status and last line of `python -m edge.bundle`."""
    done = device.run(PYTHON, "-m", "edge.bundle", *arguments, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()[-1]


def newer(device: Machine, name: str, graph: bytes | None = None) -> str:
    """A copy of the shipped bundle under another name, perhaps with another CPU graph, all hashes right.  → its path"""
    folder = device.root / "srv" / name
    shutil.copytree(device.root / "srv/checkout/bundle/tinystories", folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"name": name}
    if graph is not None:
        entry = next(entry for entry in manifest["graphs"] if entry["target"] == "cpu")
        (folder / entry["file"]).write_bytes(graph)
        entry["sha256"] = sha256_of(folder / entry["file"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return f"/srv/{name}"
