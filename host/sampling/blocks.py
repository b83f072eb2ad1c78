"""Reference decoding of blocks, one text at a time: slow, obvious, the definition that the edge is held to.

The text is the law's: the token of position p is the arg max of the filtered log-probabilities of the row at p − 1
plus the noise of (seed, p, token). A draft for p is the arg max of the drafter's filtered log-probabilities plus the
same noise, and is kept where both are the same token. So drafts change how many passes a text takes, never the text
(drafter-invariant speculative decoding, Daliri et al., arXiv 2408.07978).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from host.model.conditions import Condition, Given, Memory, Remaining
from host.model.layouts import Rows, causal, evidence
from host.model.network import NO_PADDING, Cache, Denoiser
from host.sampling.reference import TOP_K, Settings, drawn, guided
from shared.tokens import BOS, EOS

Template = Sequence[list[int] | int]
"""Text tokens, and gaps of at most so many tokens; no two gaps in a row."""


@dataclass
class Written:
    """gaps: the tokens of each gap, without EOS, the open end the last of them. kept: tokens that each pass committed.

    margin: the smallest gap that decided a draw of the law; where it is below a backend's numeric tolerance, that
    backend may decide otherwise.
    """

    gaps: list[list[int]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    margin: float = float("inf")


@dataclass(frozen=True)
class Layout:
    """A template with places: evidence, and each gap's first and last position and the token before it."""

    tokens: list[int]
    positions: list[int]
    gaps: list[tuple[int, int, int]]  # first, last, token before
    open_alone: bool  # a prompt: the open end is the only gap


def lay_out(template: Template, open_end: bool, length: int) -> Layout:
    """Every gap at its full size, an open end up to the canvas length; text that is not open ends with EOS."""
    tokens, positions, gaps, position = [BOS], [0], [], 1
    for part in template:
        if isinstance(part, int):
            gaps.append((position, position + part - 1, tokens[-1]))
            position += part
        else:
            tokens, positions = tokens + part, positions + list(range(position, position + len(part)))
            position += len(part)
    if open_end:
        gaps.append((position, length - 1, tokens[-1]))
    elif position < length:
        tokens, positions = [*tokens, EOS], [*positions, position]
    return Layout(tokens, positions, gaps, open_end and len(gaps) == 1)


@torch.no_grad()
def write(
    model: Denoiser,
    template: Template,
    *,
    settings: Settings,
    open_end: bool,
    window: int = 0,
    condition: Condition | None = None,
    guidance: float = 0.0,
) -> Written:
    """Fill a template's gaps from the left, then the open end, each until EOS or until it is full.

    window: drafts in a pass, of the chain drafter. A prompt with an open end alone is laid out causally. guidance: of
    a condition; the drafter reads the states of the rows that read it. A word that was told is asked for no more
    (`Remaining`).
    """
    layout = lay_out(template, open_end, model.config.canvas_len)
    memory = None if condition is None else model.remember(Given.of([condition]).to(model.device))
    memories = [memory, None] if guidance else [memory]
    streams = [_Stream(model, one, Cache.empty(model.config, device=model.device)) for one in memories]
    asked = None if condition is None else Remaining(condition)
    writer = _Writer(model, settings, window, guidance, streams, Written(), asked)
    if layout.open_alone:
        rows, given = causal(torch.tensor([layout.tokens[:-1]])), len(layout.tokens) - 1
    else:
        rows, given = evidence(layout.tokens, layout.positions, []), len(layout.tokens)
    if given:
        for stream in streams:
            stream.states(rows)
            stream.cache.keep(torch.arange(given))
    for first, last, before in layout.gaps:
        writer.written.gaps.append(writer.fill(first, last, before))
    return writer.written


@dataclass(frozen=True)
class _Stream:
    """Rows of a text that read a memory, or none. cache: of the rows committed so far."""

    model: Denoiser
    memory: Memory | None
    cache: Cache

    def states(self, rows: Rows) -> Tensor:
        """→ (N, D), on the device of the network"""
        states: Tensor = self.model(*rows.to(self.model.device), self.cache, memory=self.memory)[0]
        return states

    def log_probabilities(self, states: Tensor) -> Tensor:
        """→ (N, V), on the CPU, where tokens are drawn"""
        return self.model.logits(states, NO_PADDING).log_softmax(-1).cpu()


@dataclass
class _Writer:
    """One text being written. streams: the rows that are written by, and with guidance the same without a memory."""

    model: Denoiser
    settings: Settings
    window: int
    guidance: float
    streams: list[_Stream]
    written: Written
    remaining: Remaining | None

    def fill(self, first: int, last: int, token: int) -> list[int]:
        """Tokens of positions `first` to `last` at most; `token`, of the position before, is the first row."""
        filled: list[int] = []
        drafts: list[int] = []
        position = first - 1  # of `token`, the last committed one, whose row runs in the next pass
        while True:
            tokens = torch.tensor([[token, *drafts]])
            n = tokens.shape[1]
            places = torch.arange(position, position + n)[None]
            kept = len(self.streams[0].cache)
            visible = torch.cat([torch.ones(1, n, kept), torch.ones(1, n, n).tril()], 2).bool()
            states = [stream.states(Rows(tokens, places, visible)) for stream in self.streams]
            laws = [stream.log_probabilities(own) for stream, own in zip(self.streams, states, strict=True)]
            logp = guided(laws[0], laws[-1], self.guidance, min(TOP_K, laws[0].shape[1])) if self.guidance else laws[0]
            own, margin = drawn(logp, places[0] + 1, self.settings)
            agreed, told = 0, self.tells([*filled, int(own[0])])
            while not told and agreed < len(drafts) and drafts[agreed] == int(own[agreed]):
                agreed += 1
                told = self.tells([*filled, *own[: agreed + 1].tolist()])
            for stream in self.streams:
                stream.cache.keep(torch.arange(agreed + 1))
            if told:
                self.narrow()
            new = own[: agreed + 1].tolist()
            self.written.margin = min(self.written.margin, float(margin[: agreed + 1].min()))
            self.written.kept.append(len(new))
            position, token = position + len(new), new[-1]
            filled += [one for one in new if one != EOS]
            if token == EOS or position == last:
                return filled
            drafts = self.drafts(states[0][agreed], token, position + 1, min(self.window, last - position - 1))

    def tells(self, text: list[int]) -> bool:
        """Whether the last token of the gap's text stands behind a word that is asked for."""
        return self.remaining is not None and self.remaining.tells(text)

    def narrow(self) -> None:
        """The rows to come read what is left of the condition."""
        assert self.remaining is not None
        reads = self.streams[0]
        if self.remaining.nothing:
            self.streams, self.guidance, self.remaining = [replace(reads, memory=None)], 0.0, None
        else:
            assert reads.memory is not None
            hidden = self.remaining.hidden(reads.memory.keys[0].shape[2]).to(self.model.device)
            self.streams[0] = replace(reads, memory=reads.memory.without(hidden[None]))

    def drafts(self, state: Tensor, token: int, position: int, count: int) -> list[int]:
        """Up to `count` drafts from `position` on, none from an EOS on.

        state: of the last kept row, which drew `token` for the position before.
        """
        drafts: list[int] = []
        if self.model.drafter is None:
            return drafts
        for step in list(self.model.drafter.depths)[:count]:
            state = step(state[None], self.model.token_embedding(torch.tensor([token], device=state.device)))[0]
            logp = self.model.draft_logits(state[None], NO_PADDING).log_softmax(-1).cpu()
            token = int(drawn(logp, torch.tensor([position + len(drafts)]), self.settings)[0])
            if token == EOS:  # the law draws it by itself after the drafts before
                break
            drafts.append(token)
        return drafts
