"""Many requests share passes of a CPU, whatever their lengths and laws, and no text shows it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge.backends.native_rows import NativeRows
from edge.backends.ort_rows import OrtRows
from edge.decoding.blocks import Writing
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Run
from edge.serving.scheduler import Scheduler
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from shared.manifest import SamplingDefaults
from shared.messages import Gap, GenerateRequest
from shared.metrics import Metrics
from tests.support.compiled import NEEDS_LIBRARY
from tests.support.mailbox import Mailbox

CONDITIONS = Path(__file__).parents[4] / "bundle" / "tinystories-conditions"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "int8"
    export_untrained("debug", folder, wanted=Wanted(cpu_int8=True), defaults=SamplingDefaults())
    return folder


def requests() -> list[GenerateRequest]:
    """Of many lengths, prompts and laws, some with gaps, some without drafts, more than there are slots."""
    laws: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"window": 0},
        {"window": 1},
    ]
    prompts = ["a", "abc", "the story of a dog that", "once"]
    some = [
        GenerateRequest(prompt=prompts[i % 4], decode="blocks", seed=i, max_tokens=3 + 7 * i % 41, **laws[i % 6])
        for i in range(24)
    ]
    gaps = [GenerateRequest(segments=["one ", Gap(5), " two ", Gap(9)], decode="blocks", seed=i) for i in range(4)]
    return [*some[:10], *gaps, *some[10:]]


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [1, 2])
def test_together_texts_are_the_same_as_alone(bundle: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedBundle.load(bundle, "ort", threads=threads)
    alone = [loaded.run(loaded.prepare(request)).text for request in requests()]
    sizes, step = list[int](), loaded.step

    def counted(runs: list[Run], under_way: int = 1) -> None:
        sizes.append(len(runs))
        step(runs, under_way)

    monkeypatch.setattr(loaded, "step", counted)
    texts, _ = answers_of(loaded, requests())
    assert texts == alone
    assert {1, 4} <= set(sizes) <= {1, 2, 3, 4} and sizes.count(4) > 10


def answers_of(loaded: LoadedBundle, asked: list[GenerateRequest]) -> tuple[list[str | None], Metrics]:
    """Of a daemon that has them all at once, and how it is after them."""
    scheduler, mailboxes = Scheduler(loaded, queue_size=40), [Mailbox() for _ in asked]
    for number, (request, mailbox) in enumerate(zip(asked, mailboxes, strict=True)):
        scheduler.submit(request, mailbox, client=str(number))
    scheduler.start()
    texts = [mailbox.response().text for mailbox in mailboxes]
    metrics = scheduler.metrics()
    scheduler.stop()
    return texts, metrics


@NEEDS_LIBRARY
def test_together_a_request_that_fails_spoils_no_other(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass in which one of them cannot be drawn is made again, of each alone."""
    loaded = LoadedBundle.load(bundle, "ort", threads=1)
    assert isinstance(loaded.rows, NativeRows)
    advance, broken = loaded.rows.advance, 3

    def failing(writings: Sequence[Writing], under_way: int) -> None:
        if any(w.law.seed == broken and w.passes > 2 for w in writings):
            raise RuntimeError("scores that are not numbers")
        advance(writings, under_way)

    asked = [GenerateRequest(prompt="a", seed=n, max_tokens=20, decode="blocks") for n in range(8)]
    alone = [loaded.run(loaded.prepare(request)).text for request in asked]
    monkeypatch.setattr(loaded.rows, "advance", failing)
    texts, metrics = answers_of(loaded, asked)
    assert texts == [None if n == broken else text for n, text in enumerate(alone)]
    assert metrics.answered == {"ok": 7, "internal": 1}


def test_together_without_the_library_each_pass_is_of_one_request(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.backends.native_rows.library", lambda: None)
    loaded = LoadedBundle.load(bundle, "ort", threads=1)
    assert type(loaded.rows) is OrtRows
    asked = requests()[:12]
    texts, _ = answers_of(loaded, asked)
    assert texts == [loaded.run(loaded.prepare(request)).text for request in asked]


@NEEDS_LIBRARY
def test_together_each_lane_has_its_share(bundle: Path) -> None:
    """Of four requests in two lanes each pass has two."""
    loaded = LoadedBundle.load(bundle, "ort", threads=2)
    scheduler = Scheduler(loaded, queue_size=16)
    for number in range(4):
        request = GenerateRequest(prompt="a", seed=number, max_tokens=30, decode="blocks")
        scheduler.submit(request, Mailbox(), client=str(number))
    for _ in range(4):  # the prompts are read one by one
        work = scheduler._table.take()
        assert work is not None and len(work.batch) == 1
        scheduler._step(work.batch, work.under_way)
    first, second = scheduler._table.take(), scheduler._table.take()
    assert first is not None and second is not None and (len(first.batch), len(second.batch)) == (2, 2)


@NEEDS_LIBRARY
def test_together_texts_share_passes_once_they_have_told_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model that ships: while a word is asked for a request has passes of its own."""
    loaded, sizes = LoadedBundle.load(CONDITIONS, "ort", threads=2), list[int]()
    asked = [GenerateRequest(prompt="", words=["dragon"], seed=n, max_tokens=48, decode="blocks") for n in range(8)]
    alone, step = [loaded.run(loaded.prepare(request)).text for request in asked], loaded.step
    assert sum("dragon" in text for text in alone) >= 6

    def counted(runs: list[Run], share: int = 1) -> None:
        sizes.append(len(runs))
        step(runs, share)

    monkeypatch.setattr(loaded, "step", counted)
    assert answers_of(loaded, asked)[0] == alone
    assert sizes.count(4) > 1 and sizes.count(1) > 8
