"""Many requests share passes of a CPU, whatever their lengths and laws, and no text shows it."""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge.backends.ort_rows import OrtRows
from edge.backends.ort_shared import _Table
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Run
from edge.serving.scheduler import Scheduler
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from shared.errors import BundleError
from shared.manifest import SamplingDefaults, find_graph, read_manifest
from shared.messages import Gap, GenerateRequest
from shared.metrics import Metrics
from tests.support.altered_bundle import with_graph
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
    assert set(sizes) == {1, 4} and sizes.count(4) > 10


def adding(table: list[float] | list[list[float]]) -> Callable[[onnx.ModelProto], None]:
    """To each row's scores what a table has for the first request's position; behind its end the graph fails."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if "scores" in node.output)
        node.output[0] = "scores.before"
        at = list(model.graph.node).index(node) + 1
        model.graph.node.insert(at, onnx.helper.make_node("Gather", ["table", "last.0"], ["added"]))
        model.graph.node.insert(at + 1, onnx.helper.make_node("Add", ["scores.before", "added"], ["scores"]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(table, np.float32), "table"))

    return change


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


@pytest.mark.parametrize("threads", [1, 2])
def test_together_a_graph_that_fails_later_is_used_no_more(
    bundle: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing fails but the pass; its requests, and all later ones, go on side by side, each in passes of its own."""
    folder = with_graph(bundle, tmp_path / "b", "step.shared", adding([0.0] * 20))
    loaded, under_way, sizes = LoadedBundle.load(folder, "ort", threads=threads), set[int](), list[int]()
    assert loaded.degraded is None
    asked = [GenerateRequest(prompt="a", seed=n, max_tokens=40, decode="blocks") for n in range(16)]
    alone, step = [loaded.run(loaded.prepare(request)).text for request in asked], loaded.step

    def counted(runs: list[Run], share: int = 1) -> None:
        sizes.append(len(runs))
        under_way.add(share)
        step(runs, share)

    monkeypatch.setattr(loaded, "step", counted)
    texts, metrics = answers_of(loaded, asked)
    assert texts == alone
    assert sizes.count(4) > 1 and sizes[-50:] == [1] * 50 and max(under_way) >= 8
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelname == "WARNING" and "run" in traceback_of(record)
    assert "step.shared.cpu.int8.onnx cannot be used" in record.message and "export the bundle again" in record.message
    assert (metrics.state, metrics.failure, metrics.answered) == ("degraded", record.message, {"ok": 16})
    assert isinstance(loaded.rows, OrtRows) and not [role for role, _ in loaded.rows._graphs.sizes() if "." in role]


def traceback_of(record: logging.LogRecord) -> list[str]:
    """The functions that a record's exception came through."""
    assert record.exc_info is not None
    return [frame.name for frame in traceback.extract_tb(record.exc_info[2])]


@pytest.mark.parametrize("threads", [1, 2])
def test_together_a_fault_beside_the_graph_is_told_as_itself(
    bundle: Path, threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise TypeError("no such law")

    monkeypatch.setattr("edge.decoding.together.draw", broken)
    loaded = LoadedBundle.load(bundle, "ort", threads=threads)
    alone = [loaded.run(loaded.prepare(request)).text for request in requests()]
    texts, metrics = answers_of(loaded, requests())
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert texts == alone
    assert (metrics.state, metrics.failure) == ("degraded", record.message)
    assert "(TypeError: no such law)" in record.message and "until the daemon starts again" in record.message
    assert "onnx" not in record.message and traceback_of(record)[-1] == "broken"


def nothing(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (adding([0.0]), "it does not run: RuntimeError: "),
        (nothing, "has other inputs and outputs than a graph of its kind: no output drafts)"),
    ],
    ids=["fails", "names"],
)
def test_together_a_graph_that_cannot_be_used_is_found_at_load(
    bundle: Path,
    tmp_path: Path,
    change: Callable[[onnx.ModelProto], None],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = LoadedBundle.load(with_graph(bundle, tmp_path / "b", "step.shared", change), "ort", threads=1)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert why in warning and "step.shared.cpu.int8.onnx cannot be used" in warning
    texts, metrics = answers_of(loaded, requests()[:8])
    assert texts == [loaded.run(loaded.prepare(request)).text for request in requests()[:8]]
    assert (metrics.state, metrics.failure) == ("degraded", warning)
    assert len([record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]) == 1


def test_together_a_graph_that_scores_otherwise_by_a_bit_is_left_alone(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As it may on another processor: the texts are those of each request by itself, and nothing is degraded."""
    caplog.set_level("INFO", logger="edge")
    other = [0.0] * (read_manifest(bundle).model.vocab_size - 1) + [9.0]  # of one token: the texts would be others
    folder = with_graph(bundle, tmp_path / "b", "step.shared", adding([other] * 300))
    loaded = LoadedBundle.load(folder, "ort", threads=1)
    (told,) = [record for record in caplog.records if "step.shared" in record.message]
    assert told.levelname == "INFO" and "of 4 requests, 4 score otherwise than by themselves" in told.message
    texts, metrics = answers_of(loaded, requests()[:8])
    assert texts == [loaded.run(loaded.prepare(request)).text for request in requests()[:8]]
    assert (metrics.state, metrics.failure, loaded.alone) == ("idle", None, told.message)
    assert isinstance(loaded.rows, OrtRows) and loaded.rows.batches == (1,)
    assert ("step.shared", 1) not in loaded.rows._graphs.sizes()


def test_together_a_graph_that_does_not_write_the_caches_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    def silent(model: onnx.ModelProto) -> None:
        """Keys of the first layer as they were."""
        node = next(node for node in model.graph.node if "new_keys.0.0" in node.output)
        node.output[list(node.output).index("new_keys.0.0")] = "written"
        model.graph.node.append(onnx.helper.make_node("Identity", ["keys.0.0"], ["new_keys.0.0"]))

    folder = with_graph(bundle, tmp_path / "b", "step.shared", silent)
    loaded = LoadedBundle.load(folder, "ort", threads=1)
    assert loaded.alone is not None and "of 4 requests, 1 score otherwise" in loaded.alone


def test_together_a_lane_whose_pass_had_begun_leaves_the_graph_closed(bundle: Path) -> None:
    rows = OrtRows(bundle, read_manifest(bundle), threads=1)
    rows.share_no_more(ValueError("first"))
    rows.seat([rows.open_slot() for _ in range(4)])
    rows.share_no_more(ValueError("of the lane that was late"))
    assert ("step.shared", 1) not in rows._graphs.sizes() and rows.batches == (1,)


@pytest.mark.parametrize(("threads", "opened"), [(1, True), (2, True), (3, False), (4, False)])
def test_together_the_graph_is_open_where_a_lane_has_four_of_eight(bundle: Path, threads: int, opened: bool) -> None:
    rows = OrtRows(bundle, read_manifest(bundle), threads)
    assert (("step.shared", 1) in rows._graphs.sizes()) is opened
    assert rows.batches == ((1, 4) if opened else (1,)) and rows.degraded is None


def test_together_two_fours_in_turn_are_bound_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, bound = OrtRows(bundle, read_manifest(bundle), threads=1), list[str]()
    slots, bind = [rows.open_slot() for _ in range(8)], _Table._bind
    fours = slots[:4], [slots[i] for i in (6, 4, 7, 5)]

    def counted(table: _Table, name: str, array: Any, output: bool = False) -> None:
        bound.append(name)
        bind(table, name, array, output)

    for four in fours:
        rows.seat(four)
    monkeypatch.setattr(_Table, "_bind", counted)
    for _ in range(3):
        for four in fours:
            assert [four[i] for i in rows.seat(four).order] in (four, four[::-1])
    assert bound == []
    rows.seat([*slots[:3], slots[7]])
    assert {name.split(".")[-1] for name in bound} == {"0"}  # one slot, at the place of the one that left


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


@pytest.mark.parametrize("threads", [2, 4])
def test_together_a_damaged_graph_is_refused_at_load(bundle: Path, tmp_path: Path, threads: int) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for part in bundle.iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    file = find_graph(folder, read_manifest(folder), "cpu", "step.shared").file
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    with pytest.raises(BundleError, match="does not match its manifest"):
        LoadedBundle.load(folder, "ort", threads=threads)


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
