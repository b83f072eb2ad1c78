"""Stop strings: what is written ends before the first of them that is whole."""

from collections.abc import Sequence


def stop_at(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is whole first, of two that end there the longer; None without one.

    However much of the text comes at a time, it is the same one.
    """
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(ends)[1] if ends else None


def begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string: the most, for the longest one."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
