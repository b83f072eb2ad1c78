"""Whether a row's token depends on how many rows share its pass: texts drawn row by row, then read again in passes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from host.evaluate.row_graphs import RowGraphs
from shared.tokens import BOS, FIRST_TEXT_ID

LENGTH = 65
PROMPT_TOKENS = 4
TEMPERATURE = 0.8


def tokens_that_differ(graphs: RowGraphs, vocab_size: int, prompts: Sequence[int], passes: Sequence[int]) -> int:
    """Of texts written a row a pass at temperature 0.8, the tokens that passes of more rows would have drawn otherwise.

    prompts: seeds of random prompts. passes: rows in a pass. Every row of a text counts, those of the prompt as well.
    """
    different = 0
    for seed in prompts:
        rng = np.random.default_rng(seed)
        text = [BOS, *rng.integers(FIRST_TEXT_ID, vocab_size, PROMPT_TOKENS).tolist()]
        noise = rng.gumbel(size=(LENGTH, vocab_size)).astype(np.float32)
        alone = _draws(graphs, text, noise, 1)
        for rows in passes:
            different += int((_draws(graphs, text, noise, rows) != alone).sum())
    return different


def _draws(graphs: RowGraphs, text: list[int], noise: NDArray[np.float32], rows: int) -> NDArray[np.int64]:
    """The token drawn at each row of a pass; a text that is too short goes on with them.  → (LENGTH − 1,)"""
    cache, drawn = graphs.empty(LENGTH), list[int]()
    for start in range(0, LENGTH - 1, rows):
        places = range(start, min(start + rows, LENGTH - 1))
        logits, _ = graphs.append(cache, [text[i] for i in places], places, range(len(places)))
        drawn += (logits / TEMPERATURE + noise[list(places)]).argmax(-1).tolist()
        if len(text) <= len(drawn):
            text.append(drawn[-1])
    return np.array(drawn)
