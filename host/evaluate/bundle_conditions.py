"""How many texts by the graphs of a bundle contain what they were asked for: the loop and backend of the edge."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edge.backends.ort_rows import OrtRows
from edge.decoding import conditions as edge_conditions
from host.data.shards import SplitName
from host.evaluate.bundle_drafting import law_of, write_text
from host.evaluate.conditions import NUMBERS, ConditionFigures, Told, evaluate_told, left_out
from host.evaluate.gen_ppl import SampleScorer
from host.evaluate.likelihood import HeldOut, held_out_split
from host.model.conditions import Condition
from host.train.conditioner import Conditioner, conditioner_of
from host.train.published import is_published
from host.train.run_folder import data_of, pictures_of
from shared.errors import ConfigError
from shared.manifest import TOKENIZER, read_manifest, verified_bytes


def evaluate_bundle(
    bundle: Path,
    run: Path,
    *,
    split: SplitName,
    stories: int,
    count: int,
    guidances: Sequence[float],
    on_start: Callable[[], None] = lambda: None,
    on_row: Callable[[Told], None] = lambda row: None,
) -> ConditionFigures:
    """Texts without a prompt, by the bundle's defaults; stories, pictures and the scorer are those of `run`.

    Words alone where `run` has no pictures; no laws: they are a run's. on_start: called once all is checked. Raises
    ConfigError for a bundle without conditions, or a `run` without data.
    """
    if read_manifest(bundle).conditions is None:
        raise ConfigError(f"{bundle} takes no words and pictures")
    if is_published(run):
        raise ConfigError(f"{run} has no data: --scorer names a run, with its stories and pictures")
    scorer, data = SampleScorer.load(run, bundle / TOKENIZER), data_of(run)
    held_out = held_out_split(data, stories, split)
    conditioner = conditioner_of(data, pictures_of(run))
    on_start()
    told = told_by_bundle(
        bundle, conditioner, held_out=held_out, count=count, guidances=guidances, scorer=scorer, on_row=on_row
    )
    return ConditionFigures(held_out.name, told, [], left_out(conditioner, held_out, told, NUMBERS))


def told_by_bundle(
    bundle: Path,
    conditioner: Conditioner,
    *,
    held_out: HeldOut,
    count: int,
    guidances: Sequence[float],
    numbers: Sequence[int] = NUMBERS,
    scorer: SampleScorer | None = None,
    on_row: Callable[[Told], None] = lambda row: None,
) -> list[Told]:
    """`evaluate_told` of texts without a prompt, by the defaults of a bundle with conditions."""
    manifest = read_manifest(bundle)
    verified_bytes(bundle, TOKENIZER, manifest.tokenizer_sha256)
    backend, blocks = OrtRows(bundle, manifest, threads=0), manifest.blocks
    assert blocks is not None

    def write(seeds: Sequence[int], conditions: Sequence[Condition], guidance: float) -> np.ndarray:
        asked = [as_request(one, guidance) for one in conditions]
        for one in asked[:1]:  # all of them are of one kind
            backend.load(one)
        laws = [law_of(manifest, seed, blocks.temperature, blocks.window) for seed in seeds]
        given: Sequence[edge_conditions.Condition | None] = asked or [None] * len(laws)
        pairs = zip(laws, given, strict=True)
        return np.stack([write_text(backend, manifest, law=law, condition=one).canvas for law, one in pairs])

    return evaluate_told(
        write,
        conditioner,
        held_out=held_out,
        count=count,
        guidances=guidances,
        numbers=numbers,
        scorer=scorer,
        on_row=on_row,
    )


def as_request(condition: Condition, guidance: float) -> edge_conditions.Condition:
    """As the daemon reads it from a request."""
    pixels = (condition.pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    words = tuple(tuple(word) for word in condition.words)
    return edge_conditions.Condition(words, pixels, guidance, condition.go_on)
