"""A request's words and pictures: checked, tokenized and decoded for the encoders."""

import base64
import binascii

import numpy as np

from edge.decoding.conditions import Condition
from edge.decoding.layout_text import Texts
from edge.decoding.pictures import read_picture
from shared.conditions import Conditions
from shared.errors import RequestError
from shared.messages import ATTACHMENT, GenerateRequest


def read_condition(request: GenerateRequest, takes: Conditions, texts: Texts) -> Condition:
    """Decoding three pictures may take a tenth of a second. Raises RequestError, naming the word or the picture."""
    words, images = request.words or [], request.images or []
    if len(words) > takes.words:
        raise RequestError("bad_request", f"`words` has {len(words)} words; this bundle takes {takes.words}")
    if len(images) > takes.pictures:
        raise RequestError("bad_request", f"`images` has {len(images)} pictures; this bundle takes {takes.pictures}")
    tokens = tuple(texts.word(word) for word in words)
    for i, ids in enumerate(tokens):
        if len(ids) > takes.word_tokens:
            sentence = f"`words[{i}]` takes {len(ids)} tokens; this bundle takes {takes.word_tokens} a word"
            raise RequestError("bad_request", sentence)
    names = [f"`images[{i}]`" for i in range(len(images))]
    files = [image_bytes(image, name) for image, name in zip(images, names, strict=True)]
    side = takes.picture_size
    pixels = np.empty((len(files), side, side, 3), np.uint8)
    for i, (file, name) in enumerate(zip(files, names, strict=True)):
        pixels[i] = read_picture(file, name, side)
    guidance = takes.guidance if request.guidance is None else request.guidance
    return Condition(tokens, pixels, guidance, texts.go_on)


def image_bytes(image: str, name: str) -> bytes:
    """A picture's file as a request carries it. Raises RequestError. name: for its sentence."""
    if image.startswith(ATTACHMENT):
        raise RequestError("bad_request", f"{name} names an attachment, and those come over MQTT and HTTP: send base64")
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):  # the latter for characters outside ASCII
        raise RequestError("bad_request", f"{name} is not base64 of a PNG or JPEG file") from None
