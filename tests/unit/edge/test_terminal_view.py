"""The live view: in place on a terminal, a few plain lines elsewhere."""

import io
import os
import pty
import re
import termios
from collections.abc import Callable, Iterator

import pytest

from edge.terminal_view import View, dimmed, printable, wrap
from shared.messages import Part, Partial


def snapshot(step: int, text: str, steps: int = 64) -> Partial:
    parts = [Part(piece, "░" in piece) for piece in re.split("(░+)", text) if piece]
    return Partial(id=None, seq=step, step=step, steps=steps, text=text, masked=text.count("░"), parts=parts)


class Screen:
    """The little of a terminal that the view uses, so that tests see what a reader sees."""

    def __init__(self) -> None:
        self.lines = [""]
        self.cursor_shown = True
        self.clips = False

    def feed(self, data: str) -> None:
        for piece in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r?\n|[^\x1b\r\n]+", data):
            if up := re.fullmatch(r"\x1b\[(\d+)F", piece):
                self.lines = [*self.lines[: len(self.lines) - 1 - int(up[1])], ""]  # "erase below" follows at once
            elif piece.startswith("\x1b[?25"):
                self.cursor_shown = piece.endswith("h")
            elif piece.startswith("\x1b[?7"):
                self.clips = piece.endswith("l")
            elif piece.endswith("\n"):
                self.lines.append("")
            elif not piece.startswith("\x1b"):
                self.lines[-1] += piece


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[View, Callable[[], Screen]]]:
    """A view on a terminal of 20 columns and 6 rows, and what its screen shows."""
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (6, 20)) if hasattr(termios, "tcsetwinsize") else _set_size(follower)
    screen = Screen()

    def look() -> Screen:
        out.flush()
        os.set_blocking(leader, False)
        try:
            while data := os.read(leader, 65536):
                screen.feed(data.decode())
        except BlockingIOError:
            pass
        return screen

    with os.fdopen(follower, "w", encoding="utf-8") as out:
        yield View(out), look
    os.close(leader)


def _set_size(follower: int) -> None:
    """For Python 3.10, whose termios has no tcsetwinsize."""
    import fcntl
    import struct

    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 6, 20, 0, 0))


def test_a_terminal_shows_the_newest_canvas_alone(terminal: tuple[View, Callable[[], Screen]]) -> None:
    view, look = terminal
    view.show(snapshot(1, "Once upon a time ░░░ ░░"))
    view.show(snapshot(2, "Once upon a time the ░░"))

    screen = look()
    assert screen.lines[:2] == ["Once upon a time the", "░░"]
    assert screen.lines[2].startswith("step 2/64, 2 open")
    assert len(screen.lines) == 4 and not screen.cursor_shown


def test_a_canvas_higher_than_the_terminal_is_cut(terminal: tuple[View, Callable[[], Screen]]) -> None:
    view, look = terminal
    view.show(snapshot(1, "word " * 100))
    view.show(snapshot(2, "word " * 100))
    screen = look()
    assert len(screen.lines) == 6 and screen.lines[4].startswith("step 2/64")


def test_leaving_clears_the_canvas_and_brings_the_cursor_back(terminal: tuple[View, Callable[[], Screen]]) -> None:
    view, look = terminal
    with pytest.raises(KeyboardInterrupt), view:
        view.show(snapshot(1, "Once ░"))
        raise KeyboardInterrupt
    screen = look()
    assert screen.lines == [""] and screen.cursor_shown and not screen.clips


def test_without_a_terminal_a_few_plain_lines_are_written() -> None:
    out = io.StringIO()
    with View(out) as view:
        for step in range(1, 65):
            view.show(snapshot(step, "Once\nupon " + "░" * (64 - step)))

    lines = out.getvalue().splitlines()
    assert 4 <= len(lines) <= 9
    assert lines[0] == "step 1/64, 63 open: Once upon " + "░" * 63
    assert "\x1b" not in out.getvalue()


def test_drafts_are_dim_whatever_the_wrapping_leaves_out() -> None:
    parts = [Part("Once upon  a "), Part("time\tthere", draft=True), Part(" was\n\nan "), Part("ox.", draft=True)]
    dim = "\x1b[2m{}\x1b[0m".format
    assert dimmed(parts, 12) == ["Once upon  a", dim("time there"), "was", "", f"an {dim('ox.')}"]
    assert dimmed(parts, 3)[:3] == ["Onc", "e u", "pon"]
    assert dimmed([Part("a\x1b[2J", draft=True)], 20) == [dim("a\ufffd[2J")]


def test_a_dumb_terminal_gets_plain_lines(
    terminal: tuple[View, Callable[[], Screen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    view, look = terminal
    plain = View(view._out)
    plain.show(snapshot(1, "Once ░"))
    assert look().lines[0] == "step 1/64, 1 open: Once ░"


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc\td\n") == "a\ufffd[2Jb\ufffd\ufffdc\td\n"


def test_words_wrap_and_line_breaks_stay() -> None:
    assert wrap("one two three\n\nfour", 8) == ["one two", "three", "", "four"]
    assert wrap("░" * 10, 4) == ["░░░░", "░░░░", "░░"]
