"""Judge samples: generative perplexity by an autoregressive run, always beside what betrays a gamed one.

Dull or repeated text is easy to predict, so that its perplexity is low. Read it with the entropy, the distinct n-grams,
the repetition and the lengths of the samples, each beside the same figure of as many stories from the data.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from msgspec import Struct

from host.device import mixed_precision_dtype
from host.evaluate.likelihood import HeldOut, held_out_files, held_out_split, ratio
from host.model.diffusion import autoregressive_sums, counted_tokens
from host.model.network import Denoiser
from host.sampling.many import sample_autoregressive, sample_many
from host.sampling.reference import TOP_K, Settings
from host.train.checkpoint import BEST, LAST
from host.train.run_folder import data_of, load_run
from shared.errors import ConfigError, DataError
from shared.manifest import TOKENIZER, Figure, SamplingDefaults, sha256_of
from shared.tokens import FIRST_TEXT_ID, PAD

BATCH_ROWS: Final = 16
REPEATED: Final = 4  # tokens in a row that count as repetition when the text has had them before
BINS: Final = 8  # of the length histogram


class Judged(Struct, frozen=True):
    """What a set of texts is like; token by token, text tokens only but for the perplexity, which counts EOS.

    distinct: distinct n-grams ÷ n-grams, of n = 1, 2, 3, over all texts: compare only sets of one size. repetition:
    part of a text's 4-grams that it has had before. lengths: texts in each eighth of the canvas.
    """

    name: str
    texts: int
    perplexity: Figure
    unigram_entropy_bits: float
    distinct: tuple[float, float, float]
    repetition: float
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Judge:
    """An autoregressive run that scores canvases."""

    model: Denoiser
    tokenizer: Path

    @classmethod
    def load(cls, run: Path, tokenizer: Path) -> "Judge":
        """The run's averaged weights; ConfigError when it is no judge for text of that tokenizer."""
        model, progress = load_run(run)
        if "ar" not in progress.objectives:
            raise ConfigError(f"{run} cannot judge: it did not learn the objective ar (host.train --objectives ar)")
        if sha256_of(tokenizer) != sha256_of(run / TOKENIZER):
            raise DataError(f"{run} cannot judge these samples: its tokenizer is another one than {tokenizer}")
        return cls(model, run / TOKENIZER)

    def judge(self, name: str, canvases: np.ndarray) -> Judged:
        """canvases (n, L): BOS, text, EOS, PAD."""
        nats, tokens = story_nats(self.model, canvases), (canvases >= FIRST_TEXT_ID).sum(1)
        counted = counted_tokens(torch.from_numpy(canvases.astype(np.int64))).numpy()
        mean = ratio(nats[None], counted[None])
        texts = [row[1 : 1 + n].tolist() for row, n in zip(canvases, tokens, strict=True)]
        frequency = np.bincount([token for text in texts for token in text], minlength=1)
        p = frequency[frequency > 0] / max(1, frequency.sum())
        bins = np.minimum(tokens * BINS // canvases.shape[1], BINS - 1)
        return Judged(
            name=name,
            texts=len(canvases),
            perplexity=Figure(float(np.exp(mean.value)), float(np.exp(mean.value) * mean.stderr)),
            unigram_entropy_bits=float(-(p * np.log2(p)).sum()) + 0.0,
            distinct=(_distinct(texts, 1), _distinct(texts, 2), _distinct(texts, 3)),
            repetition=_repetition(texts),
            lengths=tuple(np.bincount(bins, minlength=BINS).tolist()),
        )

    def data(self, source: Path | None, run: Path, count: int) -> Judged:
        """As many stories of a file, or else of the validation split of the judge's own data."""
        if source is not None:
            held_out = held_out_files(source, self.tokenizer, count)
        else:
            held_out = held_out_split(data_of(run), count)
        return self.judge("data", held_out.canvases)


@torch.no_grad()
def story_nats(model: Denoiser, canvases: np.ndarray) -> np.ndarray:
    """Exact negative log-likelihood of each canvas.  (n, L) → (n,)"""
    x0 = torch.from_numpy(canvases.astype(np.int64))
    nats = np.zeros(len(x0))
    lengths = (x0 != PAD).sum(1)
    for rows in lengths.argsort(stable=True).split(BATCH_ROWS):
        nats[rows.numpy()] = autoregressive_sums(model, x0[rows, : int(lengths[rows].max())]).double().numpy()
    return nats


def likelihood(model: Denoiser, held_out: HeldOut) -> tuple[Figure, Figure]:
    """An autoregressive model's yardsticks on held-out text.  → nats a token, bits a byte"""
    nats = story_nats(model, held_out.canvases)[None]
    tokens = counted_tokens(torch.from_numpy(held_out.canvases.astype(np.int64))).numpy()[None]
    return ratio(nats, tokens), ratio(nats / np.log(2), held_out.text_bytes[None])


def _grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def _distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    grams = list(itertools.chain.from_iterable(_grams(text, n) for text in texts))
    return len(set(grams)) / max(1, len(grams))


def _repetition(texts: Sequence[Sequence[int]]) -> float:
    grams = [_grams(text, REPEATED) for text in texts]
    return 1 - sum(len(set(g)) for g in grams) / max(1, sum(len(g) for g in grams)) if any(grams) else 0.0


def length_distance(a: Judged, b: Judged) -> float:
    """Total variation between two length histograms: 0 the same, 1 nothing in common."""
    return sum(abs(x / a.texts - y / b.texts) for x, y in zip(a.lengths, b.lengths, strict=True)) / 2


def print_judged(rows: Sequence[Judged]) -> None:
    """One line a set of texts, then the length histograms."""
    print(
        f"{'texts':32} {'number':>6} {'perplexity':>16} {'entropy, bits':>13} {'distinct-1/2/3':>17} {'repetition':>10}"
    )
    for row in rows:
        distinct = "/".join(f"{value:.3f}" for value in row.distinct)
        perplexity = f"{row.perplexity.value:.2f} ± {row.perplexity.stderr:.2f}"
        print(f"{row.name:32} {row.texts:6} {perplexity:>16} {row.unigram_entropy_bits:13.2f} {distinct:>17} "
              f"{row.repetition:10.1%}")  # fmt: skip
    print("length in eighths of the canvas, part of the texts")
    for row in rows:
        print(f"{row.name:32} " + " ".join(f"{n / row.texts:6.1%}" for n in row.lengths))


def canvases_of(samples: Path, judge: Judge, count: int) -> tuple[str, np.ndarray]:
    """Texts of a file or folder, or fresh samples of a run with a bundle's usual settings.  → name, (n, L)"""
    if not any((samples / file).is_file() for file in (LAST, BEST)):
        held_out = held_out_files(samples, judge.tokenizer, count)
        return held_out.name, held_out.canvases
    model, progress = load_run(samples)
    dtype = mixed_precision_dtype(torch.device("cpu"))
    usual = SamplingDefaults()
    if "canvas" not in progress.objectives:  # as cold as the others: colder text is easier to predict
        drawn = sample_autoregressive(model, range(count), usual.temperature, dtype)
        return f"{samples.name}, sampled", drawn.numpy()
    settings = [
        Settings(
            seed, usual.steps, usual.selection, usual.temperature, min(TOP_K, model.config.vocab_size), usual.top_p
        )
        for seed in range(count)
    ]
    sampled = sample_many(model, progress.schedule, settings, dtype)
    return f"{samples.name}, sampled", torch.stack([one.canvas for one in sampled]).numpy()


def judge_samples(samples: Path, judge_run: Path, source: Path | None, count: int) -> list[Judged]:
    """Samples, and as many stories of `source` or else of the judge's own validation split."""
    own = samples / TOKENIZER
    judge = Judge.load(judge_run, own if own.is_file() else judge_run / TOKENIZER)
    name, canvases = canvases_of(samples, judge, count)
    return [judge.judge(name, canvases), judge.data(source, judge_run, len(canvases))]
