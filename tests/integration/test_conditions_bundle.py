"""The bundle in the repository that takes words and pictures: the shipped network, told what to tell of."""

from pathlib import Path

import pytest

from edge.serving.loaded_bundle import LoadedBundle
from host.export.law_parity import passes_law
from shared.manifest import CONDITIONED_ROLES, TOKENIZER, read_manifest, verified_bytes
from shared.messages import GenerateRequest

BUNDLES = Path(__file__).parents[2] / "bundle"
FOLDER = BUNDLES / "tinystories-conditions"


@pytest.fixture(scope="module")
def loaded() -> LoadedBundle:
    return LoadedBundle.load(FOLDER, threads=2)


def test_conditions_bundle_is_the_shipped_network_with_encoders() -> None:
    manifest, shipped = read_manifest(FOLDER), read_manifest(BUNDLES / "tinystories")
    assert manifest.name == FOLDER.name
    for graph in manifest.graphs:
        verified_bytes(FOLDER, graph.file, graph.sha256)
    verified_bytes(FOLDER, TOKENIZER, manifest.tokenizer_sha256)
    digests = {graph.role: graph.sha256 for graph in manifest.graphs}
    for graph in shipped.graphs:
        if graph.target == "cpu" and graph.role != "canvas":
            assert digests[graph.role] == graph.sha256, graph.role
    assert {*CONDITIONED_ROLES["cpu"], "prefill.conditioned"} <= digests.keys()
    assert manifest.laws == shipped.laws and all(passes_law(gate) for gate in manifest.law_parity)
    assert manifest.data.stages[: len(shipped.data.stages)] == shipped.data.stages
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 40e6


def test_conditions_bundle_writes_as_the_shipped_one_unless_asked(loaded: LoadedBundle) -> None:
    shipped = LoadedBundle.load(BUNDLES / "tinystories", threads=2)
    request = GenerateRequest(prompt="Once upon a time", seed=4)
    assert loaded.run(loaded.prepare(request)).text == shipped.run(shipped.prepare(request)).text
    shipped.close()


def test_conditions_bundle_tells_of_most_words_that_it_is_asked_for(loaded: LoadedBundle) -> None:
    words = ["dragon", "cake", "boat", "rabbit", "garden", "hat"]
    told = [
        word
        in loaded.run(loaded.prepare(GenerateRequest(prompt="Once upon a time", seed=i, words=[word]))).text.lower()
        for i, word in enumerate(words)
    ]
    assert sum(told) >= 4


def test_conditions_bundle_takes_a_word_in_capitals(loaded: LoadedBundle) -> None:
    asked = [GenerateRequest(prompt="Once", seed=3, words=[word]) for word in ("dragon", "Dragon", "DRAGON")]
    (text,) = {loaded.run(loaded.prepare(request)).text for request in asked}
    assert "dragon" in text.lower()
