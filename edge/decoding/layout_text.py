"""Between a request's text and the canvas: tokens in, text out."""

from dataclasses import dataclass
from itertools import dropwhile, groupby
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.decoding.stops import begun, stop_at
from shared.errors import RequestError
from shared.messages import OPEN_POSITION, Gap, GenerateRequest, Part
from shared.tokens import BOS, FIRST_TEXT_ID, MASK, PAD, words_go_on

HALF: Final = "\N{REPLACEMENT CHARACTER}"
"""What stands for bytes that are no whole character yet."""
GAP_OF_CANVAS: Final = 4
GAP_OF_BLOCKS: Final = 16
"""Tokens of a gap that names no size: a canvas fills all of them, blocks end it where they like."""


@dataclass(frozen=True)
class Layout:
    """The positions of a request's segments on the canvas.

    parts: text to repeat verbatim, or the (first, end) positions of a gap. prompt_tokens: how many are given.
    open_end: it is a prompt, with one gap at its end. stops: what is written in each gap ends before the first of them.
    """

    canvas: NDArray[np.int32]  # (L,)
    fill: NDArray[np.bool_]  # (L,) positions the request asks for
    parts: tuple[str | tuple[int, int], ...]
    prompt_tokens: int
    open_end: bool
    stops: tuple[str, ...] = ()


class Texts:
    """Lays requests out on canvases of one bundle, and reads canvases back."""

    def __init__(self, tokenizer: Tokenizer, canvas_len: int) -> None:
        tokenizer.encode_special_tokens = True  # "<MASK>" in a prompt is seven characters, not a control token
        self._tokenizer = tokenizer
        self._canvas_len = canvas_len
        # Byte-level BPE: a token's name has one character for each of its bytes.
        vocab = tokenizer.get_vocab()
        self._most_bytes = canvas_len * max(map(len, vocab))
        self.go_on: Final = words_go_on(vocab)

    def lay_out(self, request: GenerateRequest, gap: int = GAP_OF_CANVAS) -> Layout:
        """The canvas of a request: tokens of the given text, MASK in the gaps and in the open end.
        gap: the size of gaps that name none.

        The open end of a prompt has `max_tokens` positions, or all that are left. PAD follows it: the text ends there
        at the latest. After the last segment of an infill the canvas is MASK, too, but not filled.
        Raises RequestError: `too_large` when it does not fit, `bad_request` when there is nothing to fill.
        """
        segments: list[str | Gap] = list(request.segments or []) if request.prompt is None else [request.prompt]
        open_end = request.prompt is not None
        if not open_end and request.max_tokens is not None:
            raise RequestError("bad_request", "`max_tokens` goes with `prompt`: the gaps of `segments` have a length")
        if not open_end and not any(isinstance(s, Gap) for s in segments):
            raise RequestError("bad_request", '`segments` has no gap to fill: add one as {"gap": 4}, or use `prompt`')
        given_bytes = sum(len(s.encode()) for s in segments if isinstance(s, str))
        if given_bytes > self._most_bytes:  # before tokenizing, which would delay other requests
            message = f"{given_bytes} bytes of text cannot fit on the canvas, which holds {self._canvas_len} tokens"
            raise RequestError("too_large", message)
        ids, parts = [BOS], list[str | tuple[int, int]]()
        given = 0
        for i, segment in enumerate(segments):
            if isinstance(segment, Gap):
                size = segment.gap or gap
                parts.append((len(ids), len(ids) + size))
                ids += [MASK] * size
                continue
            before_gap = open_end or (i + 1 < len(segments) and isinstance(segments[i + 1], Gap))
            tokens = self._encode(segment, before_gap)
            given += len(tokens)
            ids += tokens
            parts.append(segment)
        room = self._canvas_len - len(ids)
        if room < int(open_end):
            what = "the prompt takes" if open_end else "the segments with their gaps take"
            fits = self._canvas_len - 1 - int(open_end)
            raise RequestError("too_large", f"{what} {len(ids) - 1} tokens; at most {fits} fit on the canvas")
        canvas = np.full(self._canvas_len, MASK, np.int32)
        canvas[: len(ids)] = ids
        fill = canvas == MASK
        if open_end:
            length = min(room, request.max_tokens or room)
            parts.append((len(ids), len(ids) + length))
            canvas[len(ids) + length :] = PAD
            fill = canvas == MASK
        else:
            fill[len(ids) :] = False
        return Layout(canvas, fill, tuple(parts), given, open_end, tuple(request.stop or ()))

    def _encode(self, text: str, before_gap: bool) -> list[int]:
        # A word's token brings its leading space, so a space before a gap belongs to the gap; `read` puts it back.
        if before_gap and text.endswith(" ") and text.strip(" "):
            text = text[:-1]
        encoded: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    def word(self, word: str) -> tuple[int, ...]:
        """The tokens of a word as it stands within a text: with a space before it, in small letters as in training."""
        return tuple(self._tokenizer.encode(f" {word.lower()}", add_special_tokens=False).ids)

    def read(self, layout: Layout, canvas: NDArray[np.int32]) -> str:
        """The text of a canvas: given text verbatim, filled gaps decoded, open positions as OPEN_POSITION."""
        return "".join(part.text for part in self.parts(layout, canvas, canvas))

    def parts(self, layout: Layout, canvas: NDArray[np.int32], draft: NDArray[np.int32]) -> list[Part]:
        """The same with what `draft` (L,) has at open positions: committed and drafted text in their order."""
        merged: list[Part] = []
        for part in layout.parts:
            if isinstance(part, str):
                pieces = [Part(part)]
            else:
                pieces = self._decode(canvas[slice(*part)], draft[slice(*part)])
                pieces = self._stopped(pieces, canvas[slice(*part)], layout.stops)
            doubled = not isinstance(part, str) and merged and merged[-1].text.endswith(" ")
            if doubled and pieces and pieces[0].text.startswith(" "):
                pieces[0] = Part(pieces[0].text[1:], pieces[0].draft)
            for piece in pieces:
                if merged and merged[-1].draft == piece.draft:
                    piece = Part(merged.pop().text + piece.text, piece.draft)
                if piece.text:
                    merged.append(piece)
        return merged

    def stopped(self, layout: Layout, canvas: NDArray[np.int32]) -> bool:
        """Whether a stop string is in what was written, up to the first open position of a gap."""
        if not layout.stops:
            return False
        gaps = (canvas[slice(*part)] for part in layout.parts if not isinstance(part, str))
        return any(stop_at(self._committed(ids), layout.stops) is not None for ids in gaps)

    def _stopped(self, pieces: list[Part], ids: NDArray[np.int32], stops: tuple[str, ...]) -> list[Part]:
        """A gap's pieces without a stop string and what follows it, and without what may become one."""
        committed = self._committed(ids) if stops else ""
        if not committed:
            return pieces
        at = stop_at(committed, stops)
        if at is not None:
            return [Part(committed[:at])]
        if not np.any(ids == MASK):
            return pieces
        shown = committed[: len(committed) - begun(committed, stops)]
        return [Part(shown), *dropwhile(lambda piece: not piece.draft, pieces)]

    def _committed(self, ids: NDArray[np.int32]) -> str:
        """The text of a gap up to its first open position, in whole characters."""
        is_open = ids == MASK
        before = ids[: np.argmax(is_open)] if is_open.any() else ids
        text: str = self._tokenizer.decode(before[before >= FIRST_TEXT_ID].tolist())
        return text.rstrip(HALF)

    def _decode(self, ids: NDArray[np.int32], draft: NDArray[np.int32]) -> list[Part]:
        is_open = ids == MASK
        tokens = zip(np.where(is_open, draft, ids).tolist(), is_open.tolist(), strict=True)
        pieces = []
        for (is_draft, is_text, is_mask), run in groupby(tokens, lambda t: (t[1], t[0] >= FIRST_TEXT_ID, t[0] == MASK)):
            stretch = [token for token, _ in run]
            if is_text or is_mask:
                text = self._tokenizer.decode(stretch) if is_text else OPEN_POSITION * len(stretch)
                pieces.append(Part(text, is_draft))
        if pieces and not is_open.any():  # a character that its last token has only begun
            pieces[-1] = Part(pieces[-1].text.rstrip(HALF))
        return pieces
