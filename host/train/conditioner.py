"""What a story is conditioned on: some of its content words, and pictures of some concepts that it tells of."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from host.data.pictures import PictureSet, load_pictures
from host.data.shards import DataFolder
from host.data.tokenizer import load_tokenizer
from host.data.words import COUNTED_STORIES, ContentWords
from host.model.conditions import PICTURE_SIZE, PICTURES, WORD_TOKENS, WORDS, Condition
from host.train.picture_changes import changed
from shared.tokens import FIRST_TEXT_ID, words_go_on

PICTURES_ALONE: Final = 0.45  # of the stories, where there are pictures
WORDS_ALONE: Final = 0.45  # the others have both
Item = TypeVar("Item")


@dataclass(frozen=True)
class Conditioner:
    """Draws conditions of stories."""

    tokenizer: Tokenizer
    words: ContentWords
    pictures: PictureSet | None
    concept_weight: dict[int, float]
    """By concept, one over the stories that tell of it."""

    @classmethod
    def of(cls, data: DataFolder, pictures: PictureSet | None) -> "Conditioner":
        """Words and concepts counted in the first stories of training."""
        tokenizer = load_tokenizer(data.tokenizer_path)
        stories = data.train.first(COUNTED_STORIES)
        texts = [text_of(tokenizer, story) for story in stories]
        weight: dict[int, float] = {}
        if pictures is not None:
            found = [concept for text in texts for concept in pictures.concepts_in(text)]
            weight = {concept: 1 / n for concept, n in zip(*np.unique(found, return_counts=True), strict=True)}
        return cls(tokenizer, ContentWords.of(texts), pictures, weight)

    @cached_property
    def go_on(self) -> frozenset[int]:
        """See `Condition`."""
        return words_go_on(self.tokenizer.get_vocab())

    def draw(self, canvas: Tensor, rng: np.random.Generator) -> tuple[Condition, Tensor] | None:
        """Words, pictures of styles to train on, or both, of a story (L,); None where it has none of them.

        → condition, and which positions of the story first tell of each of its parts (L,) bool
        """
        text, kind = text_of(self.tokenizer, canvas.numpy()), rng.random()
        with_words = self.pictures is None or kind >= PICTURES_ALONE
        with_pictures = self.pictures is not None and not PICTURES_ALONE <= kind < PICTURES_ALONE + WORDS_ALONE
        words = self.draw_words(text, int(rng.integers(1, WORDS + 1)), rng) if with_words else ()
        concepts = self.draw_concepts(text, int(rng.integers(1, PICTURES + 1)), rng) if with_pictures else ()
        if not words and not concepts:
            words = self.draw_words(text, 1, rng)
        if not words and not concepts:
            return None
        told = self.first_places(canvas, [*((word,) for word in words), *map(self.forms_of, concepts)])
        return self.condition(words, self.shown(concepts, rng)), told

    def show(self, canvases: Tensor, rng: np.random.Generator) -> list[Condition]:
        """Of stories (n, L) a picture of a concept that each tells of, and the first of its words; without those that
        tell of none."""
        texts = [text_of(self.tokenizer, canvas) for canvas in canvases.numpy()]
        drawn = [concept for text in texts for concept in self.draw_concepts(text, 1, rng)]
        shown = [(concept, self.shown((concept,), rng, moved=False)) for concept in drawn]
        concepts = [concept for concept, pixels in shown if len(pixels)]
        if not concepts:
            return []
        pixels = changed(torch.cat([pixels for _, pixels in shown]), rng)
        first = [self.forms_of(concept)[0] for concept in concepts]
        return [self.condition([word], one) for word, one in zip(first, pixels.split(1), strict=True)]

    def forms_of(self, concept: int) -> tuple[str, ...]:
        """The words that count as a concept."""
        assert self.pictures is not None
        return self.pictures.meta.concepts[concept].forms

    def first_places(self, canvas: Tensor, parts: Sequence[Sequence[str]]) -> Tensor:
        """Where a story (L,) first has one of each part's words inside a sentence.  → (L,) bool"""
        found = torch.zeros(len(canvas), dtype=torch.bool)
        for words in parts:
            there = []
            for tokens in map(self.tokens_of, words):
                starts = (canvas.unfold(0, len(tokens), 1) == torch.tensor(tokens)).all(1).nonzero()[:1, 0]
                there += [(start, len(tokens)) for start in starts.tolist()]
            if there:
                start, length = min(there)
                found[start : start + length] = True
        return found

    def draw_words(self, text: str, count: int, rng: np.random.Generator) -> tuple[str, ...]:
        """Up to `count` content words of a text, the rarer the likelier: by one over the stories that have a word."""
        there = [word for word in self.words.in_text(text) if len(self.tokens_of(word)) <= WORD_TOKENS]
        return tuple(_drawn(there, [1 / self.words.stories[word] for word in there], count, rng))

    def draw_concepts(self, text: str, count: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Up to `count` concepts that a text tells of, likewise."""
        assert self.pictures is not None
        there = [concept for concept in self.pictures.concepts_in(text) if concept in self.concept_weight]
        return tuple(_drawn(there, [self.concept_weight[concept] for concept in there], count, rng))

    def shown(
        self, concepts: Sequence[int], rng: np.random.Generator, styles: Sequence[str] = (), moved: bool = True
    ) -> Tensor:
        """A random picture of each concept, changed by chance (`picture_changes`), or as it is.

        styles: empty for those to train on; a concept that they lack is left out. → (n, 3, 64, 64) in 0 … 1
        """
        assert self.pictures is not None or not concepts
        chosen = []
        for concept in concepts:
            assert self.pictures is not None
            there = [
                i
                for one in styles or self.pictures.trained_styles
                for i in self.pictures.by_style[one].get(concept, ())
            ]
            if there:
                chosen.append(self.pictures.pixels[there[int(rng.integers(len(there)))]])
        if not chosen:
            return torch.zeros(0, 3, PICTURE_SIZE, PICTURE_SIZE)
        pixels = torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).float() / 255
        return changed(pixels, rng) if moved else pixels

    def tokens_of(self, word: str) -> list[int]:
        """A word as it stands inside a sentence."""
        tokens: list[int] = self.tokenizer.encode(f" {word.lower()}", add_special_tokens=False).ids
        return tokens

    def condition(self, words: Sequence[str], pictures: Tensor) -> Condition:
        """Of words as text and of pictures."""
        return Condition([self.tokens_of(word) for word in words], pictures, self.go_on)


def text_of(tokenizer: Tokenizer, canvas: np.ndarray) -> str:
    """The text of a canvas (L,)."""
    text: str = tokenizer.decode(canvas[canvas >= FIRST_TEXT_ID].tolist())
    return text


def conditioner_of(data: DataFolder, pictures: Path | None) -> Conditioner:
    """Of prepared data and pictures."""
    return Conditioner.of(data, None if pictures is None else load_pictures(pictures, verify=True))


def _drawn(items: list[Item], weights: list[float], count: int, rng: np.random.Generator) -> list[Item]:
    if not items:
        return []
    share = np.array(weights) / sum(weights)
    return [items[i] for i in rng.choice(len(items), min(count, len(items)), replace=False, p=share)]
