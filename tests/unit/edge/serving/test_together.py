"""Many requests share passes of a CPU, whatever their lengths and laws, and no text shows it."""

from pathlib import Path
from typing import Any

import pytest

from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Run
from edge.serving.scheduler import Scheduler
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from shared.errors import BundleError
from shared.manifest import SamplingDefaults, find_graph, read_manifest
from shared.messages import Gap, GenerateRequest, Response
from tests.support.mailbox import Mailbox


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


@pytest.mark.parametrize("threads", [1, 2])
def test_together_texts_are_the_same_as_alone(bundle: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedBundle.load(bundle, "ort", threads=threads)
    alone = [loaded.run(loaded.prepare(request)).text for request in requests()]
    sizes, step = list[int](), loaded.step

    def counted(runs: list[Run], under_way: int = 1) -> None:
        sizes.append(len(runs))
        step(runs, under_way)

    monkeypatch.setattr(loaded, "step", counted)
    scheduler, mailboxes = Scheduler(loaded, queue_size=40), list[Mailbox]()
    for number, request in enumerate(requests()):
        mailboxes.append(Mailbox())
        scheduler.submit(request, mailboxes[-1], client=str(number))
    scheduler.start()
    answers = [mailbox.response() for mailbox in mailboxes]
    scheduler.stop()
    assert [answer.text for answer in answers] == alone
    assert set(sizes) == {1, 4} and sizes.count(4) > 10


def test_together_a_failed_pass_is_tried_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, answers, failed = LoadedBundle.load(bundle, "ort", threads=1), list[Response](), list[object]()

    def fails(seats: object) -> None:
        failed.append(seats)
        raise ZeroDivisionError("the pass fails")

    assert loaded._shared_rows is not None
    monkeypatch.setattr(loaded._shared_rows, "rows_together", fails)
    scheduler = Scheduler(loaded, queue_size=16)
    mailboxes = [Mailbox() for _ in range(8)]
    for number, mailbox in enumerate(mailboxes):
        scheduler.submit(GenerateRequest(prompt="a", seed=number, max_tokens=9), mailbox, client=str(number))
    scheduler.refuse_new()
    scheduler.run()
    answers = [mailbox.response() for mailbox in mailboxes]
    expected = [loaded.run(loaded.prepare(GenerateRequest(prompt="a", seed=n, max_tokens=9))).text for n in range(8)]
    assert [answer.text for answer in answers] == expected and failed


def test_together_few_requests_have_lanes_of_their_own(bundle: Path) -> None:
    """Of four requests in two lanes each lane has two, too few to share."""
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
    assert first is not None and second is not None and (len(first.batch), len(second.batch)) == (1, 1)


def test_together_a_damaged_graph_is_refused_at_load(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for part in bundle.iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    file = find_graph(folder, read_manifest(folder), "cpu", "step.shared").file
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    with pytest.raises(BundleError, match="does not match its manifest"):
        LoadedBundle.load(folder, "ort")
