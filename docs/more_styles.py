"""Draws a folder of pictures in more styles, from icon sets in the format of Iconify, from fonts, and from folders of
pictures that are named by code point.

    npm install @iconify-json/fxemoji @iconify-json/noto-v1       # PyPI: resvg-py
    python docs/more_styles.py PICTURES OUT node_modules/@iconify-json/fxemoji Symbola.ttf

PICTURES has `concepts.jsonl`, whose lines name characters, their names and the files to draw, and zip files of its
own styles, which are copied. A set's icons are found by code point, by the name of the character, or by a word of the
concept. OUT is prepared by `host.data --pictures OUT`.
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
    named = {squashed(name): name for name in [*icons.get("aliases", {}), *icons["icons"]]}

    def draw(char: str, names: Sequence[str]) -> Image.Image | None:
        code = "-".join(f"{ord(c):x}" for c in char if c != "\ufe0f")
        in_unicode = " ".join(unicodedata.name(c, "") for c in char if c not in "\ufe0f\u200d")
        by_name = [named.get(squashed(one) + tail) for one in (in_unicode, *names) for tail in TAILS]
        found = next(filter(None, [chars.get(code), *by_name]), None)
        if found is None:
            return None
        icon = icons["icons"].get(found) or icons["icons"][icons["aliases"][found]["parent"]]
        wide, high = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        body = icon["body"].replace("currentColor", "#000")
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {wide} {high}">{body}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=LARGE, height=LARGE * high // wide, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    return draw


def files_of(folder: Path) -> Draw:
    """Pictures in files that are named by code point."""
    files = {path.stem.replace("-fe0f", ""): path for path in folder.iterdir()}

    def draw(char: str, names: Sequence[str]) -> Image.Image | None:
        path = files.get("-".join(f"{ord(c):04x}" for c in char if c != "\ufe0f"))
        return None if path is None else Image.open(path).convert("RGBA")

    return draw


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
        kind = glyphs_of if style.is_file() else icons_of if (style / "icons.json").exists() else files_of
        draw, count = kind(style), 0
        called = style.parent.name if style.name == "assets" else style.stem
        with zipfile.ZipFile(args.out / f"{called}.zip", "w") as archive:
            for one in concepts:
                for char, name, file in zip(one["chars"], one["emoji_names"], one["files"], strict=True):
                    drawn = draw(char, [name, *one["forms"]])
                    picture = centred(drawn) if drawn is not None else None
                    if picture is not None:
                        png = io.BytesIO()
                        picture.save(png, "PNG")
                        archive.writestr(file, png.getvalue())
                        count += 1
        print(f"{called}: {count} pictures")


if __name__ == "__main__":
    main()
