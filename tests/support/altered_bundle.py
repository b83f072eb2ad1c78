"""Bundles with another manifest, or another graph."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
from msgspec import json
from msgspec.structs import replace

from shared.manifest import MANIFEST, Manifest, Role, read_manifest, sha256_of


def changed(folder: Path, target: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(folder, target)
    (target / MANIFEST).write_bytes(json.encode(change(read_manifest(target))))
    return target


def with_graph(folder: Path, target: Path, role: Role, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a bundle with another graph of that role."""

    def change_both(manifest: Manifest) -> Manifest:
        graph = next(graph for graph in manifest.graphs if graph.role == role)
        model = onnx.load(target / graph.file, load_external_data=False)
        change(model)
        onnx.save(model, target / graph.file)
        new = replace(graph, sha256=sha256_of(target / graph.file))
        return replace(manifest, graphs=tuple(new if one is graph else one for one in manifest.graphs))

    return changed(folder, target, change_both)
