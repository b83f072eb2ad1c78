"""The automatic window: as many drafts as pay, by what passes cost here and what the manifest says is kept."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import edge.serving.window
from edge.backends.fake import FakeBackend
from edge.decoding.blocks import Law, RowScores, Slot
from edge.decoding.types import Floats, Ids
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.window import BUDGET_S, best_window, tokens_per_pass
from shared.figures import Figure
from shared.manifest import LawFigures, Manifest, read_manifest
from shared.messages import GenerateRequest


class Priced(FakeBackend):
    """A pass takes `pass_s`, each row after the first `row_s` more, and all drafts `draft_s`, by its clock."""

    def __init__(self, manifest: Manifest, *, pass_s: float, row_s: float, draft_s: float) -> None:
        super().__init__(manifest)
        self.now_s, self.pass_s, self.row_s, self.draft_s = 0.0, pass_s, row_s, draft_s

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        self.now_s += self.pass_s + self.row_s * (tokens.size - 1)
        return super().rows(slot, tokens, positions=positions, scored=scored, under_way=under_way)

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        self.now_s += self.draft_s
        return super().draft(slot, state, token=token, noise=noise, law=law)


def window_of(rows: Priced, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(edge.serving.window, "thread_time", lambda: rows.now_s)
        return best_window(rows, manifest)


def with_figure(manifest: Manifest, kept: dict[str, float] | None) -> Manifest:
    nats = Figure(2.0, 0.1)
    return replace(manifest, laws=(LawFigures("torch fp32", "x", 9, nats, nats, tokens_per_pass=kept),))


@pytest.fixture
def manifest(blocks_bundle: Path) -> Manifest:
    return with_figure(read_manifest(blocks_bundle), {"0": 2.6, "0.8": 2.2, "1": 2.1})


@pytest.mark.parametrize(
    ("row_s", "draft_s", "window"),
    [(0.0001, 0.0005, 3), (0.002, 0.0002, 1), (0.001, 0.004, 0), (0.0012, 0.0012, 3)],
    ids=["cheap drafts", "dear rows", "dear drafts", "a near tie"],
)
def test_window_is_what_pays(
    manifest: Manifest, row_s: float, draft_s: float, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes keep about 1, 1.6, 2 and 2.2 tokens."""
    assert window_of(Priced(manifest, pass_s=0.004, row_s=row_s, draft_s=draft_s), manifest, monkeypatch) == window


@pytest.mark.parametrize("pass_s", [0.001, 0.02, 1.0])
def test_window_takes_little_time(manifest: Manifest, pass_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow device two rounds of four passes, and no more."""
    rows = Priced(manifest, pass_s=pass_s, row_s=0, draft_s=0)
    assert window_of(rows, manifest, monkeypatch) == 3
    assert rows.now_s < max(BUDGET_S + 4 * pass_s, 2 * 4 * pass_s) + 1e-9


def test_window_is_the_manifests_where_it_does_not_say_what_is_kept(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = with_figure(manifest, None)
    assert window_of(Priced(unknown, pass_s=0, row_s=0.01, draft_s=0.01), unknown, monkeypatch) == 3


def test_tokens_per_pass_grow_to_the_manifests_figure(manifest: Manifest) -> None:
    kept = tokens_per_pass(manifest, 3)
    assert kept is not None and kept[0] == 1 and kept[3] == pytest.approx(2.2)
    assert np.all(np.diff(kept, 2) < 0), "each draft adds less than the one before"


def test_window_of_a_request_is_its_own_or_the_automatic_one(blocks_bundle: Path) -> None:
    loaded = LoadedBundle.load(blocks_bundle, "ort", threads=1)
    loaded.window = 2
    for asked, window in ((None, 2), (0, 0), (3, 3)):
        law = loaded.prepare(GenerateRequest(prompt="abc", window=asked)).sampling
        assert isinstance(law, Law) and law.window == window
