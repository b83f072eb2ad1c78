"""Networks with random weights: for measuring speed at any size, and for tests."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch

from host.data.tokenizer import train_tokenizer
from host.model.conditions import PICTURE_SIZE, PICTURES, Condition
from host.model.network import Denoiser, ModelConfig
from host.train.checkpoint import Progress
from shared.manifest import TOKENIZER
from shared.tokens import FIRST_TEXT_ID


def untrained(config: ModelConfig, seed: int = 0) -> tuple[Denoiser, Progress, AbstractContextManager[Path]]:
    """A network of that shape, spread enough that its choices are decided, and a tokenizer of random words."""
    torch.manual_seed(seed)
    model = Denoiser(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    progress = Progress(
        model=config,
        objectives=dict.fromkeys(("ar", "infill", "canvas"), 1 / 3),
        schedule="linear",
        data_source="none: random weights",
    )
    return model, progress, _random_tokenizer(config.vocab_size, seed)


def random_conditions(vocab_size: int, count: int, seed: int = 0) -> list[Condition]:
    """Words of random tokens and pictures of noise, by turns."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = 1 + i // 2 % PICTURES
        words = [rng.integers(FIRST_TEXT_ID, vocab_size, 1 + k).tolist() for k in range(n)]
        pictures = torch.from_numpy(rng.random((n, 3, PICTURE_SIZE, PICTURE_SIZE), np.float32))
        made.append(Condition(pictures=pictures) if i % 2 else Condition(words))
    return made


@contextmanager
def _random_tokenizer(vocab_size: int, seed: int) -> Iterator[Path]:
    """tokenizer.json with exactly vocab_size entries, in a temporary folder."""
    letters = np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, (vocab_size, 6), dtype=np.uint8)
    words = [bytes(word).decode() for word in letters]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER
        train_tokenizer([" ".join(words)] * 2, vocab_size).save(str(path))
        yield path
