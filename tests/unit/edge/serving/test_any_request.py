"""Blocks under requests that nobody would think of, by the real graphs of a random network: whatever is asked, drafts
change no text, snapshots grow into the answer, stop strings end it, and company, cancels and deadlines leave no trace.
"""

import random
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Snapshot
from edge.serving.scheduler import Scheduler
from shared.errors import RequestError
from shared.messages import Gap, GenerateRequest, Reply, Response

PIECES = ("a", "b", " ", "  ", "\n", "é", "€", "😀", "\ufffd", "Once", "the ", ".", "<MASK>", "\u0301", "\x00", "░")


@pytest.fixture(scope="module")
def loaded(blocks_bundle: Path) -> LoadedBundle:
    return LoadedBundle.load(blocks_bundle, "ort", threads=4)


def some_text(rng: random.Random, most: int) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(most)))


def some_request(rng: random.Random) -> GenerateRequest:
    base = GenerateRequest(
        prompt=some_text(rng, 8),
        max_tokens=rng.choice([1, 2, 3, 5, 20, 40]),
        decode="blocks",
        seed=rng.randrange(2**53),
        temperature=rng.choice([0.0, 1e-40, 0.5, 1.0, 3.0, 10.0]),
        top_k=rng.choice([None, None, 1, 2, 64]),
        top_p=rng.choice([None, None, 1e-9, 0.1, 0.9]),
    )
    if rng.random() < 0.5:
        return base
    gaps = [Gap(rng.choice([None, 1, 2, 4, 9])) if rng.random() < 0.5 else some_text(rng, 5) for _ in range(5)]
    return replace(base, prompt=None, max_tokens=None, segments=gaps)


def followed(loaded: LoadedBundle, request: GenerateRequest) -> str:
    """The text, whose snapshots have grown into it."""
    snapshots: list[tuple[str, str | None]] = []

    def look(snapshot: Snapshot) -> None:
        text = snapshot.text()
        assert "".join(part.text for part in snapshot.parts() if not part.draft) == text or request.prompt is None
        snapshots.append((text, snapshot.appended()))

    text = loaded.run(loaded.prepare(request), look).text
    if request.prompt is not None:
        grown = request.prompt
        for shown, appended in snapshots:
            grown += appended or ""
            assert text.startswith(shown) and text.startswith(grown), (request, shown, grown, text)
    return text


def keeps_what_was_given(request: GenerateRequest, text: str) -> bool:
    at = 0
    for given in [request.prompt or ""] if request.segments is None else request.segments:
        if isinstance(given, str):
            if (found := text.find(given, at)) < 0:
                return False
            at = found + len(given)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_request_of_any_kind_has_one_text_whatever_its_window_and_keeps_what_was_given(
    loaded: LoadedBundle, seed: int
) -> None:
    rng, served = random.Random(seed), 0
    for _ in range(40):
        request = some_request(rng)
        try:
            text = followed(loaded, replace(request, window=0))
        except RequestError:  # no gap, or no room
            continue
        served += 1
        assert keeps_what_was_given(request, text)
        assert {followed(loaded, replace(request, window=window)) for window in (1, 2, 3)} == {text}, request
        written = text if request.prompt is None else text[len(request.prompt) :]
        if len(written) < 2:
            continue
        starts = [rng.randrange(len(written)) for _ in range(3)]
        stops = [written[start : start + rng.choice([1, 2, 3, 8])] for start in starts]
        stopped = {followed(loaded, replace(request, window=window, stop=stops)) for window in (0, 1, 3)}
        assert len(stopped) == 1, (request, stops, stopped)
        assert keeps_what_was_given(request, stopped.pop())
    assert served > 20


@pytest.mark.slow
def test_request_of_any_kind_is_answered_once_as_if_alone_among_cancels_and_deadlines(loaded: LoadedBundle) -> None:
    """Requests join and leave for five seconds; in the end every slot is free."""
    rng = random.Random(1)
    asked = [replace(some_request(rng), stream=True, segments=None, prompt="abc" * (1 + n % 5)) for n in range(16)]
    asked += [GenerateRequest(segments=["abc ", Gap(None), "d", Gap(2), "."], seed=n, stream=True) for n in range(4)]
    asked += [GenerateRequest(prompt="abc", steps=4, max_tokens=20, seed=n, stream=True) for n in range(4)]
    alone = [loaded.run(loaded.prepare(request)).text for request in asked]
    scheduler, heard = Scheduler(loaded, queue_size=64), list[list[Reply]]()
    scheduler.start()
    end_s = time.monotonic() + 5
    wrong: list[str | None] = []

    def submit(number: int) -> None:
        replies: list[Reply] = []
        heard.append(replies)
        leaves_after = rng.choice([None, None, None, 1, 3])
        deadline_ms = rng.choice([None, None, None, 1, 10])

        def reply(message: Reply) -> None:
            replies.append(message)
            if isinstance(message, Response) and message.error is None and message.text != alone[number]:
                wrong.append(message.text)

        scheduler.submit(
            replace(asked[number], deadline_ms=deadline_ms),
            reply,
            gone=lambda: leaves_after is not None and len(replies) >= leaves_after,
            client=f"client {rng.randrange(5)}",
            alone=rng.random() < 0.02,
        )

    while time.monotonic() < end_s:
        if sum(not any(isinstance(one, Response) for one in replies) for replies in heard[-200:]) < 30:
            submit(rng.randrange(len(asked)))
        else:
            time.sleep(0.002)
    scheduler.refuse_new()
    give_up_s = time.monotonic() + 60
    while scheduler.busy and time.monotonic() < give_up_s:
        time.sleep(0.01)
    scheduler.stop()
    assert wrong == []
    assert all(sum(isinstance(one, Response) for one in replies) == 1 for replies in heard)
    assert all(isinstance(replies[-1], Response) for replies in heard)
    codes = {r[-1].error.code if r[-1].error else "ok" for r in heard if isinstance(r[-1], Response)}
    assert {"ok", "cancelled", "timeout"} <= codes <= {"ok", "cancelled", "timeout", "queue_full"}
    assert loaded._slots is not None
    with loaded._slots._pool as pool:
        assert sorted(pool.free) == list(range(len(pool.made))) and not pool.held
