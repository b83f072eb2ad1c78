"""A model on held-out text: NELBO, bits per byte, masked cross-entropy, exact likelihood, with standard errors."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from host.data.shards import DataFolder, Split, SplitName
from host.data.sources import read_texts
from host.data.tokenizer import encode_stories, load_tokenizer, token_byte_lengths
from host.evaluate.scorers import Scorer, TorchScorer
from host.model.diffusion import Corrupted, autoregressive_nats, corrupt, counted_tokens, low_discrepancy_times
from host.model.network import Denoiser
from host.progress import progress
from shared.errors import DataError
from shared.figures import Figure
from shared.manifest import Evaluation
from shared.schedule import ScheduleName, loss_weight, mask_prob, time_of_masked_fraction
from shared.tokens import PAD

DRAWS: Final = 8
STORIES: Final = 512  # for a standard error of about one per cent
BOOTSTRAPS: Final = 1000
SEED: Final = 20_000


@dataclass(frozen=True)
class HeldOut:
    """Text to measure on."""

    name: str
    canvases: np.ndarray  # (n, L) uint16
    token_bytes: np.ndarray  # (V,) bytes each id spells

    @property
    def text_bytes(self) -> np.ndarray:
        """Bytes of the text kept, of each story.  → (n,)"""
        spelled: np.ndarray = self.token_bytes[self.canvases].sum(1)
        return spelled


def evaluate(scorer: Scorer, held_out: HeldOut, schedule: ScheduleName, draws: int = DRAWS) -> Evaluation:
    """NELBO and masked cross-entropy of every story in `draws` draws of t (low-discrepancy) and masks.

    Standard errors combine the Monte Carlo error over draws with a bootstrap over stories.
    """
    x0 = torch.from_numpy(held_out.canvases.astype(np.int64))
    n = len(x0)
    nelbo = np.zeros((draws, n))  # nats of each story
    masked, masked_tokens = np.zeros((draws, n)), np.zeros((draws, n))
    with progress(total=2 * draws * n, desc=scorer.name, unit=" canvases", unit_scale=True) as bar:
        for draw in range(draws):
            noise, t = _draw(n, draw)
            nelbo[draw] = _nelbos(scorer, x0, t=t, noise=noise, schedule=schedule, done=bar.update)
            for rows, batch in _batches(x0, t, noise=noise, schedule="cosine", size=scorer.batch_rows):
                clean = x0[rows, : batch.xt.shape[1]]
                text = Corrupted(batch.xt, batch.scored & (clean != PAD), batch.active_len)
                fractions = [mask_prob("cosine", value) for value in t[rows].tolist()]
                times = [time_of_masked_fraction(schedule, fraction) for fraction in fractions]
                losses, row = scorer.losses(text, clean, times)
                masked[draw, rows] = _row_sums(losses, row, len(rows))
                masked_tokens[draw, rows] = text.scored.sum(1).numpy()
                bar.update(len(rows))
    tokens = counted_tokens(x0).numpy()
    nats = ratio(nelbo, np.broadcast_to(tokens, nelbo.shape))
    bits = ratio(nelbo / np.log(2), np.broadcast_to(held_out.text_bytes, nelbo.shape))
    return Evaluation(
        graph=scorer.name,
        source=held_out.name,
        stories=n,
        text_tokens=int(tokens.sum()),
        text_bytes=int(held_out.text_bytes.sum()),
        nelbo_nats_per_token=nats,
        bits_per_byte=bits,
        masked_cross_entropy=ratio(masked, masked_tokens),
    )


def nelbo_per_token(scorer: Scorer, held_out: HeldOut, schedule: ScheduleName) -> float:
    """The NELBO of `evaluate` in one draw, by half of its passes."""
    x0 = torch.from_numpy(held_out.canvases.astype(np.int64))
    noise, t = _draw(len(x0), 0)
    return float(_nelbos(scorer, x0, t=t, noise=noise, schedule=schedule).sum() / counted_tokens(x0).sum())


def _draw(n: int, draw: int) -> tuple[np.random.Generator, np.ndarray]:
    """Noise, and a time for each of n stories."""
    noise = np.random.default_rng((SEED, draw))
    return noise, np.array(low_discrepancy_times(n, noise.random()))[noise.permutation(n)]


def _nelbos(
    scorer: Scorer,
    x0: Tensor,
    *,
    t: np.ndarray,
    noise: np.random.Generator,
    schedule: ScheduleName,
    done: Callable[[int], object] = lambda stories: None,
) -> np.ndarray:
    """NELBO of each story in nats, of one draw.  x0 (n, L) → (n,)"""
    nelbo = np.zeros(len(x0))
    for rows, batch in _batches(x0, t, noise=noise, schedule=schedule, size=scorer.batch_rows):
        times = t[rows].tolist()
        losses, row = scorer.losses(batch, x0[rows, : batch.xt.shape[1]], times)
        weights = np.array([loss_weight(schedule, value) for value in times])
        nelbo[rows] = weights * _row_sums(losses, row, len(rows))
        done(len(rows))
    return nelbo


def _batches(
    x0: Tensor, t: np.ndarray, *, noise: np.random.Generator, schedule: ScheduleName, size: int
) -> Iterator[tuple[np.ndarray, Corrupted]]:
    """Corrupted batches of rows of similar length, cut to the longest."""
    whole = corrupt(x0, torch.from_numpy(noise.random(x0.shape, dtype=np.float32)), t.tolist(), schedule)
    for part in whole.active_len.argsort(stable=True).split(size):
        longest = int(whole.active_len[part].max())
        yield part.numpy(), Corrupted(whole.xt[part, :longest], whole.scored[part, :longest], whole.active_len[part])


def _row_sums(losses: Tensor, rows: Tensor, n: int) -> np.ndarray:
    sums: np.ndarray = np.bincount(rows.numpy(), weights=losses.double().numpy(), minlength=n)
    return sums


def ratio(above: np.ndarray, below: np.ndarray) -> Figure:
    """Ratio of sums over draws and stories (draws, n), with its standard error."""
    draws, n = above.shape
    total = below.sum()
    if total == 0:
        raise DataError("too little text to measure on: no token of it was masked; give more stories or --draws")
    value = above.sum() / total
    # Deviations from the common ratio, since a draw of little text may hold no masked token to divide by.
    deviation = (above - value * below) / total  # (draws, n)
    monte_carlo = deviation.sum(1).std(ddof=1) * np.sqrt(draws) if draws > 1 else 0.0
    stories = np.random.default_rng(SEED).integers(0, n, (BOOTSTRAPS, n))
    bootstrap = deviation.sum(0)[stories].sum(1).std()
    return Figure(float(value), float(np.hypot(monte_carlo, bootstrap)))


def held_out_files(source: Path, tokenizer_path: Path, stories: int | None = None) -> HeldOut:
    """Texts of a file or folder, through the model's tokenizer; DataError when there is none."""
    tokenizer = load_tokenizer(tokenizer_path)
    texts = list(itertools.islice(read_texts(source), stories))
    if not texts:
        raise DataError(f"{source} holds no text")
    canvases = encode_stories(tokenizer, texts)
    return HeldOut(source.name, canvases, token_byte_lengths(tokenizer))


def held_out_split(folder: DataFolder, stories: int | None = None, split: SplitName = "valid") -> HeldOut:
    """The first stories of a data folder's split: `valid` to choose by, `test` to report."""
    canvases: Split = getattr(folder, split)
    n = len(canvases) if stories is None else min(stories, len(canvases))
    lengths = token_byte_lengths(load_tokenizer(folder.tokenizer_path))
    return HeldOut(f"{folder.meta.source}, {split} split", canvases.take(np.arange(n)), lengths)


def print_table(evaluations: Sequence[Evaluation]) -> None:
    """One line for each model: value ± standard error; those of fewer stories than the first say so."""
    print(f"{'graph':32} {'NELBO, nats per token':>22} {'bits per byte':>18} {'masked cross-entropy':>22}")
    for e in evaluations:
        cells = [
            f"{f.value:.4f} ± {f.stderr:.4f}" for f in (e.nelbo_nats_per_token, e.bits_per_byte, e.masked_cross_entropy)
        ]
        few = "" if e.stories == evaluations[0].stories else f"  on the first {e.stories} stories"
        print(f"{e.graph:32} {cells[0]:>22} {cells[1]:>18} {cells[2]:>22}{few}")
    e = evaluations[0]
    print(f"on {e.source}: {e.stories:,} stories, {e.text_tokens:,} tokens, {e.text_bytes:,} bytes")


@torch.no_grad()
def token_nats(model: Denoiser, canvases: np.ndarray) -> np.ndarray:
    """Exact negative log-likelihood of each token under the autoregressive law, 0 of BOS and PAD.  (n, L) → (n, L)"""
    x0 = torch.from_numpy(canvases.astype(np.int64))
    nats = np.zeros(x0.shape)
    lengths = (x0 != PAD).sum(1)
    for rows in lengths.argsort(stable=True).split(TorchScorer.batch_rows):
        longest = int(lengths[rows].max())
        nats[rows.numpy(), :longest] = autoregressive_nats(model, x0[rows, :longest]).numpy()
    return nats


def exact_likelihood(token_nats: np.ndarray, held_out: HeldOut) -> tuple[Figure, Figure]:
    """The autoregressive law, by `token_nats` of held-out text.  → nats per token, bits per byte"""
    nats = token_nats.sum(1)[None]
    tokens = counted_tokens(torch.from_numpy(held_out.canvases.astype(np.int64))).numpy()[None]
    return ratio(nats, tokens), ratio(nats / np.log(2), held_out.text_bytes[None])
