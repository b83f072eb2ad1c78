"""Decoders meet whatever a network, a disk or a stranger makes of valid input: an object, or one typed sentence."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from shared.errors import BundleError, RequestError
from shared.manifest import MANIFEST, Manifest, read_manifest
from shared.messages import CancelRequest, GenerateRequest, decode_cancel, decode_line, decode_request, encode, id_of
from tests.soak import VALID
from tests.spoilt import spoilt

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["id", "prompt", "steps", "seed", "gap"]), inner),
)
DECODERS: list[Callable[[bytes], Struct]] = [decode_line, decode_request, decode_cancel]


@pytest.mark.parametrize("decode", DECODERS)
def test_a_spoilt_line_is_a_request_or_a_refusal(decode: Callable[[bytes], Struct]) -> None:
    luck = random.Random(1)
    read = 0
    for _ in range(20_000):
        line = spoilt(msgspec.json.encode(luck.choice(VALID)), luck)
        id_of(line)
        with suppress(RequestError):
            assert decode(encode(decode(line))) == decode(line)  # what is read is what would be sent
            read += 1
    assert read > 100


@given(st.binary() | json_values.map(lambda value: msgspec.json.encode(value)))
def test_so_is_anything_else(line: bytes) -> None:
    for decode in (decode_request, decode_cancel):
        with suppress(RequestError):
            assert isinstance(decode(line), GenerateRequest | CancelRequest)


def test_a_spoilt_manifest_is_read_or_refused_by_name(debug_bundle: Path, tmp_path: Path) -> None:
    luck = random.Random(2)
    whole = (debug_bundle / MANIFEST).read_bytes()
    refused = 0
    for _ in range(2_000):
        (tmp_path / MANIFEST).write_bytes(spoilt(whole, luck))
        try:
            assert isinstance(read_manifest(tmp_path), Manifest)
        except BundleError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert refused > 500
