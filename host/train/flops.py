"""Operations in the matrix products of a batch, by which speed is compared with a peak."""

import numpy as np

from host.model.network import ModelConfig
from host.train.batches import Batch


def batch_gflop(config: ModelConfig, batch: Batch) -> float:
    """10⁹ operations of the matrix products that a batch needs, forward and backward (twice the forward).

    A block's linear layers hold 12·D² weights, its attention has two products of L × L × D for the L active positions
    of a row; only scored positions pass the LM head. The last block needs its 9·D² weights after attention, and its
    queries, for scored positions alone.
    """
    d, scored = config.d_model, sum(part.at.numel() for part in batch.parts)
    lengths = np.concatenate([part.lengths.numpy() for part in batch.parts]).astype(np.float64)
    blocks = (config.layers - 1) * (2 * 12 * d * d * lengths.sum() + 4 * d * (lengths**2).sum())
    of_each = [part.at // part.rows.tokens.shape[1] for part in batch.parts]
    attended = sum(part.lengths.numpy()[row.numpy()].sum() for part, row in zip(batch.parts, of_each, strict=True))
    last = 2 * (2 * d * d * lengths.sum() + 10 * d * d * scored) + 4 * d * attended
    return float(3 * (blocks + last + 2 * d * config.vocab_size * scored)) / 1e9
