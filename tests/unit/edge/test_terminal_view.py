"""The live view: in place on a terminal, a few plain lines elsewhere."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress

import pyte
import pytest

from edge.terminal_view import View, dimmed, laid_out, printable, wrap
from shared.messages import Part, Partial


def snapshot(step: int, text: str, steps: int = 64) -> Partial:
    parts = [Part(piece, "░" in piece) for piece in re.split("(░+)", text) if piece]
    return Partial(id=None, seq=step, step=step, steps=steps, text=text, masked=text.count("░"), parts=parts)


class Terminal:
    """A terminal emulator at the other end of a pseudo-terminal, so that tests see what a reader sees."""

    def __init__(self, columns: int, rows: int) -> None:
        self._leader, follower = pty.openpty()
        os.set_blocking(self._leader, False)
        self.out = os.fdopen(follower, "w", encoding="utf-8")
        self._screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.Stream(self._screen)
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.out, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if rows:
            self.lines()  # what was written before was laid out in the size of then
            self._screen.resize(rows, columns)

    def lines(self) -> list[str]:
        """Everything on the screen and scrolled off its top, without empty lines at the end."""
        self.out.flush()
        with suppress(BlockingIOError):
            while data := os.read(self._leader, 65536):
                self._stream.feed(data.decode())
        scrolled = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*scrolled, *self._screen.display]).rstrip().split("\n")

    @property
    def cursor_shown(self) -> bool:
        return not self._screen.cursor.hidden

    @property
    def wraps(self) -> bool:
        return pyte.modes.DECAWM in self._screen.mode

    def close(self) -> None:
        self.out.close()
        os.close(self._leader)


@pytest.fixture
def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Terminal]]:
    """Terminals of so many columns and rows."""
    monkeypatch.setenv("TERM", "xterm")
    terminals: list[Terminal] = []

    def make(columns: int, rows: int) -> Terminal:
        terminals.append(Terminal(columns, rows))
        return terminals[-1]

    yield make
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def terminal(make_terminal: Callable[[int, int], Terminal]) -> Terminal:
    return make_terminal(20, 6)


def test_view_on_a_terminal_shows_the_newest_canvas_alone(terminal: Terminal) -> None:
    view = View(terminal.out)
    view.show(snapshot(1, "Once upon a time ░░░ ░░"))
    view.show(snapshot(2, "Once upon a time the ░░"))
    lines = terminal.lines()
    assert lines[:2] == ["Once upon a time the", "░░"]
    assert lines[2].startswith("step 2/64, 2 open") and len(lines) == 3
    assert not terminal.cursor_shown


def test_view_cuts_a_canvas_higher_than_the_terminal(terminal: Terminal) -> None:
    view = View(terminal.out)
    view.show(snapshot(1, "word " * 100))
    view.show(snapshot(2, "word " * 100))
    lines = terminal.lines()
    assert len(lines) == 5 and lines[4].startswith("step 2/64")


LONG = "Title " + "once upon a time " * 60


def test_view_leaves_no_copies_on_a_terminal_without_a_size(make_terminal: Callable[[int, int], Terminal]) -> None:
    terminal = make_terminal(80, 8)
    terminal.resize(0, 0)  # as in a container or on a serial line: the terminal has its 80 × 8 and does not say so
    with View(terminal.out) as view:
        for step in range(1, 33):
            view.show(snapshot(step, LONG, steps=32))
            terminal.lines()  # a pseudo-terminal that nobody reads is soon full
    shown = terminal.lines()
    assert shown[0].startswith("step 1/32, 0 open: Title once")
    assert not any(line.startswith("Title") for line in shown)


def test_view_clears_the_canvas_and_shows_the_cursor_when_left(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), View(terminal.out) as view:
        view.show(snapshot(1, "Once ░"))
        raise KeyboardInterrupt
    assert terminal.lines() == [""] and terminal.cursor_shown and terminal.wraps


def test_view_without_a_terminal_writes_a_few_plain_lines() -> None:
    out = io.StringIO()
    with View(out) as view:
        for step in range(1, 65):
            view.show(snapshot(step, "Once\nupon " + "░" * (64 - step)))

    lines = out.getvalue().splitlines()
    assert 4 <= len(lines) <= 9
    assert lines[0] == "step 1/64, 63 open: Once upon " + "░" * 63
    assert "\x1b" not in out.getvalue()


def test_view_on_a_dumb_terminal_writes_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    View(terminal.out).show(snapshot(1, "Once ░"))
    assert terminal.lines() == ["step 1/64, 1 open: O", "nce ░"]


def test_dimmed_drafts_are_dim_whatever_the_wrapping_leaves_out() -> None:
    parts = [Part("Once upon  a "), Part("time\tthere", draft=True), Part(" was\n\nan "), Part("ox.", draft=True)]
    dim = "\x1b[2m{}\x1b[0m".format
    assert dimmed(parts, 12) == ["Once upon  a", dim("time there"), "was", "", f"an {dim('ox.')}"]
    assert dimmed(parts, 3)[:3] == ["Onc", "e u", "pon"]
    assert dimmed([Part("a\x1b[2J", draft=True)], 20) == [dim("a\ufffd[2J")]


def test_printable_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc\td\n") == "a\ufffd[2Jb\ufffd\ufffdc\td\n"


def test_wrap_breaks_between_words_and_keeps_line_breaks() -> None:
    assert wrap("one two three\n\nfour", 8) == ["one two", "three", "", "four"]
    assert wrap("░" * 10, 4) == ["░░░░", "░░░░", "░░"]


def test_laid_out_breaks_between_words_on_a_terminal_alone(terminal: Terminal) -> None:
    text = "Once upon a time there was \x1b[2Ja boy."
    assert laid_out(text, terminal.out) == "Once upon a time\nthere was \ufffd[2Ja boy."
    assert laid_out(text, io.StringIO()) == text
