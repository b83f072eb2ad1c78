"""Files of pictures, as requests carry them."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def picture_file(seed: int, kind: str = "PNG", size: tuple[int, int] = (64, 64), **settings: Any) -> bytes:
    """A picture of four coloured quarters."""
    quarters = np.random.default_rng(seed).integers(0, 256, (2, 2, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(quarters).resize(size, Image.Resampling.NEAREST).save(file, kind, **settings)
    return file.getvalue()


def picture(seed: int, **settings: Any) -> str:
    """The same in base64."""
    return base64.b64encode(picture_file(seed, **settings)).decode()
