"""Draw docs/demo.gif: what `make demo` shows, of one seed. Run it again for a new bundle.

python docs/record_demo.py [--seed 7]
"""

import argparse
import textwrap
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from edge.config import default_bundle
from edge.demo import PROMPT, best_settings
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Snapshot
from shared.messages import GenerateRequest, Part

COLUMNS, ROWS, FONT_PX = 88, 15, 15
MOST_FRAMES = 80
BACKGROUND, TEXT, OPEN, STATUS = "#11151c", "#e6e6e6", "#7c8da6", "#7fb069"


def frame(parts: list[Part], status: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One picture of the terminal: committed text firm, drafts pale."""
    text = "".join(part.text for part in parts)
    pale = [part.draft for part in parts for _ in part.text]
    width = int(font.getlength("m"))
    line_px = FONT_PX + 5
    image = Image.new("RGB", (width * (COLUMNS + 2), line_px * (ROWS + 2)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, COLUMNS) or [""]]
    at = 0
    for row, line in enumerate(lines[:ROWS]):
        for column, letter in enumerate(line):
            at = text.index(letter, at)  # wrapping leaves out spaces and line breaks
            place = (width * (column + 1), line_px * row + FONT_PX // 2)
            draw.text(place, letter, font=font, fill=OPEN if pale[at] else TEXT)
            at += 1
    draw.text((width, line_px * ROWS + FONT_PX // 2), status, font=font, fill=STATUS)
    return image


def main() -> None:
    """Run one request and write the pictures of its passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), FONT_PX)
    loaded = LoadedBundle.load(default_bundle())
    frames: list[Image.Image] = []

    def draw(snapshot: Snapshot) -> None:
        frames.append(frame(snapshot.parts(), f"pass {snapshot.step}", font))

    request = GenerateRequest(prompt=PROMPT, seed=args.seed, **best_settings(default_bundle()))
    loaded.run(loaded.prepare(request), draw)
    every = -(-len(frames) // MOST_FRAMES)
    frames = [image.quantize(64) for image in [*frames[:-1:every], frames[-1]]]
    durations = [110] * (len(frames) - 1) + [5000]  # milliseconds: slower than life, so that it can be followed
    frames[0].save(
        Path(__file__).parent / "demo.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )


if __name__ == "__main__":
    main()
