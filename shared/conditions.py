"""Conditions, words and pictures, as a bundle's manifest describes them."""

from typing import Annotated, Final

from msgspec import Meta

from shared.figures import Figure, Frozen, Positive

MAX_GUIDANCE: Final = 5.0
Guidance = Annotated[float, Meta(ge=0, le=MAX_GUIDANCE)]


class AskedFor(Frozen, frozen=True):
    """How often a text contains what was asked for, in any of its forms, and how often other texts do. given: "words",
    "pictures, trained styles" or "pictures, STYLE (held out)". number: words or pictures a text.
    """

    given: str
    number: Positive
    guidance: Guidance
    texts: Positive
    told: Figure
    base: Figure


class ConditionalLaw(Frozen, frozen=True):
    """Exact bits per byte of held-out stories given what they tell of, given nothing, and given another story's."""

    given: str
    stories: Positive
    bits_per_byte: Figure
    unconditioned: Figure
    shuffled: Figure


class Conditions(Frozen, frozen=True):
    """What a request in blocks may be conditioned on, and the guidance of one that does not say.

    words, pictures: of a request at most. word_tokens: of a word at most. picture_size: pixels on each side.
    picture_rows: memory rows of a picture; of words it is what the graph returns.
    """

    words: Positive
    word_tokens: Positive
    pictures: Positive
    picture_size: Positive
    picture_rows: Positive
    guidance: Guidance = 0.0
    asked_for: tuple[AskedFor, ...] = ()
    laws: tuple[ConditionalLaw, ...] = ()
