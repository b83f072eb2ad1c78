"""Conditions on held-out stories: how often texts contain what was asked for, and what the law gains by knowing it.

Each figure has its control beside it: texts that were not asked, the law without a condition, and the law given the
condition of another story.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import torch

from host.data.words import normalized, stem
from host.evaluate.gen_ppl import SampleScorer, distinct
from host.evaluate.likelihood import SEED, HeldOut, ratio
from host.evaluate.scorers import TorchScorer
from host.model.conditions import Condition, Given, Memory
from host.model.diffusion import autoregressive_nats
from host.model.network import Denoiser
from host.sampling.many import sample_autoregressive
from host.sampling.reference import TOP_K, Settings
from host.train.conditioner import Conditioner, text_of
from shared.conditions import AskedFor, ConditionalLaw
from shared.figures import Figure
from shared.tokens import FIRST_TEXT_ID, PAD

GUIDANCES: Final = (0.0, 1.0, 2.0)
NUMBERS: Final = (1, 2, 3)  # words, or pictures
COUNT: Final = 64  # texts of each setting
TEMPERATURE: Final = 0.8
WORDS_GIVEN: Final = "words"
PICTURES_GIVEN: Final = "pictures, trained styles"

Write = Callable[[Sequence[int], Sequence[Condition], float], np.ndarray]
"""Seeds, a condition of each text, or none of any, and guidance → texts on canvases (n, L)."""


class Told(msgspec.Struct, frozen=True):
    """Texts of one setting. distinct: n-grams for n = 1, 2, 3, of these texts and of as many that were not asked.

    times: how often a text has a word, where it has it; None of pictures. perplexity: generative, under a scorer; None
    without one.
    """

    asked: AskedFor
    times: float | None
    distinct: tuple[float, float, float]
    base_distinct: tuple[float, float, float]
    perplexity: Figure | None = None


class ConditionFigures(msgspec.Struct, frozen=True):
    """All of them. left_out: sentences on what the stories do not show."""

    source: str
    told: list[Told]
    laws: list[ConditionalLaw]
    left_out: list[str] = []


@dataclass(frozen=True)
class Wish:
    """A condition, and what its text must contain: stems of words, or numbers of concepts."""

    condition: Condition
    words: tuple[str, ...] = ()
    concepts: tuple[int, ...] = ()


def evaluate_conditions(
    model: Denoiser,
    conditioner: Conditioner,
    *,
    held_out: HeldOut,
    count: int = COUNT,
    guidances: Sequence[float] = GUIDANCES,
    numbers: Sequence[int] = NUMBERS,
    scorer: SampleScorer | None = None,
    dtype: torch.dtype | None = None,
    on_row: Callable[[Told], None] = lambda row: None,
) -> ConditionFigures:
    """Ask for what held-out stories tell of, drawn as in training; the law on all of `held_out`, texts for the first.

    on_row: sees each setting when done.
    """

    def write(seeds: Sequence[int], conditions: Sequence[Condition], guidance: float) -> np.ndarray:
        top_k = min(TOP_K, model.config.vocab_size)
        settings = [Settings(seed, temperature=TEMPERATURE, top_k=top_k) for seed in seeds]
        texts = sample_autoregressive(model, settings, dtype=dtype, conditions=conditions, guidance=guidance)
        return texts.numpy()

    laws = conditional_laws(model, conditioner, held_out, numbers)
    told = evaluate_told(
        write,
        conditioner,
        held_out=held_out,
        count=count,
        guidances=guidances,
        numbers=numbers,
        scorer=scorer,
        on_row=on_row,
    )
    return ConditionFigures(held_out.name, told, laws, left_out(conditioner, held_out, told, numbers))


def evaluate_told(
    write: Write,
    conditioner: Conditioner,
    *,
    held_out: HeldOut,
    count: int,
    guidances: Sequence[float],
    numbers: Sequence[int] = NUMBERS,
    scorer: SampleScorer | None = None,
    on_row: Callable[[Told], None] = lambda row: None,
) -> list[Told]:
    """How many of the first texts contain what they were asked for; of what some story has."""
    count = min(count, len(held_out.canvases))
    plain, told = write(range(count), (), 0), list[Told]()
    for given, number, wishes in asked_of(conditioner, held_out, numbers):
        few = [wish for wish in wishes if wish is not None][:count]
        for guidance in guidances:
            texts = write(range(len(few)), [wish.condition for wish in few], guidance)
            shares = [shares_told(conditioner, few, canvases) for canvases in (texts, plain)]
            asked = AskedFor(
                given=given, number=number, guidance=guidance, texts=len(few), told=shares[0], base=shares[1]
            )
            counts = [_distinct(canvases) for canvases in (texts, plain[: len(few)])]
            perplexity = None if scorer is None else scorer.score(given, texts).perplexity
            told.append(Told(asked, times_told(conditioner, few, texts), counts[0], counts[1], perplexity))
            on_row(told[-1])
    return told


def asked_of(
    conditioner: Conditioner, held_out: HeldOut, numbers: Sequence[int]
) -> Iterator[tuple[str, int, list[Wish | None]]]:
    """What is given, how many, and the wish of each story; without what no story has.

    Pictures are of any trained style, and of each held-out one, as they are, without the changes of training.
    """
    for given, styles in _kinds(conditioner).items():
        for number in numbers:
            wishes = wishes_of(conditioner, held_out.canvases, number, styles=styles)
            if any(wishes):
                yield given, number, wishes


def left_out(conditioner: Conditioner, held_out: HeldOut, told: Sequence[Told], numbers: Sequence[int]) -> list[str]:
    """A sentence for each setting that `told` lacks, since no story has it."""
    there = {(one.asked.given, one.asked.number) for one in told}
    return [
        f"left out: no story of {held_out.name} has {counted(number, given)}; more --stories may have some"
        for given in _kinds(conditioner)
        for number in numbers
        if (given, number) not in there
    ]


def counted(number: int, given: str) -> str:
    """Such as "1 word" and "2 pictures, trained styles"."""
    kind, *styles = given.split(", ", 1)
    return ", ".join((f"{number} {kind.removesuffix('s') if number == 1 else kind}", *styles))


def _kinds(conditioner: Conditioner) -> dict[str, Sequence[str] | None]:
    """What is given, and of which styles the pictures are; None for words."""
    kinds: dict[str, Sequence[str] | None] = {WORDS_GIVEN: None}
    if (pictures := conditioner.pictures) is not None:
        kinds[PICTURES_GIVEN] = pictures.trained_styles
        kinds |= {f"pictures, {style} (held out)": (style,) for style in pictures.meta.held_out}
    return kinds


def wishes_of(
    conditioner: Conditioner, canvases: np.ndarray, number: int, *, styles: Sequence[str] | None
) -> list[Wish | None]:
    """Of each story (n, L) words, or pictures of these styles; None where it has fewer than `number`."""
    rng, made = np.random.default_rng(SEED), list[Wish | None]()
    for canvas in canvases:
        text = text_of(conditioner.tokenizer, canvas)
        if styles is None:
            words = conditioner.draw_words(text, number, rng)
            wish = Wish(conditioner.condition(words, conditioner.shown((), rng)), words=tuple(map(stem, words)))
        else:
            concepts = conditioner.draw_concepts(text, number, rng)
            shown = conditioner.shown(concepts, rng, styles, moved=False)
            wish = Wish(conditioner.condition((), shown), concepts=concepts)
        whole = len(wish.condition.words) + len(wish.condition.pictures) == number
        made.append(wish if whole else None)
    return made


def shares_told(conditioner: Conditioner, wishes: Sequence[Wish], canvases: np.ndarray) -> Figure:
    """Share of what was asked for that occurs in the texts (n, L), the i-th wish in the i-th text."""
    tells_of = (lambda text, concept: False) if conditioner.pictures is None else conditioner.pictures.tells_of
    texts = [text_of(conditioner.tokenizer, canvas) for canvas in canvases]
    stems = [{stem(word) for word in normalized(text).split()} for text in texts]
    occurring, requested = np.zeros((1, len(wishes))), np.zeros((1, len(wishes)))
    for i, wish in enumerate(wishes):
        requested[0, i] = len(wish.words) + len(wish.concepts)
        occurring[0, i] = sum(word in stems[i] for word in wish.words)
        occurring[0, i] += sum(tells_of(texts[i], concept) for concept in wish.concepts)
    return ratio(occurring, requested)


def times_told(conditioner: Conditioner, wishes: Sequence[Wish], canvases: np.ndarray) -> float | None:
    """How often a text has a word that it was asked for, over those that have it at all; None without any."""
    texts = [[stem(word) for word in normalized(text_of(conditioner.tokenizer, one)).split()] for one in canvases]
    times = [text.count(word) for text, wish in zip(texts, wishes, strict=True) for word in wish.words if word in text]
    return float(np.mean(times)) if times else None


def _distinct(canvases: np.ndarray) -> tuple[float, float, float]:
    texts = [[token for token in canvas if token >= FIRST_TEXT_ID] for canvas in canvases.tolist()]
    return distinct(texts, 1), distinct(texts, 2), distinct(texts, 3)


def conditional_laws(
    model: Denoiser, conditioner: Conditioner, held_out: HeldOut, numbers: Sequence[int]
) -> list[ConditionalLaw]:
    """Of each kind and number of conditions that two stories have: each is the other story of the other."""
    return [
        conditional_law(model, held_out, wishes, counted(number, given))
        for given, number, wishes in asked_of(conditioner, held_out, numbers)
        if sum(wish is not None for wish in wishes) > 1
    ]


@torch.no_grad()
def conditional_law(model: Denoiser, held_out: HeldOut, wishes: Sequence[Wish | None], given: str) -> ConditionalLaw:
    """Exact bits per byte of the stories that have a condition: given it, given nothing, given the next story's."""
    rows = np.array([i for i, wish in enumerate(wishes) if wish is not None])
    conditions = [wish.condition for wish in wishes if wish is not None]
    size = held_out.text_bytes[rows][None]
    bits = []
    for known in (conditions, None, conditions[1:] + conditions[:1]):
        nats = np.zeros((1, len(rows)))
        x0 = torch.from_numpy(held_out.canvases[rows].astype(np.int64))
        lengths = (x0 != PAD).sum(1)
        for part in lengths.argsort(stable=True).split(TorchScorer.batch_rows):
            memory = None if known is None else _remembered(model, [known[i] for i in part.tolist()])
            sums = autoregressive_nats(model, x0[part, : int(lengths[part].max())], memory).sum(1)
            nats[0, part.numpy()] = sums.double().numpy()
        bits.append(ratio(nats / np.log(2), size))
    return ConditionalLaw(
        given=given, stories=len(rows), bits_per_byte=bits[0], unconditioned=bits[1], shuffled=bits[2]
    )


def _remembered(model: Denoiser, conditions: Sequence[Condition]) -> Memory:
    return model.remember(Given.of(conditions).to(model.device))


def print_header() -> None:
    """Of the lines of `print_told`."""
    print(
        f"{'given':30} {'number':>6} {'guidance':>8} {'told':>15} {'not asked':>15} {'times':>5} "
        f"{'distinct 1/2/3':>18} {'not asked':>18} {'gen-PPL':>14}"
    )


def print_told(one: Told) -> None:
    """One line of a setting."""
    a = one.asked
    told, base = (f"{100 * f.value:.1f} ± {100 * f.stderr:.1f} %" for f in (a.told, a.base))
    grams = ["/".join(f"{value:.3f}" for value in part) for part in (one.distinct, one.base_distinct)]
    times = "" if one.times is None else f"{one.times:.1f}"
    ppl = "" if one.perplexity is None else f"{one.perplexity.value:.2f} ± {one.perplexity.stderr:.2f}"
    print(
        f"{a.given:30} {a.number:6} {a.guidance:8g} {told:>15} {base:>15} {times:>5} "
        f"{grams[0]:>18} {grams[1]:>18} {ppl:>14}",
        flush=True,
    )


def print_left_out(figures: ConditionFigures) -> None:
    """One line a setting that the stories do not show."""
    for sentence in figures.left_out:
        print(sentence)


def print_laws_given(laws: Sequence[ConditionalLaw]) -> None:
    """One line a condition."""
    print(f"{'bits per byte given':34} {'stories':>7} {'it':>17} {'nothing':>17} {'another story’s':>17}")
    for law in laws:
        cells = [f"{f.value:.4f} ± {f.stderr:.4f}" for f in (law.bits_per_byte, law.unconditioned, law.shuffled)]
        print(f"{law.given:34} {law.stories:7} {cells[0]:>17} {cells[1]:>17} {cells[2]:>17}")
