"""What all structs of a manifest are made of."""

from typing import Annotated

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]


class Frozen(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every manifest part: immutable, unknown fields refused by name."""


class Figure(Frozen, frozen=True):
    """A measured value and its standard error."""

    value: float
    stderr: float
