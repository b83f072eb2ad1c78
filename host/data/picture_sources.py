"""Where pictures come from: a folder with JSON lines, zip files of drawing styles, an image–caption set of the Hub."""

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from host.data.pictures import MAX_FILE_BYTES, Shown, concepts_of_caption
from host.data.sources import json_lines
from shared.errors import DataError

HUB: Final = "hub:"
LOOKS_LIKE: Final = '{"image": "cat.png", "words": ["cat"]}'
CAPTIONS: Final = ("caption", "text", "captions", "sentence")
"""Columns of the Hub's sets that hold a caption, or several; the first there is."""


class _Line(msgspec.Struct):
    """One line: a picture with words or a caption; or a concept with files, in the folder or in its zip files."""

    image: str | None = None
    words: tuple[str, ...] = ()
    caption: str | None = None
    style: str = ""
    files: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()


def shown_in(source: str) -> Iterator[Shown]:
    """Pictures of a folder, or of a set `hub:NAME`, where NAME is OWNER/NAME or a local folder in the Hub's layout."""
    if source.startswith(HUB):
        return _of_hub(source.removeprefix(HUB))
    return _of_folder(Path(source))


def _of_folder(folder: Path) -> Iterator[Shown]:
    lines = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not lines:
        raise DataError(
            f"{folder} is no folder with a .jsonl file: each line names a picture and what it shows, {LOOKS_LIKE} "
            'or with "caption": "a cat"'
        )
    with contextlib.ExitStack() as opened:
        packed = {path.stem: opened.enter_context(zipfile.ZipFile(path)) for path in sorted(folder.glob("*.zip"))}
        for path in lines:
            for number, line in json_lines(path, _Line, LOOKS_LIKE):
                concepts, names = _concepts(line), (line.image,) if line.image else line.files
                if not concepts or not names:
                    raise DataError(f'{path}, line {number} names no picture, or neither "words" nor a "caption"')
                for name in names:
                    plain = _inside(folder, name, path, number)
                    for style, read in _files_named(name, line.style, plain, packed):
                        yield Shown(f"{style}/{name}" if style else name, concepts, style, read)


def _files_named(
    name: str, style: str, plain: Path, packed: Mapping[str, zipfile.ZipFile]
) -> Iterator[tuple[str, bytes | None]]:
    """The files of that name, in the folder and in its zip files, whose names are styles; None if there is none."""
    found = False
    if plain.is_file():
        found = True
        yield style, _read(plain)
    for of_zip, archive in packed.items():
        if name in archive.namelist():
            found = True
            with archive.open(name) as file:
                yield of_zip, file.read(MAX_FILE_BYTES + 1)
    if not found:
        yield style, None


def _concepts(line: _Line) -> tuple[tuple[str, ...], ...]:
    if line.forms:
        return (tuple(form.lower() for form in line.forms),)
    if line.words:
        return tuple((word.lower(),) for word in line.words)
    return concepts_of_caption(line.caption or "")


def _inside(folder: Path, name: str, path: Path, number: int) -> Path:
    plain = folder / name
    if not plain.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path}, line {number} names {name}, which is outside of {folder}")
    return plain


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _of_hub(name: str) -> Iterator[Shown]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(name, split="train", streaming=True)
        columns = rows.features or {}
        image = next((column for column, kind in columns.items() if isinstance(kind, datasets.Image)), None)
        caption = next((column for column in CAPTIONS if column in columns), None)
        if image is not None:
            rows = rows.cast_column(image, datasets.Image(decode=False))  # decoded by us, within our limits
    except Exception as error:
        raise DataError(f"{HUB}{name} cannot be read: {str(error).splitlines()[0]}") from None
    if image is None or caption is None:
        raise DataError(
            f"{HUB}{name} has the columns {', '.join(columns)}: one of images and one of captions is needed"
        )
    for number, row in enumerate(rows, start=1):
        said = row[caption] if isinstance(row[caption], str) else " ".join(row[caption])
        picture = row[image]
        raw = picture["bytes"] if picture["bytes"] is not None else _read(Path(picture["path"]))
        yield Shown(f"{name}, record {number}", concepts_of_caption(said), "", raw)
