"""Words of a text, and which of them carry its content. No tagger: a stop list, and how many stories have a word."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

LEAST_LETTERS: Final = 3
LEAST_STORIES: Final = 10
"""Of the stories that are counted: rarer words are seen too seldom to be learned."""
COUNTED_STORIES: Final = 20_000

_STOP_WORDS = """
able about above across actually after again against ago ahead all almost along already also although always among
and another any anyone anything are around ask asked asking asks away back became because become been before began
behind being below beside best better between both bring brought but came can cannot come comes coming could did
does doing done down each either else end enough even ever every everyone everything except far few finally first
for forward found from front full gave get gets getting give gives giving goes going gone gonna got great had has
have having hello her here hers herself him himself his how however idea inside instead into its itself just keep
kept kind knew know known knows last later least less let lets like liked little long longer look looked looking
looks lot made make makes making many may maybe mean might mine more most much must myself named near need needed
needs never new next nobody nor not nothing now off okay old once one ones only onto other others our out outside
over own part perhaps place put quite rather ready really right said same saw say saying says see seeing seemed seen
shall she should side since some someone something sometimes somewhere soon still such suddenly sure take taken
takes taking than that the their them themselves then there these they thing things this those though through time
times together told too took toward towards tried try trying under until upon use used using very wait want wanted
wanting wants was way ways well went were what whatever when where whether which while who whole whom whose why will
wish with within without wonder would yes yet you your yours yourself
"""
STOP_WORDS: Final = frozenset(_STOP_WORDS.split())
"""Function words, auxiliaries, and verbs and adverbs so common that a story tells of nothing by having them."""

_WORD = re.compile(r"(?<![A-Za-z'])[a-z]+(?![A-Za-z'])")
_ANY_CASE = re.compile(r"[a-z]+(?:'[a-z]+)?")


def normalized(text: str) -> str:
    """All words in lower case with one space around each: ` form ` is in it where the text has that form."""
    return f" {' '.join(_ANY_CASE.findall(text.lower()))} "


def stem(word: str) -> str:
    """A word without the endings of plural, past and -ing form: `baked`, `bakes`, `baking` → `bak`."""
    for ending in ("ies", "ied"):
        if word.endswith(ending) and len(word) > 4:
            return word[:-3] + "y"
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word[: -len(ending)]
            break
    doubled = len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz"
    return word[:-1] if doubled else word


@dataclass(frozen=True)
class ContentWords:
    """stories: how many of the counted stories have each word."""

    stories: Mapping[str, int]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "ContentWords":
        """Count the content words of stories."""
        counts = Counter(word for text in texts for word in candidates(text))
        return cls({word: n for word, n in counts.items() if n >= LEAST_STORIES})

    def in_text(self, text: str) -> list[str]:
        """The content words of a text, each once, by the alphabet."""
        return sorted(word for word in candidates(text) if word in self.stories)


def candidates(text: str) -> set[str]:
    """Words in lower case that are no stop words: names, and what begins a sentence, are left out."""
    return {word for word in _WORD.findall(text) if len(word) >= LEAST_LETTERS and word not in STOP_WORDS}
