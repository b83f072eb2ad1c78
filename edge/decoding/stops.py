"""Stop strings: what is written ends before the first of them."""

from collections.abc import Sequence


def stop_at(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string in a text begins; None without one."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string: the most, for the longest one."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
