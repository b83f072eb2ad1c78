"""Draw docs/demo.gif: what `make demo` shows, of one seed. Run it again for a new bundle.

python docs/record_demo.py [--seed 7]
"""

import argparse
import textwrap
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from edge.config import default_bundle
from edge.demo import PROMPT, SELECTION, STEPS, TEMPERATURE
from edge.serving.loaded_bundle import LoadedBundle, Snapshot
from shared.messages import OPEN_POSITION, GenerateRequest

COLUMNS, ROWS, FONT_PX = 88, 15, 15
BACKGROUND, TEXT, OPEN, STATUS = "#11151c", "#e6e6e6", "#7c8da6", "#7fb069"
EVERY = 4  # of so many passes one is shown


def frame(text: str, status: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One picture of the terminal."""
    width = int(font.getlength("m"))
    line_px = FONT_PX + 5
    image = Image.new("RGB", (width * (COLUMNS + 2), line_px * (ROWS + 2)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, COLUMNS) or [""]]
    for row, line in enumerate(lines[:ROWS]):
        for column, letter in enumerate(line):
            place = (width * (column + 1), line_px * row + FONT_PX // 2)
            draw.text(place, letter, font=font, fill=OPEN if letter == OPEN_POSITION else TEXT)
    draw.text((width, line_px * ROWS + FONT_PX // 2), status, font=font, fill=STATUS)
    return image


def main() -> None:
    """Run one request and write the pictures of its passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), FONT_PX)
    engine = LoadedBundle.load(default_bundle())
    frames: list[Image.Image] = []

    def draw(snapshot: Snapshot) -> None:
        status = f"pass {snapshot.step} of {snapshot.steps}, {snapshot.masked} tokens still masked"
        frames.append(frame(snapshot.text(), status, font))

    request = GenerateRequest(prompt=PROMPT, seed=args.seed, steps=STEPS, selection=SELECTION, temperature=TEMPERATURE)
    engine.run(engine.prepare(request), draw)
    frames = [image.quantize(64) for image in [*frames[:-1:EVERY], frames[-1]]]
    durations = [110] * (len(frames) - 1) + [5000]  # milliseconds: slower than life, so that it can be followed
    frames[0].save(
        Path(__file__).parent / "demo.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )


if __name__ == "__main__":
    main()
