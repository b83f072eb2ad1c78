"""Prepared pictures on disk: what each shows, in which style, and its pixels.

DIR/pictures.json   concepts with the words that count as them, pictures, what was skipped and why
DIR/pixels.bin      (pictures, 64, 64, 3) uint8, RGB
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edge.decoding.pictures import read_picture
from host.data.words import candidates, normalized
from host.files import swapped_in
from shared.errors import DataError, RequestError
from shared.manifest import sha256_of

PICTURES_FILE: Final = "pictures.json"
PIXELS_FILE: Final = "pixels.bin"
FORMAT_VERSION: Final = 1
SIDE: Final = 64
MAX_FILE_BYTES: Final = 8 << 20
MAX_PICTURES: Final = 200_000
MOST_NAMED: Final = 20
"""Skipped pictures that are named; all are counted."""


class Concept(Struct, frozen=True, forbid_unknown_fields=True):
    """What pictures show. forms: the words that count as it, in lower case; one may have several words."""

    forms: tuple[str, ...]


class Drawn(Struct, frozen=True, forbid_unknown_fields=True):
    """One picture: number of its concept, and its style."""

    concept: int
    style: str


class PicturesMeta(Struct, frozen=True, forbid_unknown_fields=True):
    """pictures.json. held_out: styles to measure on, never trained on."""

    format_version: int
    source: str
    concepts: tuple[Concept, ...]
    pictures: tuple[Drawn, ...]
    held_out: tuple[str, ...]
    skipped: int
    skipped_because: tuple[str, ...]
    pixels_sha256: str


@dataclass(frozen=True)
class Shown:
    """A picture to prepare: name for messages, forms of each concept that it shows, style, bytes of its file.

    raw: None where there is no such file.
    """

    name: str
    concepts: tuple[tuple[str, ...], ...]
    style: str
    raw: bytes | None


def concepts_of_caption(caption: str) -> tuple[tuple[str, ...], ...]:
    """Each content word of a caption is a concept of its own."""
    return tuple((word,) for word in sorted(candidates(caption.lower())))


def prepare_pictures(shown: Iterable[Shown], out: Path, *, source: str, held_out: Sequence[str] = ()) -> PicturesMeta:
    """Decode pictures and write the folder `out`. What cannot be decoded is skipped, named and counted.

    Raises DataError when `out` is something else, when nothing is left, or when a held-out style does not occur.
    """
    if out.exists() and not (out / PICTURES_FILE).is_file():
        raise DataError(f"--out {out} exists and holds no prepared pictures: choose another --out")
    numbers: dict[tuple[str, ...], int] = {}
    pictures: list[Drawn] = []
    skipped: list[str] = []
    with swapped_in(out) as folder:
        with (folder / PIXELS_FILE).open("wb") as file:
            for one in shown:
                if one.raw is None:
                    skipped.append(f"{one.name} is missing: {source} has no such file")
                    continue
                try:
                    pixels = read_picture(one.raw, one.name, SIDE, MAX_FILE_BYTES)
                except RequestError as error:
                    skipped.append(str(error))
                    continue
                for forms in one.concepts:
                    pictures.append(Drawn(numbers.setdefault(forms, len(numbers)), one.style))
                    file.write(pixels.tobytes())
                if len(pictures) > MAX_PICTURES:
                    raise DataError(f"{source} has more than {MAX_PICTURES} pictures: give fewer")
        styles = {picture.style for picture in pictures}
        if missing := [style for style in held_out if style not in styles]:
            named = ", ".join(sorted(style or "one without a name" for style in styles)) or "none"
            raise DataError(f"--held-out-style {missing[0]} does not occur; styles: {named}")
        if not styles - set(held_out):
            because = f": {skipped[0]}" if skipped else ""
            raise DataError(f"{source} has no picture to train on, {len(skipped)} were skipped{because}")
        meta = PicturesMeta(
            format_version=FORMAT_VERSION,
            source=source,
            concepts=tuple(map(Concept, numbers)),
            pictures=tuple(pictures),
            held_out=tuple(held_out),
            skipped=len(skipped),
            skipped_because=tuple(skipped[:MOST_NAMED]),
            pixels_sha256=sha256_of(folder / PIXELS_FILE),
        )
        (folder / PICTURES_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(meta)))
    for sentence in meta.skipped_because:
        print(f"skipped: {sentence}")
    pairs = ((len(meta.pictures), "picture"), (len(meta.concepts), "concept"), (len(styles), "style"))
    counts = [f"{n} {what}{'s' * (n != 1)}" for n, what in pairs]
    print(
        f"{out}: {counts[0]} of {counts[1]} in {counts[2]}, "
        f"{meta.skipped} skipped; train with python -m host.train --stage conditions --init RUN --pictures {out}"
    )
    return meta


@dataclass(frozen=True)
class PictureSet:
    """Prepared pictures, open for reading. pixels (n, 64, 64, 3) uint8."""

    meta: PicturesMeta
    pixels: NDArray[np.uint8]

    @cached_property
    def by_style(self) -> dict[str, dict[int, list[int]]]:
        """Style → concept → numbers of its pictures."""
        found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, picture in enumerate(self.meta.pictures):
            found[picture.style][picture.concept].append(i)
        return {style: dict(of_style) for style, of_style in sorted(found.items())}

    @property
    def trained_styles(self) -> tuple[str, ...]:
        """All but those that are held out."""
        return tuple(style for style in self.by_style if style not in self.meta.held_out)

    @cached_property
    def _of_word(self) -> dict[str, list[tuple[str, int]]]:
        """By the first word of each form: the form with its spaces, and its concept."""
        found: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for number, concept in enumerate(self.meta.concepts):
            for form in concept.forms:
                found[form.split()[0]].append((f" {form} ", number))
        return dict(found)

    def concepts_in(self, text: str) -> list[int]:
        """The concepts that a text tells of, in any form, ascending."""
        flat = normalized(text)
        forms = [one for word in set(flat.split()) for one in self._of_word.get(word, ())]
        return sorted({concept for form, concept in forms if form in flat})

    def tells_of(self, text: str, concept: int) -> bool:
        """Whether a text has a concept in any form."""
        flat = normalized(text)
        return any(f" {form} " in flat for form in self.meta.concepts[concept].forms)


def load_pictures(folder: Path, verify: bool = False) -> PictureSet:
    """Open prepared pictures. Raises DataError when something is missing, damaged or altered."""
    try:
        meta = msgspec.json.decode((folder / PICTURES_FILE).read_bytes(), type=PicturesMeta)
    except OSError:
        raise DataError(f"{folder} holds no prepared pictures: make it with host.data --pictures SOURCE") from None
    except msgspec.DecodeError as error:
        raise DataError(f"{folder / PICTURES_FILE} is damaged: {error}") from None
    file, shape = folder / PIXELS_FILE, (len(meta.pictures), SIDE, SIDE, 3)
    if not file.is_file() or file.stat().st_size != int(np.prod(shape)):
        raise DataError(f"{file} is missing or cut off: prepare the pictures again with host.data --pictures SOURCE")
    if verify and sha256_of(file) != meta.pixels_sha256:
        raise DataError(f"{file} was altered since it was written: prepare the pictures again")
    return PictureSet(meta, np.memmap(file, dtype=np.uint8, mode="r", shape=shape))
