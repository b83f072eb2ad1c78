"""Decoders meet whatever a network, a disk or a stranger makes of valid input: an object, or one typed sentence.

`tests.stress.fuzz` does the same for long, and to a live daemon.
"""

import random
from pathlib import Path

import pytest

from tests.stress.fuzz import fuzz_decoders, fuzz_manifest, fuzz_with_hypothesis


@pytest.mark.slow
def test_spoilt_message_is_a_request_or_a_refusal() -> None:
    counts = fuzz_decoders(20_000, random.Random(1))
    assert counts["ok"] > 1000 and counts["bad_request"] > 1000


def test_spoilt_bytes_are_a_request_or_a_refusal() -> None:
    assert fuzz_with_hypothesis(100, random.Random(1))["bad_request"] > 50


@pytest.mark.slow
def test_spoilt_manifest_is_read_or_refused_by_name(debug_bundle: Path, tmp_path: Path) -> None:
    counts = fuzz_manifest(debug_bundle, tmp_path, 2_000, random.Random(2))
    assert counts["ok"] > 50 and counts["refused"] > 500
