"""Pictures of requests in the journal: each is kept once, by its hash, however many requests show it."""

import base64
import hashlib
from collections.abc import Mapping
from typing import Final

from msgspec.structs import replace

from shared.messages import GenerateRequest, decode_request, encode

BY_HASH: Final = "sha256:"
"""Stands before a hash in place of a picture. No base64, so a client cannot ask for another's picture by it."""


def put_aside(request: GenerateRequest, seed: int) -> tuple[bytes, dict[bytes, bytes]]:
    """A request, checked before, as the journal keeps it: with its seed, and hashes in place of its pictures.

    → its JSON, the pictures' files by their SHA-256
    """
    if request.images is None:
        return encode(replace(request, seed=seed)), {}
    files = [base64.b64decode(image) for image in request.images]
    hashes = [hashlib.sha256(file).digest() for file in files]
    names = [f"{BY_HASH}{digest.hex()}" for digest in hashes]
    return encode(replace(request, seed=seed, images=names)), dict(zip(hashes, files, strict=True))


def put_back(stored: bytes, pictures: Mapping[bytes, bytes]) -> GenerateRequest:
    """The request as it was, and its seed. What is not there stays a hash, and is refused where the request is checked.

    Raises RequestError for what another release may have stored.
    """
    request = decode_request(stored)
    if request.images is None:
        return request
    files = {f"{BY_HASH}{digest.hex()}": base64.b64encode(file).decode() for digest, file in pictures.items()}
    return replace(request, images=[files.get(image, image) for image in request.images])
