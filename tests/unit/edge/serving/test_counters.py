"""What is counted: times in buckets, the last minute, tokens, passes and drafts."""

from edge.serving.counters import BOUNDS_S, MINUTE_S, Counters, LastMinute, Served, Times
from shared.metrics import Decoded, Drafts


def served(**fields: object) -> Served:
    given = {"decoder": "blocks", "prompt_tokens": 3, "tokens": 10, "passes": 4, "first_token_s": 0.1, "total_s": 1.0}
    return Served(**(given | fields))  # type: ignore[arg-type]


def test_times_belong_to_the_bucket_that_ends_with_them() -> None:
    times = Times()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, BOUNDS_S[-1], 1e6):
        times.add(seconds)
    found = times.histogram()
    assert found.bounds_s == BOUNDS_S and len(found.counts) == len(BOUNDS_S) + 1
    assert (found.counts[0], found.counts[1], found.counts[-2], found.counts[-1]) == (2, 1, 1, 1)
    assert abs(found.sum_s - (BOUNDS_S[0] * 2.01 + BOUNDS_S[-1] + 1e6)) < 1e-5


def test_last_minute_forgets_what_is_older() -> None:
    minute = LastMinute()
    minute.add(1000.2, 5)
    minute.add(1030.9, 7)
    assert minute.total(1030.9) == 12
    assert minute.total(1000 + MINUTE_S - 0.1) == 12
    assert minute.total(1000 + MINUTE_S) == 7
    assert minute.total(1030 + MINUTE_S) == 0
    minute.add(50_000.0, 3)
    assert minute.total(50_000.5) == 3


def test_counters_add_up_what_was_served() -> None:
    counters = Counters()
    counters.add(served(), now_s=10.0)
    counters.add(served(decoder="canvas", tokens=64, passes=64), now_s=11.0)
    counters.add(served(tokens=14, passes=6), now_s=12.0)
    assert (counters.prompt_tokens, counters.tokens) == (9, 88)
    assert counters.recent_tokens.total(12.0) == 88
    assert counters.decoded() == {"blocks": Decoded(24, 10, 2.4), "canvas": Decoded(64, 64, 1.0)}
    assert sum(counters.latency.histogram().counts) == sum(counters.first_token.histogram().counts) == 3


def test_counters_an_empty_text_has_no_tokens_a_pass() -> None:
    counters = Counters()
    counters.add(served(tokens=0, passes=0), now_s=1.0)
    assert counters.decoded() == {"blocks": Decoded(0, 0, None)}


def test_counters_tell_drafts_by_depth() -> None:
    """Three passes held 3 drafts and one held 1; two kept none, one kept 2, one kept 1."""
    counters = Counters()
    counters.add(served(tried=(2, 1, 0, 3), kept=(4, 1, 1, 0)), now_s=1.0)
    assert counters.drafts() == [Drafts(1, 4, 2), Drafts(2, 3, 1), Drafts(3, 3, 0)]
    assert Counters().drafts() == []
