"""Quality against denoising steps, as a table and a picture: a bundle's sampling defaults are chosen from them.

Every setting draws as many texts, with the same seeds; an autoregressive run scores them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

import torch

from host.data.shards import SplitName
from host.device import mixed_precision_dtype
from host.evaluate.gen_ppl import COLUMNS, COUNT, SampleScorer, Scored, cells, length_distance
from host.sampling.many import sample_many
from host.sampling.reference import TOP_K, Settings
from host.train.plots import save_picture
from host.train.run_folder import load_run
from shared.errors import ConfigError
from shared.manifest import TOKENIZER, Selection

STEPS: Final = (4, 8, 16, 32, 64, 128, 256)
TEMPERATURES: Final = (1.0, 0.8)
THRESHOLDS: Final = (0.9, 0.7, 0.5)
ENTROPY_BOUNDS: Final = (0.5, 2.0, 8.0)  # nats a step
COOLED: Final[tuple[Selection, ...]] = ("random", "confidence")
PICTURE: Final = "sweep.png"


@dataclass(frozen=True)
class Setting:
    """A sampling rule at one strength."""

    rule: str
    strength: str
    settings: Settings

    @property
    def line(self) -> str:
        """The line of the picture that it belongs to."""
        return f"{self.rule}, T {self.settings.temperature:g}"


@dataclass(frozen=True)
class Point:
    """A measured setting. steps: mean denoising steps of a text (NFE)."""

    setting: Setting
    steps: float
    scored: Scored


def grid(
    steps: Sequence[int] = STEPS,
    temperatures: Sequence[float] = TEMPERATURES,
    thresholds: Sequence[float] = THRESHOLDS,
    entropy_bounds: Sequence[float] = ENTROPY_BOUNDS,
) -> list[Setting]:
    """Settings to measure: at the first temperature every selection at every number of steps, and the adaptive rules;
    at the other temperatures the selections COOLED.
    """
    settings = []
    for temperature in temperatures:
        base = Settings(seed=0, steps=max(steps), temperature=temperature)
        first = temperature == temperatures[0]
        for selection in get_args(Selection) if first else COOLED:
            settings += [Setting(selection, f"{n} steps", replace(base, steps=n, selection=selection)) for n in steps]
        if first:
            settings += [Setting("threshold", f"{p:g}", replace(base, threshold=p)) for p in thresholds]
            settings += [Setting("entropy bound", f"{h:g}", replace(base, entropy_bound=h)) for h in entropy_bounds]
    return settings


def sweep(
    run: Path,
    scorer_run: Path,
    *,
    source: Path | None = None,
    split: SplitName = "valid",
    count: int = COUNT,
    settings: Sequence[Setting] = (),
) -> list[Point]:
    """Measure every setting of the grid, print the table as it grows, draw RUN/sweep.png."""
    model, state = load_run(run)
    if "canvas" not in state.objectives:
        raise ConfigError(f"{run} did not learn the objective canvas: a sweep is of canvas decoding")
    scorer = SampleScorer.load(scorer_run, run / TOKENIZER)
    data = scorer.score_data(source, split, count)
    dtype = mixed_precision_dtype(model.device)
    print(f"{'rule':14} {'T':>4} {'strength':>9} {'NFE':>7} {COLUMNS} {'lengths off':>11}")
    _print((data.name, "", "", ""), data, data)
    points = []
    for setting in settings or grid():
        base = replace(setting.settings, top_k=min(TOP_K, model.config.vocab_size))
        sampled = sample_many(model, state.schedule, [replace(base, seed=seed) for seed in range(count)], dtype)
        steps = sum(one.steps for one in sampled) / count
        canvases = torch.stack([one.canvas for one in sampled]).numpy()
        point = Point(setting, steps, scorer.score(f"{setting.line}, {setting.strength}", canvases))
        _print((setting.rule, f"{base.temperature:g}", setting.strength, f"{steps:.1f}"), point.scored, data)
        points.append(point)
    draw(run / PICTURE, points, data)
    print(
        f"{count} texts each, scored by {scorer_run}; lengths off: distance of the length histogram from that of "
        f"as many stories of the data, 0 to 1; picture: {run / PICTURE}"
    )
    return points


def _print(row: tuple[str, str, str, str], scored: Scored, data: Scored) -> None:
    rule, temperature, strength, steps = row
    setting = f"{rule:14} {temperature:>4} {strength:>9} {steps:>7}"
    print(f"{setting} {cells(scored)} {length_distance(scored, data):11.2f}", flush=True)


def draw(path: Path, points: Sequence[Point], data: Scored) -> None:
    """Perplexity and entropy against mean steps, a line for each rule and temperature; dashed: the data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    rules = list(dict.fromkeys(point.setting.rule for point in points))
    warmest = max(point.setting.settings.temperature for point in points)
    for line in dict.fromkeys(point.setting.line for point in points):
        of_line = sorted((p for p in points if p.setting.line == line), key=lambda p: p.steps)
        colour = f"C{rules.index(of_line[0].setting.rule)}"
        style = "o-" if of_line[0].setting.settings.temperature == warmest else "o:"
        steps = [p.steps for p in of_line]
        above.errorbar(
            steps,
            [p.scored.perplexity.value for p in of_line],
            [p.scored.perplexity.stderr for p in of_line],
            fmt=style,
            color=colour,
            label=line,
        )
        below.plot(steps, [p.scored.unigram_entropy_bits for p in of_line], style, color=colour)
    above.axhline(data.perplexity.value, color="black", linestyle="--", label="data")
    below.axhline(data.unigram_entropy_bits, color="black", linestyle="--")
    above.set_xscale("log", base=2)
    above.set_yscale("log")
    above.set_ylabel("generative perplexity")
    below.set_ylabel("unigram entropy, bits")
    below.set_xlabel("denoising steps of a text")
    above.legend(fontsize=8, ncols=2)
    save_picture(figure, path)
