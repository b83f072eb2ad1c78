"""A stranger's picture is decoded within limits, or refused in one sentence that names it."""

import io
import struct
import zlib
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edge.decoding.pictures import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS, ORIENTATION, read_picture
from shared.errors import RequestError

SIDE: Final = 64
NAME: Final = "`images[1]`"
WHITE: Final = [255, 255, 255]


def file_of(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def plain(mode: str, colour: Any, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    return Image.new(mode, size, colour)


def pixels(raw: bytes) -> NDArray[np.uint8]:
    made = read_picture(raw, NAME, SIDE)
    assert made.shape == (SIDE, SIDE, 3) and made.dtype == np.uint8
    return made


def refusal(raw: bytes) -> tuple[str, str]:
    with pytest.raises(RequestError) as caught:
        read_picture(raw, NAME, SIDE)
    sentence = str(caught.value)
    assert sentence.startswith(NAME) and "\n" not in sentence
    return caught.value.code, sentence.removeprefix(f"{NAME} ")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A grey PNG by hand, its header whatever its data is."""
    data = zlib.compress((b"\0" + b"\x80" * SIDE) * SIDE)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    end = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + end


def animated() -> bytes:
    frames = [plain("RGB", colour) for colour in ("red", "blue")]
    return file_of(frames[0], save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("raw", "colour"),
    [
        (file_of(plain("RGB", "red")), [255, 0, 0]),
        (file_of(plain("RGBA", (255, 0, 0, 0))), WHITE),
        (file_of(plain("RGBA", (255, 0, 0, 128))), [255, 127, 127]),
        (file_of(plain("LA", (0, 0))), WHITE),
        (file_of(plain("P", 0)), [0, 0, 0]),
        (file_of(plain("P", 0), transparency=0), WHITE),
        (file_of(plain("1", 1)), WHITE),
        (file_of(plain("L", 80)), [80, 80, 80]),
        (file_of(Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16))), [156, 156, 156]),
        (file_of(plain("CMYK", (0, 255, 0, 0)), "JPEG"), [255, 0, 255]),
        (file_of(plain("RGB", "red"), "JPEG"), [254, 0, 0]),
    ],
    ids=["RGB", "clear", "half clear", "grey, clear", "palette", "palette, clear", "1", "L", "16", "CMYK", "JPEG"],
)
def test_pictures_of_any_colours_become_rgb_on_white(raw: bytes, colour: list[int]) -> None:
    assert np.array_equal(pixels(raw), np.broadcast_to(np.array(colour, np.uint8), (SIDE, SIDE, 3)))


def test_pictures_of_the_right_size_are_taken_to_the_bit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    assert np.array_equal(pixels(file_of(Image.fromarray(noise))), noise)


@pytest.mark.parametrize(("width", "height"), [(128, 32), (1920, 1080), (8, 262_144), (9, 8)])
def test_pictures_that_are_not_square_stand_in_the_middle_of_white(width: int, height: int) -> None:
    made = pixels(file_of(plain("RGB", "red", (width, height))))
    red = (made == [255, 0, 0]).all(2)
    assert (made[~red] == WHITE).all()
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    longest = max(width, height)
    assert (columns.size, rows.size) == tuple(max(1, round(side * SIDE / longest)) for side in (width, height))
    assert abs((rows[0] + rows[-1]) / 2 - (SIDE - 1) / 2) <= 0.5 >= abs((columns[0] + columns[-1]) / 2 - (SIDE - 1) / 2)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_are_turned_upright_by_exif(kind: str, value: int) -> None:
    halves = plain("RGB", "black")
    halves.paste((255, 255, 255), (0, 0, SIDE, SIDE // 2))
    halves.paste((128, 128, 128), (0, 0, SIDE // 2, SIDE // 2))  # no symmetry is left
    exif = Image.Exif()
    exif[ORIENTATION] = value
    raw = file_of(halves, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    with Image.open(io.BytesIO(raw)) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored), int)
    assert np.abs(pixels(raw) - upright).max() < 16 and (np.abs(upright - np.asarray(halves)).max() > 100) == (
        value > 1
    )


def test_pictures_with_damaged_exif_are_taken() -> None:
    exif = b"Exif\0\0" + b"\xff" * 40
    assert (pixels(file_of(plain("RGB", "red"), "JPEG", exif=exif)) == [254, 0, 0]).all()


@pytest.mark.parametrize(
    ("raw", "code", "sentence"),
    [
        (b"", "bad_request", "is neither PNG nor JPEG"),
        (b"once upon a time\n" * 9, "bad_request", "is neither PNG nor JPEG"),
        (file_of(plain("RGB", "red"), "GIF"), "bad_request", "is neither PNG nor JPEG"),
        (file_of(plain("RGB", "red"), "BMP"), "bad_request", "is neither PNG nor JPEG"),
        (animated(), "bad_request", "is animated: send one of its pictures"),
        (file_of(plain("RGB", "red", (1, 1))), "bad_request", "has 1 × 1 pixels; each side must have 8"),
        (file_of(plain("RGB", "red", (500, 7))), "bad_request", "has 500 × 7 pixels; each side must have 8"),
        (png_of(100_000, 100_000), "too_large", f"has 100000 × 100000 pixels; at most {MAX_PICTURE_PIXELS}"),
        (file_of(plain("1", 1, (5_000, 5_000))), "too_large", "has 5000 × 5000 pixels"),
        (b"\x89PNG" + b"\0" * MAX_PICTURE_BYTES, "too_large", f"bytes; a picture may have {MAX_PICTURE_BYTES}"),
        (png_of(SIDE, SIDE, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * (2 << 20)))), "bad_request", "is damaged"),
        (png_of(2 * SIDE, SIDE), "bad_request", "is damaged"),
    ],
    ids=["empty", "text", "GIF", "BMP", "frames", "pixel", "line", "bomb", "real bomb", "bytes", "text bomb", "short"],
)
def test_pictures_that_are_not_taken_are_refused_in_a_sentence(raw: bytes, code: str, sentence: str) -> None:
    got, said = refusal(raw)
    assert got == code and sentence in said


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_cut_anywhere_are_refused_or_whole(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8))
    whole = file_of(noise, kind)
    for end in range(0, len(whole) - 20, 7):
        assert refusal(whole[:end])[0] == "bad_request"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_with_a_flipped_bit_raise_nothing_else(kind: str) -> None:
    whole = bytearray(file_of(plain("RGB", "red", (24, 24)), kind))
    for place in range(0, len(whole), 3):
        spoilt = whole.copy()
        spoilt[place] ^= 0x10
        try:
            pixels(bytes(spoilt))
        except RequestError as error:
            assert str(error).startswith(NAME)


def test_pictures_without_pillow_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    code, sentence = refusal(b"")
    assert code == "bad_request" and sentence.endswith("pip install 'diffusion-llm[images]'")
