"""Two implementations, one text: torch and the edge tell of the same words and pictures, guided or not, alike."""

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from edge.decoding.conditions import Condition as EdgeCondition
from edge.decoding.layout_text import Layout
from edge.serving.loaded_bundle import LoadedBundle
from host.export.random_weights import untrained
from host.model.conditions import Condition
from host.model.drafter import DEPTH
from host.model.network import Denoiser, config_named
from host.sampling.blocks import Template, write
from host.sampling.reference import Settings
from shared.messages import Gap, GenerateRequest
from shared.tokens import FIRST_TEXT_ID
from tests.support.picture_files import picture

TOLERANCE = 1e-3
CONDITIONS: dict[str, dict[str, Any]] = {
    "words": {"words": ["dragon", "cake"]},
    "a picture": {"images": [picture(1)]},
    "two pictures": {"images": [picture(1), picture(2)]},
    "three pictures": {"images": [picture(1), picture(2), picture(3)]},
    "a word and a picture": {"words": ["red"], "images": [picture(3)]},
    "words and two pictures": {"words": ["red", "cake"], "images": [picture(3), picture(1)]},
    "words and three pictures": {"words": ["red"], "images": [picture(3), picture(2), picture(1)]},
}
SHAPES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "\x01" * 220},  # near the end of the canvas
    "gaps": {"segments": ["abc ", Gap(9), " de ", Gap(12), "."]},
}


@pytest.fixture(scope="module")
def model() -> Denoiser:
    """The network of `conditioned_bundle`."""
    return untrained(replace(config_named("debug"), draft_depth=DEPTH, conditions=True))[0]


@pytest.fixture(scope="module")
def loaded(conditioned_bundle: Path) -> LoadedBundle:
    return LoadedBundle.load(conditioned_bundle, "ort", threads=1)


def template_of(layout: Layout) -> Template:
    """What is given and what is not; an open end is no part of it."""
    end = layout.parts[-1][0] if layout.open_end and not isinstance(layout.parts[-1], str) else None
    known = list(zip(layout.canvas.tolist(), layout.fill.tolist(), strict=True))[1:end]
    runs = [(gap, [token for token, _ in run]) for gap, run in groupby(known, lambda pair: pair[1])]
    return [len(run) if gap else [t for t in run if t >= FIRST_TEXT_ID] for gap, run in runs]


def as_torch(condition: EdgeCondition | None) -> Condition:
    assert condition is not None
    pixels = torch.from_numpy(condition.pixels).permute(0, 3, 1, 2).float() / 255
    return Condition([list(word) for word in condition.words], pixels, condition.go_on)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_conditioned_text_of_edge_and_torch_is_the_same(
    model: Denoiser,
    loaded: LoadedBundle,
    *,
    shape: dict[str, Any],
    condition: dict[str, Any],
    temperature: float,
    guidance: float,
) -> None:
    for seed in range(8):
        without_heat = {"words": [*condition.get("words", []), f"{seed}"]} if seed and not temperature else {}
        law = {"seed": seed, "temperature": temperature, "guidance": guidance}
        plan = loaded.prepare(GenerateRequest(**shape | condition | without_heat | law))
        expected = write(
            model,
            template_of(plan.layout),
            settings=Settings(seed, temperature=temperature),
            open_end=plan.layout.open_end,
            window=3,
            condition=as_torch(plan.condition),
            guidance=guidance,
        )
        if expected.margin <= TOLERANCE:
            continue  # too close to call
        made = loaded.run(plan)
        gaps = [made.canvas[slice(*part)] for part in plan.layout.parts if not isinstance(part, str)]
        assert [[t for t in gap.tolist() if t >= FIRST_TEXT_ID] for gap in gaps] == expected.gaps
        return
    pytest.fail(f"no seed leaves every draw a margin above {TOLERANCE}")


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_word_that_was_told_is_read_no_more_by_edge_and_torch(
    model: Denoiser, loaded: LoadedBundle, *, shape: dict[str, Any], pictures: int, guidance: float
) -> None:
    """Two words of one token each, which the text before told: some of these texts tell one, or both, again."""
    images = [picture(1)] * pictures
    plan, found = loaded.prepare(GenerateRequest(**shape, words=["a"], images=images, guidance=guidance)), 0
    assert plan.condition is not None
    words = ((FIRST_TEXT_ID,), (FIRST_TEXT_ID + 1,))
    for seed in range(40):
        condition = replace(plan.condition, words=words)
        expected = write(
            model,
            template_of(plan.layout),
            settings=Settings(seed, temperature=0.8),
            open_end=plan.layout.open_end,
            window=3,
            condition=as_torch(condition),
            guidance=guidance,
        )
        text = [token for gap in expected.gaps for token in gap]
        told = any(word[0] in text[:-2] for word in words)
        words = ((text[2],), (text[5],))
        if told and expected.margin > TOLERANCE:
            sampling = replace(plan.sampling, seed=seed, temperature=0.8)
            made = loaded.run(replace(plan, condition=condition, sampling=sampling))
            gaps = [made.canvas[slice(*part)] for part in plan.layout.parts if not isinstance(part, str)]
            assert [[t for t in gap.tolist() if t >= FIRST_TEXT_ID] for gap in gaps] == expected.gaps
            found += 1
    assert found >= 2
