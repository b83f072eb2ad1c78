"""Every law that a network has learned, measured on held-out text, with standard errors."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

import msgspec

from host.device import mixed_precision_dtype
from host.evaluate.drafting import Drafting, evaluate_drafting, long_enough, print_drafting
from host.evaluate.infilling import Infilling, evaluate_infilling, print_infilling
from host.evaluate.likelihood import HeldOut, evaluate, exact_likelihood, print_table, token_nats
from host.evaluate.scorers import TorchScorer
from host.model.network import Denoiser
from host.train.checkpoint import Progress
from shared.errors import ConfigError
from shared.figures import Figure
from shared.manifest import Evaluation, LawFigures

DRAFTED_STORIES: Final = 64


class Laws(msgspec.Struct, frozen=True, omit_defaults=True):
    """nats_per_token, bits_per_byte: exact, of the autoregressive law. None: the run has not learned that objective."""

    source: str
    nats_per_token: Figure | None = None
    bits_per_byte: Figure | None = None
    infilling: Infilling | None = None
    canvas: Evaluation | None = None
    drafting: Sequence[Drafting] = ()


def measure_laws(model: Denoiser, progress: Progress, *, held_out: HeldOut, draws: int, drafts: bool) -> Laws:
    """Measure the laws of a run; ConfigError for `drafts` without a drafter."""
    if drafts and model.drafter is None:
        raise ConfigError("--drafts needs a run with a drafter: train one with host.train --stage drafter --init RUN")
    learned = progress.objectives
    own = token_nats(model, held_out.canvases) if "ar" in learned or "infill" in learned else None
    nats, bits = (None, None) if own is None or "ar" not in learned else exact_likelihood(own, held_out)
    gaps = None
    if own is not None and "infill" in learned:
        gaps = evaluate_infilling(model, held_out, token_nats=own, draws=draws, canvas="canvas" in learned)
    dtype = mixed_precision_dtype(model.device)
    return Laws(
        source=held_out.name,
        nats_per_token=nats,
        bits_per_byte=bits,
        infilling=gaps,
        canvas=evaluate(TorchScorer(model), held_out, progress.schedule, draws) if "canvas" in learned else None,
        drafting=evaluate_drafting(model, held_out, dtype=dtype) if drafts else (),
    )


def law_figures(model: Denoiser, held_out: HeldOut, learned: Collection[str]) -> LawFigures:
    """What a bundle's manifest says of the laws in float32; drafts on the first stories, with all the drafter makes.

    Without drafts where these stories are too short.
    """
    own = token_nats(model, held_out.canvases)
    nats, bits = exact_likelihood(own, held_out)
    gaps = None
    if "infill" in learned:
        gaps = evaluate_infilling(model, held_out, token_nats=own, draws=0, canvas=False)
    kept = None
    few = replace(held_out, canvases=held_out.canvases[:DRAFTED_STORIES])
    if model.drafter is not None and len(long_enough(few)):
        drafting = evaluate_drafting(model, few, (0.0, 0.8, 1.0))
        kept = {f"{one.temperature:g}": one.tokens_per_pass.value for one in drafting}  # the widest window is the last
    return LawFigures(
        graph=TorchScorer.name,
        source=held_out.name,
        stories=len(held_out.canvases),
        left_to_right_nats_per_token=nats,
        left_to_right_bits_per_byte=bits,
        infilling_nats_per_gap_token=gaps.infilling if gaps else None,
        infilling_blind_nats_per_gap_token=gaps.autoregressive if gaps else None,
        tokens_per_pass=kept,
    )


def print_law_figures(figures: Sequence[LawFigures]) -> None:
    """One line for each graph."""
    for one in figures:
        nats, bits, gaps = (
            "none" if figure is None else f"{figure.value:.4f} ± {figure.stderr:.4f}"
            for figure in (
                one.left_to_right_nats_per_token,
                one.left_to_right_bits_per_byte,
                one.infilling_nats_per_gap_token,
            )
        )
        print(f"{one.graph}: {nats} nats per token, {bits} bits per byte; {gaps} nats per gap token")
        if one.tokens_per_pass:
            print("  tokens per pass: " + ", ".join(f"{n:.2f} at {t}" for t, n in one.tokens_per_pass.items()))


def print_laws(laws: Laws, held_out: HeldOut) -> None:
    """A few lines for each law."""
    if laws.nats_per_token and laws.bits_per_byte:
        nats, bits = laws.nats_per_token, laws.bits_per_byte
        print(
            f"autoregressive: {nats.value:.4f} ± {nats.stderr:.4f} nats per token, "
            f"{bits.value:.4f} ± {bits.stderr:.4f} bits per byte"
        )
    if laws.infilling:
        print_infilling(laws.infilling)
    if laws.canvas:
        print_table([laws.canvas])
    else:
        print(f"on {held_out.name}: {len(held_out.canvases):,} stories, exact likelihood")
    if laws.drafting:
        print_drafting(laws.drafting)
