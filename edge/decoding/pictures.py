"""Decodes untrusted pictures: PNG or JPEG, by Pillow, within limits; made upright, square and white behind.

Pillow is an optional package (extra `images`) and loads with the first picture: a daemon that gets none pays nothing.
"""

from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

MAX_PICTURE_BYTES: Final = 192 << 10
"""Of a file. Less than what a broker may deliver in one packet, so that one too large is refused by name."""
MAX_PICTURE_PIXELS: Final = 1 << 21
"""Of a picture before it is made small; 1920 × 1080 fits. Eight megabytes while it is decoded."""
LEAST_SIDE: Final = 8
"""Pixels of a side below which a picture shows nothing."""
MAX_TEXT_BYTES: Final = 1 << 20
"""Of a PNG's text chunks, uncompressed: nobody reads them."""
FORMATS: Final = ("PNG", "JPEG")
ORIENTATION: Final = 0x0112
"""The EXIF tag. Its values 2 … 8 are undone by Pillow's transposes of these names."""
UPRIGHT: Final = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def read_picture(raw: bytes, name: str, side: int, most_bytes: int = MAX_PICTURE_BYTES) -> NDArray[np.uint8]:
    """The pixels (side, side, 3) of a PNG or JPEG, RGB; what is not square stands in the middle of white.

    name: for the sentences. Transparent parts are white, 16-bit grey loses its lower byte, CMYK becomes RGB, the EXIF
    orientation is undone. Raises RequestError: `too_large` above the limits, else `bad_request`: neither format,
    damaged, animated, a side below LEAST_SIDE, or no Pillow on this device.
    """
    if len(raw) > most_bytes:
        raise RequestError("too_large", f"{name} has {len(raw)} bytes; a picture may have {most_bytes}")
    try:
        from PIL import Image, PngImagePlugin, UnidentifiedImageError
    except ImportError:
        raise RequestError(
            "bad_request", f"{name}: this device cannot decode pictures: pip install 'diffusion-llm[images]'"
        ) from None
    Image.MAX_IMAGE_PIXELS = None  # the limit below is the lower one, and has a sentence of its own
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
    try:
        image = Image.open(BytesIO(raw), formats=FORMATS)
    except Exception as error:  # Pillow raises whatever its parsers meet: OSError, SyntaxError, struct.error, …
        cause = "is neither PNG nor JPEG" if isinstance(error, UnidentifiedImageError) else "is damaged"
        raise RequestError("bad_request", f"{name} {cause}") from None
    with image:
        width, height = image.size
        if width * height > MAX_PICTURE_PIXELS:
            raise RequestError(
                "too_large", f"{name} has {width} × {height} pixels; at most {MAX_PICTURE_PIXELS} are decoded"
            )
        if min(width, height) < LEAST_SIDE:
            raise RequestError(
                "bad_request",
                f"{name} has {width} × {height} pixels; each side must have {LEAST_SIDE} to show anything",
            )
        if image.format == "PNG" and getattr(image, "is_animated", False):
            raise RequestError("bad_request", f"{name} is animated: send one of its pictures")
        try:
            return _pixels(image, side)
        except Exception as error:
            raise RequestError("bad_request", f"{name} is damaged: {error}") from None


def _pixels(image: "Image.Image", side: int) -> NDArray[np.uint8]:
    """Made small before it is laid on white: the colours of transparent parts weigh nothing then."""
    from PIL import Image

    image.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded at a fraction of its size
    image.load()
    turned = None
    with suppress(Exception):  # a damaged EXIF block spoils no picture
        turned = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip at 255
        small = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    else:
        small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    width, height = (max(1, round(length * side / max(small.size))) for length in small.size)
    if (width, height) != small.size:
        small = small.resize((width, height), Image.Resampling.BILINEAR)
    if turned is not None:
        small = small.transpose(Image.Transpose[turned])
    white = Image.new("RGB", (side, side), "white")
    white.paste(small, ((side - small.width) // 2, (side - small.height) // 2), small if small.mode == "RGBA" else None)
    return np.asarray(white)
