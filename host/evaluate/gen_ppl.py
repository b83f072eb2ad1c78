"""Generative perplexity (gen-PPL): the perplexity of samples under an autoregressive run.

Dull or repeated text is easy to predict, so its perplexity is low. It is therefore shown with the entropy, distinct
n-grams, repetition, non-words and lengths of the samples, and the same figures of as many stories of the data.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from msgspec import Struct
from tokenizers import Tokenizer

from host.data.shards import DataFolder, SplitName
from host.data.tokenizer import identity_of, load_tokenizer
from host.device import mixed_precision_dtype
from host.evaluate.likelihood import held_out_files, held_out_split, ratio, token_nats
from host.model.diffusion import counted_tokens
from host.model.network import Denoiser
from host.progress import progress
from host.sampling.many import sample_autoregressive, sample_many
from host.sampling.reference import TOP_K, Settings
from host.train.checkpoint import BEST, LAST
from host.train.run_folder import data_of, load_run
from shared.errors import ConfigError, DataError
from shared.figures import Figure
from shared.manifest import TOKENIZER, SamplingDefaults
from shared.tokens import EOS, FIRST_TEXT_ID

COUNT: Final = 200  # texts of a setting
REPEATED: Final = 4  # n of the n-grams that count as repetition
BINS: Final = 8  # of the length histogram
STORIES_AT_ONCE: Final = 4096

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


class Scored(Struct, frozen=True):
    """Figures of a set of texts, of text tokens; the perplexity counts EOS too.

    distinct: distinct n-grams ÷ n-grams for n = 1, 2, 3 over all texts; comparable between sets of one size only.
    repetition: share of 4-grams that occurred earlier in the same text. non_words: share of words that are not in the
    training text. lengths: histogram, texts in each eighth of the canvas.
    """

    name: str
    texts: int
    perplexity: Figure
    unigram_entropy_bits: float
    distinct: tuple[float, float, float]
    repetition: float
    non_words: float
    lengths: tuple[int, ...]


def words_of(tokenizer: Tokenizer, canvases: np.ndarray) -> Iterator[str]:
    """The words of canvases (n, L) in lower case, without the last one of a text cut at the end of its canvas."""
    ids = [row[row >= FIRST_TEXT_ID].tolist() for row in canvases]
    for row, text in zip(canvases, tokenizer.decode_batch(ids), strict=True):
        words = _WORD.findall(text.lower())
        yield from words if EOS in row else words[:-1]


def training_words(data: DataFolder) -> frozenset[str]:
    """The distinct words of the training split."""
    tokenizer, words, n = load_tokenizer(data.tokenizer_path), set[str](), len(data.train)
    for start in progress(range(0, n, STORIES_AT_ONCE), desc="training words", unit="block"):
        words.update(words_of(tokenizer, data.train.take(np.arange(start, min(n, start + STORIES_AT_ONCE)))))
    return frozenset(words)


@dataclass(frozen=True)
class SampleScorer:
    """An autoregressive run that scores texts, and the words of its training data."""

    model: Denoiser
    tokenizer: Path
    data: DataFolder
    words: frozenset[str]

    @classmethod
    def load(cls, run: Path, tokenizer: Path) -> "SampleScorer":
        """The run's EMA weights; ConfigError when it cannot score text of that tokenizer."""
        model, state = load_run(run)
        if "ar" not in state.objectives:
            raise ConfigError(
                f"{run} cannot score texts: it did not learn the objective ar (host.train --objectives ar)"
            )
        if identity_of(tokenizer) != identity_of(run / TOKENIZER):
            raise DataError(f"{run} cannot score these samples: its tokenizer is another one than {tokenizer}")
        data = data_of(run)
        return cls(model, run / TOKENIZER, data, training_words(data))

    def score(self, name: str, canvases: np.ndarray) -> Scored:
        """canvases (n, L): BOS, text, EOS, PAD."""
        nats, tokens = token_nats(self.model, canvases).sum(1), (canvases >= FIRST_TEXT_ID).sum(1)
        counted = counted_tokens(torch.from_numpy(canvases.astype(np.int64))).numpy()
        mean = ratio(nats[None], counted[None])
        texts = [row[1 : 1 + n].tolist() for row, n in zip(canvases, tokens, strict=True)]
        frequency = np.bincount([token for text in texts for token in text], minlength=1)
        p = frequency[frequency > 0] / max(1, frequency.sum())
        bins = np.minimum(tokens * BINS // canvases.shape[1], BINS - 1)
        words = list(words_of(load_tokenizer(self.tokenizer), canvases))
        return Scored(
            name=name,
            texts=len(canvases),
            perplexity=Figure(float(np.exp(mean.value)), float(np.exp(mean.value) * mean.stderr)),
            unigram_entropy_bits=float(-(p * np.log2(p)).sum()) + 0.0,
            distinct=(distinct(texts, 1), distinct(texts, 2), distinct(texts, 3)),
            repetition=_repetition(texts),
            non_words=sum(word not in self.words for word in words) / max(1, len(words)),
            lengths=tuple(np.bincount(bins, minlength=BINS).tolist()),
        )

    def score_data(self, source: Path | None, split: SplitName, count: int) -> Scored:
        """As many stories of a file, or else of the split of the scorer's own data."""
        if source is not None:
            return self.score(source.name, held_out_files(source, self.tokenizer, count).canvases)
        return self.score(f"data, {split}", held_out_split(self.data, count, split).canvases)


def _grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams ÷ n-grams over all texts."""
    grams = list(itertools.chain.from_iterable(_grams(text, n) for text in texts))
    return len(set(grams)) / max(1, len(grams))


def _repetition(texts: Sequence[Sequence[int]]) -> float:
    grams = [_grams(text, REPEATED) for text in texts]
    return 1 - sum(len(set(g)) for g in grams) / max(1, sum(len(g) for g in grams)) if any(grams) else 0.0


def length_distance(a: Scored, b: Scored) -> float:
    """Total variation distance of two length histograms: 0 equal, 1 disjoint."""
    return sum(abs(x / a.texts - y / b.texts) for x, y in zip(a.lengths, b.lengths, strict=True)) / 2


COLUMNS: Final = f"{'gen-PPL':>16} {'entropy, bits':>13} {'distinct-1/2/3':>17} {'repetition':>10} {'non-words':>9}"


def cells(row: Scored) -> str:
    """The figures under COLUMNS."""
    distinct = "/".join(f"{value:.3f}" for value in row.distinct)
    perplexity = f"{row.perplexity.value:.2f} ± {row.perplexity.stderr:.2f}"
    entropy, repetition, non_words = row.unigram_entropy_bits, row.repetition, row.non_words
    return f"{perplexity:>16} {entropy:13.2f} {distinct:>17} {repetition:10.1%} {non_words:9.2%}"


def print_scored(rows: Sequence[Scored]) -> None:
    """One line for each set of texts, then the length histograms."""
    print(f"{'texts':32} {'number':>6} {COLUMNS}")
    for row in rows:
        print(f"{row.name:32} {row.texts:6} {cells(row)}")
    print("length in eighths of the canvas, part of the texts")
    for row in rows:
        print(f"{row.name:32} " + " ".join(f"{n / row.texts:6.1%}" for n in row.lengths))


def canvases_of(samples: Path, scorer: SampleScorer, count: int) -> tuple[str, np.ndarray]:
    """Texts of a file or folder, or fresh samples of a run with a bundle's usual settings.  → name, (n, L)

    An autoregressive run samples with the same temperature, top-k and top-p, so that perplexities compare.
    """
    if not any((samples / file).is_file() for file in (LAST, BEST)):
        held_out = held_out_files(samples, scorer.tokenizer, count)
        return held_out.name, held_out.canvases
    model, state = load_run(samples)
    dtype = mixed_precision_dtype(model.device)
    usual, top_k = SamplingDefaults(), min(TOP_K, model.config.vocab_size)
    settings = [
        Settings(seed, usual.steps, usual.selection, usual.temperature, top_k, usual.top_p) for seed in range(count)
    ]
    if "ar" in state.objectives:
        return f"{samples.name}, sampled", sample_autoregressive(model, settings, dtype=dtype).numpy()
    sampled = sample_many(model, state.schedule, settings, dtype)
    return f"{samples.name}, sampled", torch.stack([one.canvas for one in sampled]).numpy()


def score_samples(
    samples: Path, scorer_run: Path, *, source: Path | None, split: SplitName, count: int
) -> tuple[Scored, Scored]:
    """Samples, and as many stories of `source` or else of a split of the scorer's own data."""
    own = samples / TOKENIZER
    scorer = SampleScorer.load(scorer_run, own if own.is_file() else scorer_run / TOKENIZER)
    name, canvases = canvases_of(samples, scorer, count)
    return scorer.score(name, canvases), scorer.score_data(source, split, len(canvases))
