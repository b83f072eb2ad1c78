"""Pictures of a request in the journal: hashes stand for them, and they come back."""

import base64
import hashlib

from edge.delivery.pictures import put_aside, put_back
from shared.messages import GenerateRequest, encode

FILES = [b"\x89PNG one", b"\x89PNG two", b"\x89PNG one"]


def asking(*files: bytes) -> GenerateRequest:
    return GenerateRequest(prompt="x", seed=1, images=[base64.b64encode(file).decode() for file in files])


def test_put_aside_leaves_a_hash_for_each_picture_and_each_file_once() -> None:
    request = asking(*FILES)
    stored, pictures = put_aside(request)
    assert pictures == {hashlib.sha256(file).digest(): file for file in FILES[:2]}
    assert stored.images == [f"sha256:{hashlib.sha256(file).hexdigest()}" for file in FILES]
    assert not any(base64.b64encode(file) in encode(stored) for file in FILES)
    assert put_back(stored, pictures) == request


def test_put_aside_leaves_a_request_without_pictures_alone() -> None:
    request = GenerateRequest(prompt="x", words=["dragon"])
    assert put_aside(request) == (request, {}) and put_back(request, {}) == request


def test_put_back_leaves_what_is_gone_as_no_picture() -> None:
    stored, _ = put_aside(asking(b"one"))
    assert put_back(stored, {}) == stored
