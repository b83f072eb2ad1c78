"""Blocks in the scheduler: places for keys and values, and the same text in any company."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge.backends import Chosen
from edge.backends.fake import FakeBackend
from edge.decoding.blocks import Slot, Writing, advance
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Snapshot, whole_characters
from edge.serving.scheduler import Scheduler
from edge.serving.slots import Slots
from edge.transports.mqtt.status import info
from shared.errors import ConfigError, RequestError
from shared.manifest import Decoder, read_manifest
from shared.messages import Gap, GenerateRequest, Part, Partial
from tests.support.mailbox import submit

PROMPT = GenerateRequest(prompt="abc", max_tokens=40, seed=5)
GAPS = GenerateRequest(segments=["abc ", Gap(None), " d ", Gap(7), "."], seed=6)


@pytest.fixture(scope="module", params=["ort", "fake"])
def loaded(request: pytest.FixtureRequest, blocks_bundle: Path) -> LoadedBundle:
    return LoadedBundle.load(blocks_bundle, request.param, threads=2)


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.2])
@pytest.mark.parametrize("base", [PROMPT, GAPS], ids=["prompt", "gaps"])
def test_blocks_text_does_not_depend_on_the_window(
    loaded: LoadedBundle, base: GenerateRequest, temperature: float
) -> None:
    texts = []
    for window in (0, 1, 3):
        plan = loaded.prepare(replace(base, window=window, temperature=temperature))
        completion = loaded.run(plan)
        texts.append((completion.text, completion.canvas.tolist()))
    assert texts[0] == texts[1] == texts[2]


def test_blocks_drafts_that_hold_save_passes(blocks_bundle: Path) -> None:
    fake = LoadedBundle.load(blocks_bundle, "fake")
    steps = {
        window: fake.run(fake.prepare(GenerateRequest(prompt="abc", max_tokens=41, seed=5, window=window))).steps
        for window in (0, 3)
    }
    assert steps == {0: 41, 3: 11}


def test_blocks_of_more_requests_than_slots_are_those_of_each_alone(loaded: LoadedBundle) -> None:
    requests = [GenerateRequest(prompt="abc" * (1 + n % 3), max_tokens=20, seed=n) for n in range(20)]
    alone = [loaded.run(loaded.prepare(request)).text for request in requests]
    scheduler = Scheduler(loaded, queue_size=32)
    boxes = [submit(scheduler, prompt=r.prompt, max_tokens=20, seed=r.seed, client=str(r.seed)) for r in requests]
    scheduler.start()
    assert [box.response().text for box in boxes] == alone
    scheduler.refuse_new()
    scheduler.stop()


def test_blocks_snapshots_add_up_to_the_text(loaded: LoadedBundle) -> None:
    scheduler = Scheduler(loaded, queue_size=2)
    box = submit(scheduler, prompt="abc", max_tokens=40, seed=3, stream=True)
    scheduler.refuse_new()
    scheduler.run()
    text = box.response().text
    grown = "abc" + "".join(reply.appended or "" for reply in box.replies if isinstance(reply, Partial))
    assert text is not None and text.startswith(grown)


@pytest.mark.parametrize("prompt", ["abc\ufffd", "\ufffd", "abc ", "Zo\u00eb"])
def test_blocks_appended_after_any_prompt_adds_up_to_the_text(loaded: LoadedBundle, prompt: str) -> None:
    for seed in range(20):
        grown = [prompt]

        def grow(snapshot: Snapshot, grown: list[str] = grown) -> None:
            grown.append(snapshot.appended() or "")

        request = GenerateRequest(prompt=prompt, max_tokens=20, seed=seed, temperature=10.0)
        assert loaded.run(loaded.prepare(request), grow).text.startswith("".join(grown)) and len(grown) > 2


@pytest.mark.parametrize("base", [PROMPT, replace(PROMPT, decode="canvas"), GAPS], ids=["blocks", "canvas", "gaps"])
def test_stop_ends_what_is_written_before_its_first_string(loaded: LoadedBundle, base: GenerateRequest) -> None:
    for seed in range(8):
        request = replace(base, seed=seed)
        whole = loaded.run(loaded.prepare(request))
        given = "abc" if request.prompt is not None else "abc "
        written = whole.text.removeprefix(given)
        for size in (1, 2, 5):
            stop = written[6 : 6 + size]
            cut = loaded.run(loaded.prepare(replace(request, stop=["never seen", stop])))
            if request.prompt is not None:
                assert cut.text == given + written[: written.index(stop)] and not cut.full
                assert cut.steps <= whole.steps and cut.generated_tokens <= whole.generated_tokens
            assert stop not in cut.text.removeprefix(given) or request.prompt is None


def test_stop_spares_the_passes_after_it(blocks_bundle: Path) -> None:
    fake = LoadedBundle.load(blocks_bundle, "fake")
    whole = fake.run(fake.prepare(PROMPT))
    cut = fake.run(fake.prepare(replace(PROMPT, stop=[whole.text[8:10]])))
    assert cut.steps < whole.steps


class Loop:
    """A backend that keeps the loop to itself, as one on a GPU does."""

    lanes = 1
    fills_gaps = True

    def __init__(self, rows: FakeBackend) -> None:
        self.batches: tuple[int, ...] = (1, 2, 4, 8)
        self.failure: str | None = None
        self._rows, self.depth = rows, rows.depth

    def open_slot(self) -> Slot:
        return self._rows.open_slot()

    def advance(self, writings: Sequence[Writing]) -> None:
        for writing in writings:
            advance(self._rows, writing)

    def close(self) -> None:
        """Nothing to free."""


def test_stop_ends_a_text_on_a_gpu_as_early_as_on_a_cpu(blocks_bundle: Path) -> None:
    fake = LoadedBundle.load(blocks_bundle, "fake")
    assert isinstance(fake.rows, FakeBackend)
    chosen = Chosen(fake.backend, "trt", None, Loop(FakeBackend(fake.manifest)))
    on_gpu = LoadedBundle(blocks_bundle, fake.manifest, chosen, fake._texts)
    whole = fake.run(fake.prepare(PROMPT))
    request = replace(PROMPT, stop=[whole.text[8:10]])
    cut, found = (bundle.run(bundle.prepare(request)) for bundle in (fake, on_gpu))
    assert (found.text, found.steps) == (cut.text, cut.steps) and found.steps < whole.steps


def test_stop_does_not_depend_on_the_window(blocks_bundle: Path) -> None:
    """One stop string lies within another: a pass of one token sees it whole first, one of four tokens both at once."""
    fake = LoadedBundle.load(blocks_bundle, "fake")  # all its drafts hold
    text = fake.run(fake.prepare(PROMPT)).text
    for first in range(4, 20):
        request = replace(PROMPT, stop=[text[first : first + 4], text[first + 1 : first + 2]])
        texts = {fake.run(fake.prepare(replace(request, window=window))).text for window in range(4)}
        assert len(texts) == 1, texts


@pytest.mark.parametrize("decode", ["blocks", "canvas"])
def test_stop_is_never_shown_in_part(loaded: LoadedBundle, decode: Decoder) -> None:
    """A snapshot holds back what may become a stop string; all that was appended is a beginning of the answer."""
    for seed in range(12):
        request = replace(PROMPT, decode=decode, seed=seed)
        text = loaded.run(loaded.prepare(request)).text
        request = replace(request, stop=[text[9:14], text[12:16]])
        shown: list[str] = []
        appended: list[str] = []

        def look(snapshot: Snapshot, shown: list[str] = shown, appended: list[str] = appended) -> None:
            shown.append(snapshot.text().partition("░")[0])
            appended.append(snapshot.appended() or "")

        done = loaded.run(loaded.prepare(request), look).text
        assert all(done.startswith(early) for early in shown), (shown, done)
        assert done.startswith("abc" + "".join(appended))


def test_blocks_scores_that_are_not_numbers_fail_the_request(blocks_bundle: Path) -> None:
    fake = LoadedBundle.load(blocks_bundle, "fake")
    assert isinstance(fake.rows, FakeBackend)
    fake.rows._logp = np.full_like(fake.rows._logp, np.nan)
    with pytest.raises(RuntimeError, match="not numbers"):
        fake.run(fake.prepare(GenerateRequest(prompt="abc", seed=1)))


def test_slots_are_bounded_and_come_back(loaded: LoadedBundle) -> None:
    assert loaded.rows is not None
    slots = Slots(loaded.rows, most=2)
    first, second = slots.take("a"), slots.take("b")
    assert first is not None and second is not None and slots.take("c") is None
    first.cached = 7
    slots.give_back(first, "a")
    assert slots.take("c") is first and first.cached == 0


@pytest.mark.parametrize(("lanes", "share"), [(1, 4), (4, 4), (6, 6), (8, 7), (16, 7)])
def test_slots_of_one_client_are_never_all(blocks_bundle: Path, lanes: int, share: int) -> None:
    backend = FakeBackend(read_manifest(blocks_bundle))
    backend.lanes = lanes
    slots = Slots(backend, most=8)
    held = [slot for _ in range(8) if (slot := slots.take("greedy")) is not None]
    assert len(held) == share and slots.take("other") is not None
    slots.give_back(held[0], "greedy")
    assert slots.take("greedy") is not None and slots.take("greedy") is None


def test_slots_leave_room_for_a_client_that_comes_later(loaded: LoadedBundle) -> None:
    """Eight long requests of one client are under way; the first of another is not answered after all of them."""
    scheduler, order = Scheduler(loaded, queue_size=16), list[str]()
    for number in range(9):
        client = "late" if number == 8 else "greedy"
        request = GenerateRequest(prompt="abc", seed=number, max_tokens=8 if number == 8 else 40)
        scheduler.submit(request, partial(lambda client, _: order.append(client), client), client=client)
    scheduler.refuse_new()
    scheduler.run()
    assert sorted(order) == ["greedy"] * 8 + ["late"] and order[0] == "late"


def test_decoder_a_bundle_has_not_is_refused(debug_bundle: Path) -> None:
    by_canvas = LoadedBundle.load(debug_bundle, "fake")
    with pytest.raises(RequestError, match="`decode` asks for blocks; this bundle on this device has canvas alone"):
        by_canvas.prepare(GenerateRequest(prompt="abc", decode="blocks"))


def test_window_above_the_bundle_is_refused(loaded: LoadedBundle) -> None:
    with pytest.raises(RequestError, match="`window` 4 is above the bundle's 3"):
        loaded.prepare(GenerateRequest(prompt="abc", window=4))


def test_decoder_follows_from_a_field_of_its_own(loaded: LoadedBundle) -> None:
    steps = loaded.run(loaded.prepare(GenerateRequest(prompt="abc", steps=4, selection="random", max_tokens=30))).steps
    assert steps <= 5


def test_whole_characters_leaves_out_halves() -> None:
    half = "\N{REPLACEMENT CHARACTER}"
    assert whole_characters([Part(f"Zo{half}"), Part(f"{half} and", draft=True)]) == [Part("Zo"), Part(" and", True)]


@pytest.mark.parametrize("decode", ["blocks", "canvas"])
def test_top_p_next_to_nothing_takes_the_likeliest(blocks_bundle: Path, decode: Decoder) -> None:
    by_ort = LoadedBundle.load(blocks_bundle, "ort", threads=1)
    base = GenerateRequest(prompt="abc", max_tokens=20, decode=decode, seed=1)
    texts = [by_ort.run(by_ort.prepare(r)).text for r in (replace(base, top_k=1), replace(base, top_p=5e-324))]
    assert texts[0] == texts[1]


def test_info_of_a_device_without_blocks_has_no_window(loaded: LoadedBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    health = Scheduler(loaded, queue_size=1).health()
    assert info(health, loaded, 1).limits.window == 3
    monkeypatch.setattr(loaded, "rows", None)
    told = info(health, loaded, 1)
    assert (told.decoders, told.limits.window) == (["canvas"], 0)
    with pytest.raises(RequestError, match="asks for blocks; this bundle on this device has canvas alone"):
        loaded.prepare(GenerateRequest(prompt="abc", window=1))


def test_trt_of_a_bundle_without_graphs_for_cuda_is_refused(blocks_alone: Path) -> None:
    with pytest.raises(ConfigError, match=r"bundle .* has no graph for CUDA that the backend 'trt' could run"):
        LoadedBundle.load(blocks_alone, "trt")
