"""The tokens with the best noisy scores, all that most draws need: by the compiled library, or numpy.

V: vocabulary.
"""

import numpy as np

from edge.decoding.types import Floats, Ids
from edge.native import LANES, library


def winners(scores: Floats, noise: Floats, temperature: float) -> tuple[Ids, Ids]:
    """Of each row, the token with the best score / temperature + noise, the lower one of equals, and its rank: how many
    tokens score as well or better, without noise; 0 where its score is not a finite number.

    scores, noise (M, V) → (M,), (M,). temperature: 0 for the best score itself.
    """
    native, (count, vocab_size) = library(), scores.shape
    fits = scores.shape == noise.shape and all(
        array.dtype == np.float32 and array.flags.c_contiguous for array in (scores, noise)
    )
    if native is None or vocab_size % LANES or not fits:
        return _by_numpy(scores, noise, temperature)
    token, rank = np.empty((2, count), np.int32)
    native.draw(
        scores.ctypes.data, noise.ctypes.data, count, vocab_size, temperature, token.ctypes.data, rank.ctypes.data
    )
    return token, rank


def _by_numpy(scores: Floats, noise: Floats, temperature: float) -> tuple[Ids, Ids]:
    noisy = scores if temperature == 0 else scores / np.float32(temperature) + noise
    token: Ids = noisy.argmax(1).astype(np.int32)  # which takes what is not a number for the best
    own = scores[np.arange(len(token)), token]
    # one by one: along an axis numpy sums integers, which takes twice as long
    rank = np.array([np.count_nonzero(row >= best) for row, best in zip(scores, own, strict=True)], np.int32)
    rank[~np.isfinite(own)] = 0
    return token, rank


def filtered(scaled: Floats, noisy: Floats, *, top_k: int, top_p: float) -> int:
    """The draw of one row (V,) among the tokens that top-k and top-p keep."""
    least = np.partition(scaled, scaled.size - top_k)[scaled.size - top_k]
    ids = np.flatnonzero(scaled >= least)
    ids = ids[np.argsort(-scaled[ids], kind="stable")][:top_k]
    p = np.exp(scaled[ids] - scaled[ids[0]])
    p /= p.sum()
    ids = ids[np.cumsum(p) - p < top_p]  # keeps the first candidate to reach top_p
    return int(ids[noisy[ids] == noisy[ids].max()].min())
