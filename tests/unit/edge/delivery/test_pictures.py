"""Pictures of a request in the journal: hashes stand for them, and they come back."""

import base64
import hashlib

from msgspec.structs import replace

from edge.delivery.pictures import put_aside, put_back
from shared.messages import GenerateRequest, decode_request, encode

FILES = [b"\x89PNG one", b"\x89PNG two", b"\x89PNG one"]


def asking(*files: bytes) -> GenerateRequest:
    return GenerateRequest(prompt="x", seed=7, images=[base64.b64encode(file).decode() for file in files])


def test_put_aside_leaves_a_hash_for_each_picture_and_each_file_once() -> None:
    request = asking(*FILES)
    stored, pictures = put_aside(replace(request, seed=None), seed=7)
    assert pictures == {hashlib.sha256(file).digest(): file for file in FILES[:2]}
    assert decode_request(stored).images == [f"sha256:{hashlib.sha256(file).hexdigest()}" for file in FILES]
    assert put_back(stored, pictures) == request


def test_put_aside_leaves_a_request_without_pictures_alone() -> None:
    request = GenerateRequest(prompt="x", words=["dragon"], seed=7)
    assert put_aside(request, 7) == (encode(request), {}) and put_back(encode(request), {}) == request


def test_put_back_leaves_what_is_gone_as_no_picture() -> None:
    stored, _ = put_aside(asking(b"one"), 7)
    assert put_back(stored, {}) == decode_request(stored)
