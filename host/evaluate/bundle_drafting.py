"""What a bundle's drafts keep, and the texts it writes: the graphs that ship, run by the loop and backend of the edge.

Drafts change the passes that a text takes, never the text, so each is written twice, with drafting on and off.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edge.backends.ort_rows import OrtRows
from edge.decoding.blocks import Law, RowsBackend, Writing, advance
from edge.decoding.conditions import Condition
from host.data.shards import SplitName
from host.evaluate.drafting import PROMPT_TOKENS
from host.evaluate.gen_ppl import SampleScorer, Scored, print_scored
from host.evaluate.likelihood import HeldOut, held_out_files, held_out_split, ratio
from host.progress import progress
from shared.errors import ConfigError, DataError
from shared.figures import Figure
from shared.manifest import TOKENIZER, Manifest, model_name, read_manifest, verified_bytes
from shared.tokens import BOS, MASK, PAD

TEMPERATURES: Final = (0.0, 0.8, 1.0)
ON, OFF = "drafting on", "drafting off"


class Kept(Struct, frozen=True):
    """Continuations of prompts at one temperature. kept: at each depth, the share of drafts made there that were kept.

    same_texts: how many were equal, token for token, with drafting on and off.
    """

    temperature: float
    texts: int
    tokens_per_pass: Figure
    kept: tuple[float, ...]
    same_texts: int


class BundleDrafting(Struct, frozen=True):
    """Tokens per pass of at most `window` drafts, on prompts of `source`, and texts without a prompt by the defaults.

    texts: with drafting on, with drafting off, of the data; () without a scorer. same_texts: of the first two, the
    number of equal ones; None without them.
    """

    bundle: str
    source: str
    window: int
    prompted: tuple[Kept, ...]
    texts: tuple[Scored, ...] = ()
    same_texts: int | None = None


class Text(NamedTuple):
    """A finished canvas (L,), the tokens written on it (EOS counted) and the passes they took."""

    canvas: NDArray[np.int32]
    tokens: int
    passes: int
    tried: list[int]
    kept: list[int]


def write_text(
    backend: RowsBackend,
    manifest: Manifest,
    *,
    prompt: Sequence[int] = (),
    law: Law,
    condition: Condition | None = None,
) -> Text:
    """Continue a prompt's tokens by blocks."""
    canvas = np.full(manifest.model.canvas_len, MASK, np.int32)
    canvas[: 1 + len(prompt)] = [BOS, *prompt]
    w = Writing(canvas, canvas == MASK, True, law, manifest.model.vocab_size, backend.open_slot(), condition)
    while not w.done:
        advance(backend, w)
    return Text(canvas, int((canvas[1 + len(prompt) :] != PAD).sum()), w.passes, w.tried, w.kept)


def law_of(manifest: Manifest, seed: int, temperature: float, window: int) -> Law:
    """What a request gets that says no more than these."""
    assert manifest.blocks is not None
    return Law(seed, temperature, top_k=manifest.top_k, top_p=manifest.blocks.top_p, window=window)


def measure_prompted(
    backend: RowsBackend, manifest: Manifest, prompts: NDArray[np.integer], temperature: float
) -> Kept:
    """prompts (n, P), each with a seed of its own."""
    assert manifest.blocks is not None
    pairs = []
    for seed, prompt in enumerate(progress(prompts.tolist(), desc=f"temperature {temperature:g}", unit="text")):
        laws = [law_of(manifest, seed, temperature, window) for window in (manifest.blocks.window, 0)]
        pairs.append([write_text(backend, manifest, prompt=prompt, law=law) for law in laws])
    on = [pair[0] for pair in pairs]
    tried, kept = (np.sum([getattr(text, name) for text in on], 0) for name in ("tried", "kept"))
    depths = range(1, len(tried))
    return Kept(
        temperature=temperature,
        texts=len(on),
        tokens_per_pass=ratio(np.array([[text.tokens for text in on]]), np.array([[text.passes for text in on]])),
        kept=tuple(float(kept[d:].sum() / max(1, tried[d:].sum())) for d in depths),
        same_texts=sum(bool((a.canvas == b.canvas).all()) for a, b in pairs),
    )


def measure_drafting(
    bundle: Path, scorer_run: Path | None, *, source: Path | None, split: SplitName, count: int
) -> BundleDrafting:
    """Prompts are the first tokens of texts of `source`, or else of the split of the scorer's data.

    Raises ConfigError for a bundle that does not draft, DataError when no text is long enough.
    """
    manifest = read_manifest(bundle)
    if manifest.blocks is None or not manifest.blocks.window:
        raise ConfigError(f"{bundle} does not draft: it has no graph of the role draft")
    verified_bytes(bundle, TOKENIZER, manifest.tokenizer_sha256)
    backend = OrtRows(bundle, manifest, threads=0)
    scorer = None if scorer_run is None else SampleScorer.load(scorer_run, bundle / TOKENIZER)
    held_out = _held_out(bundle, scorer, source, split)
    long_enough = held_out.canvases[held_out.canvases[:, PROMPT_TOKENS + 1] != PAD][:count]
    if not len(long_enough):
        raise DataError(f"{held_out.name} has no text of more than {PROMPT_TOKENS} tokens: nothing to continue")
    prompts = long_enough[:, 1 : 1 + PROMPT_TOKENS]
    prompted = tuple(measure_prompted(backend, manifest, prompts, temperature) for temperature in TEMPERATURES)
    name = model_name(bundle)
    if scorer is None:
        return BundleDrafting(name, held_out.name, manifest.blocks.window, prompted)
    texts = {}
    for label, window in ((ON, manifest.blocks.window), (OFF, 0)):
        laws = [law_of(manifest, seed, manifest.blocks.temperature, window) for seed in range(1, count + 1)]
        written = [write_text(backend, manifest, law=law) for law in progress(laws, desc=label, unit="text")]
        texts[label] = np.stack([text.canvas for text in written])
    return BundleDrafting(
        bundle=name,
        source=held_out.name,
        window=manifest.blocks.window,
        prompted=prompted,
        texts=(*(scorer.score(*one) for one in texts.items()), scorer.score_data(source, split, count)),
        same_texts=int((texts[ON] == texts[OFF]).all(1).sum()),
    )


def _held_out(bundle: Path, scorer: SampleScorer | None, source: Path | None, split: SplitName) -> HeldOut:
    if source is not None:
        return held_out_files(source, bundle / TOKENIZER)
    assert scorer is not None
    return held_out_split(scorer.data, split=split)


def print_bundle_drafting(found: BundleDrafting) -> None:
    """The tables."""
    print(f"{found.bundle}, at most {found.window} drafts a pass, prompts of {PROMPT_TOKENS} tokens of {found.source}")
    print(f"{'temperature':>11} {'texts':>5} {'tokens per pass':>16} {'the same without':>16} drafts kept by depth")
    for one in found.prompted:
        figure = f"{one.tokens_per_pass.value:.3f} ± {one.tokens_per_pass.stderr:.3f}"
        depths = " ".join(f"{share:.2f}" for share in one.kept)
        print(f"{one.temperature:11g} {one.texts:5} {figure:>16} {one.same_texts:16} {depths}")
    if found.texts:
        print(f"\ntexts by the bundle's defaults; {found.same_texts} are the same with drafting on and off")
        print_scored(found.texts)
