"""Randomness that depends on its counter alone: Philox 4x32-10, and what is made of its words."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge.decoding.philox import ORDER_DOMAIN, TOKEN_DOMAIN, gumbel, philox, uniform
from host.sampling import reference as sampler

KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""Counter, key and result: the known-answer vectors that come with Random123."""


def word(value: int) -> NDArray[np.uint32]:
    return np.array([value], np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    key64 = key[0] | key[1] << 32
    words = philox((word(counter[0]), word(counter[1]), word(counter[2]), word(counter[3])), key64)
    assert " ".join(f"{int(w[0]):08x}" for w in words) == expected
    reference = sampler.philox(torch.tensor([counter]), key64)
    assert " ".join(f"{w:08x}" for w in reference[0].tolist()) == expected


def test_uniforms_lie_strictly_inside_zero_and_one() -> None:
    """The extreme words must neither reach 0 nor round up to 1 in float32, or a logarithm would be infinite."""
    positions = np.arange(400, dtype=np.uint32)[:, None]
    u = uniform(7, 3, position=positions, token=np.arange(500, dtype=np.uint32), domain=TOKEN_DOMAIN)
    assert u.dtype == np.float32
    assert u.shape == (400, 500)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / u.size) ** 0.5)
    extremes = (np.array([0, 2**23 - 1]).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    assert extremes[0] > 0
    assert extremes[1] < 1


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**53 - 1, 2**63 - 1])
def test_uniform_is_that_of_the_torch_reference(seed: int) -> None:
    positions, tokens = np.arange(0, 256, 5, dtype=np.uint32)[:, None], np.arange(0, 8192, 37, dtype=np.uint32)
    for domain in (TOKEN_DOMAIN, ORDER_DOMAIN):
        ours = uniform(seed, 11, position=positions, token=tokens, domain=domain)
        theirs = sampler.uniforms(
            seed,
            11,
            position=torch.from_numpy(positions).long(),
            token=torch.from_numpy(tokens).long(),
            domain=domain,
        )
        np.testing.assert_array_equal(ours, theirs.numpy())  # 23 random bits and a half fit float32 exactly


def test_uniform_depends_on_every_part_of_the_counter() -> None:
    """Seed (both halves), step, position, token and domain each give another draw."""
    one = np.arange(64, dtype=np.uint32)
    base = uniform(1, 2, position=one, token=word(4), domain=TOKEN_DOMAIN)
    others = [
        uniform(2, 2, position=one, token=word(4), domain=TOKEN_DOMAIN),
        uniform(1 + 2**32, 2, position=one, token=word(4), domain=TOKEN_DOMAIN),
        uniform(1, 3, position=one, token=word(4), domain=TOKEN_DOMAIN),
        uniform(1, 2, position=one + np.uint32(64), token=word(4), domain=TOKEN_DOMAIN),
        uniform(1, 2, position=one, token=word(5), domain=TOKEN_DOMAIN),
        uniform(1, 2, position=one, token=word(4), domain=ORDER_DOMAIN),
    ]
    for other in others:
        assert np.count_nonzero(other == base) <= 1  # two of 2²³ values may meet by chance


def test_gumbel_does_not_depend_on_neighbouring_draws() -> None:
    tokens = np.arange(100, dtype=np.uint32)
    together = gumbel(5, 0, np.arange(50, dtype=np.uint32)[:, None], tokens)
    alone = gumbel(5, 0, word(17)[:, None], tokens[40:41])
    assert together[17, 40] == alone[0, 0]
