"""Draws a folder of pictures in more styles, from icon sets in the format of Iconify, from fonts, and from folders of
pictures that are named by code point or by what they show.

    npm install @iconify-json/fxemoji @iconify-json/noto-v1       # PyPI: resvg-py
    python docs/more_styles.py PICTURES OUT node_modules/@iconify-json/fxemoji Symbola.ttf

PICTURES has `concepts.jsonl`, whose lines name characters, their names and the files to draw, and zip files of its
own styles, which are copied. A set's icons are found by code point, by the name of the character, or by a word of the
concept; of a tree of folders whose names are words, the drawings of a concept are dealt out to several styles. OUT is
prepared by `host.data --pictures OUT`.
"""

import argparse
import io
import json
import re
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import resvg_py  # type: ignore[import-not-found]
from PIL import Image, ImageDraw, ImageFont

SIDE, DRAWN = 64, 60  # pixels of a picture, of what is drawn in it
LARGE, GLYPH = 128, 100  # of an icon, of the letters of a font, before they are made small
DRAWINGS: Final = 12  # of a concept, of a folder whose names are words: so many styles
NO_THINGS: Final = {"computer", "flags", "shapes", "signs_and_symbols", "special", "symbols"}  # folders left out
TAILS: Final = ("", "1", "fill", "filled", "bold", "solid", "duotone", "color", "face")
"""Of an icon's name, behind what it shows."""
Draw = Callable[[str, Sequence[str]], Image.Image | None]
"""A character and names of what it shows → the drawing on nothing, if there is one."""


def squashed(name: str) -> str:
    """Letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def icons_of(folder: Path) -> Draw:
    """The icons of an Iconify set."""
    icons, chars = (json.loads((folder / name).read_text()) for name in ("icons.json", "chars.json"))
    named = {squashed(name.removeprefix("emoji-")): name for name in [*icons.get("aliases", {}), *icons["icons"]]}
    last: dict[str, str] = {}  # the shortest name by its last word: streamline calls a box "shipping-box-2"
    for name in sorted(icons["icons"], key=len):
        words = [word for word in name.split("-") if not word.isdigit() and word not in TAILS]
        last.setdefault(words[-1] if words else "", name)

    def draw(char: str, names: Sequence[str]) -> Image.Image | None:
        code = "-".join(f"{ord(c):x}" for c in char if c != "\ufe0f")
        in_unicode = " ".join(unicodedata.name(c, "") for c in char if c not in "\ufe0f\u200d")
        by_name = [named.get(squashed(one) + tail) for one in (in_unicode, *names) for tail in TAILS]
        by_last_word = [last.get(one) for one in names]
        found = next(filter(None, [chars.get(code), *by_name, *by_last_word]), None)
        if found is None:
            return None
        icon = icons["icons"].get(found) or icons["icons"][icons["aliases"][found]["parent"]]
        wide, high = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        body = icon["body"].replace("currentColor", "#000")
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {wide} {high}">{body}</svg>'
        )
        return rendered(svg, wide=wide, high=high)

    return draw


def rendered(svg: str, *, wide: float = 1, high: float = 1) -> Image.Image:
    """An SVG, LARGE wide."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=LARGE, height=int(LARGE * high // wide), skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def files_of(folder: Path) -> Draw:
    """Pictures in files that are named by code point."""
    files = {path.stem.replace("-fe0f", "").lower(): path for path in folder.iterdir()}

    def draw(char: str, names: Sequence[str]) -> Image.Image | None:
        path = files.get("-".join(f"{ord(c):04x}" for c in char if c != "\ufe0f"))
        return None if path is None else Image.open(path).convert("RGBA")

    return draw


def named_in(folder: Path, forms: Sequence[Sequence[str]]) -> list[Draw]:
    """Pictures in a tree of files whose names have a word of the concept, and of no other: the k-th drawing of each."""
    concept_of = {form: concepts[0] for concepts in forms for form in concepts}
    by_concept: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".png", ".svg") and not NO_THINGS & set(path.relative_to(folder).parts):
            shows = {concept_of[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in concept_of}
            if len(shows) == 1:
                by_concept.setdefault(shows.pop(), []).append(path)

    def drawing(k: int) -> Draw:
        def draw(char: str, names: Sequence[str]) -> Image.Image | None:
            found = by_concept.get(concept_of[names[-1]], ())
            if k >= len(found):
                return None
            try:
                svg = found[k].suffix == ".svg"
                image = rendered(found[k].read_text()) if svg else Image.open(found[k]).convert("RGBA")
            except (OSError, ValueError):  # a broken one
                return None
            image.thumbnail((2 * LARGE, 2 * LARGE))
            return image

        return draw

    return [drawing(k) for k in range(DRAWINGS)]


def glyphs_of(path: Path) -> Draw:
    """The glyphs of a font, in black."""
    font = ImageFont.truetype(str(path), GLYPH)
    missing = bytes(font.getmask("\U0010fffd"))

    def draw(char: str, names: Sequence[str]) -> Image.Image | None:
        char = char.replace("\ufe0f", "")
        if len(char) != 1 or bytes(font.getmask(char)) == missing:
            return None
        image = Image.new("RGBA", (2 * LARGE, 2 * LARGE), (0, 0, 0, 0))
        ImageDraw.Draw(image).text((LARGE // 2, LARGE // 2), char, font=font, fill="black")
        return image

    return draw


def centred(image: Image.Image) -> Image.Image | None:
    """Trimmed, DRAWN pixels on its longer side, in the middle of white; None where nothing is drawn."""
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    wide, high = (max(1, round(side * DRAWN / max(image.size))) for side in image.size)
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    white.alpha_composite(
        image.resize((wide, high), Image.Resampling.LANCZOS), ((SIDE - wide) // 2, (SIDE - high) // 2)
    )
    return white.convert("RGB")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("styles", type=Path, nargs="+", help="folders of icon sets or pictures, and fonts")
    args = parser.parse_args()
    args.out.mkdir()
    for path in [args.pictures / "concepts.jsonl", *args.pictures.glob("*.zip")]:
        shutil.copyfile(path, args.out / path.name)
    concepts = [json.loads(line) for line in (args.out / "concepts.jsonl").read_text().splitlines()]
    for style in args.styles:
        if style.is_file():
            drawn = {style.stem: glyphs_of(style)}
        elif (style / "icons.json").exists():
            drawn = {style.name: icons_of(style)}
        elif any(path.is_dir() for path in style.iterdir()):
            dealt = named_in(style, [one["forms"] for one in concepts])
            drawn = {f"{style.name}-{k}": draw for k, draw in enumerate(dealt, 1)}
        else:
            drawn = {style.parent.name: files_of(style)}
        for called, draw in drawn.items():
            print(f"{called}: {written(args.out / f'{called}.zip', draw, concepts)} pictures")


def written(path: Path, draw: Draw, concepts: Sequence[dict[str, list[str]]]) -> int:
    """A zip file of a style; how many pictures it has."""
    count = 0
    with zipfile.ZipFile(path, "w") as archive:
        for one in concepts:
            for char, name, file in zip(one["chars"], one["emoji_names"], one["files"], strict=True):
                drawn = draw(char, [name, *one["forms"]])
                picture = centred(drawn) if drawn is not None else None
                if picture is not None:
                    png = io.BytesIO()
                    picture.save(png, "PNG")
                    archive.writestr(file, png.getvalue())
                    count += 1
    return count


if __name__ == "__main__":
    main()
