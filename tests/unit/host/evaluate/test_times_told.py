"""How often a text has the word that it was asked for, as `host.evaluate --conditions` prints it."""

from pathlib import Path

import numpy as np

from host.data.tokenizer import load_tokenizer
from host.data.words import ContentWords, stem
from host.evaluate.conditions import Wish, times_told
from host.model.conditions import Condition
from host.train.conditioner import Conditioner
from shared.manifest import TOKENIZER
from shared.tokens import BOS, PAD

BUNDLE = Path(__file__).parents[4] / "bundle" / "tinystories"


def test_times_told_is_the_mean_over_texts_that_have_the_word_its_stem_counted() -> None:
    conditioner = Conditioner(load_tokenizer(BUNDLE / TOKENIZER), ContentWords.of(["a dragon"]), None, {})
    texts = ["A dragon met two dragons. The dragon slept.", "Tom had a cake.", "The cake was red."]
    canvases = np.full((3, 64), PAD)
    for canvas, text in zip(canvases, texts, strict=True):
        ids = [BOS, *conditioner.tokenizer.encode(text, add_special_tokens=False).ids]
        canvas[: len(ids)] = ids
    wishes = [Wish(Condition(), words=(stem(word),)) for word in ("dragon", "dragon", "cake")]
    assert times_told(conditioner, wishes, canvases) == (3 + 1) / 2
    assert times_told(conditioner, wishes[1:2], canvases[1:2]) is None
