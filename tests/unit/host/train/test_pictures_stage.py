"""What the stage of pictures trains on: pictures changed by chance, and which of a batch's words a picture's is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from host.data import prepare
from host.data.shards import load_data
from host.model.conditions import PICTURE_SIZE
from host.train import picture_changes
from host.train.conditioner import conditioner_of, text_of
from host.train.picture_changes import changed
from host.train.picture_loss import contrast
from shared.tokens import PAD
from tests.support.commands import call


def red_square() -> torch.Tensor:
    square = torch.ones(400, 3, PICTURE_SIZE, PICTURE_SIZE)
    square[:, 1:, 24:40, 24:40] = 0
    return square


def test_pictures_are_changed_each_in_its_way_and_stay_on_white() -> None:
    square = red_square()
    after = changed(square, np.random.default_rng(0))
    assert torch.equal(square, red_square()) and after.min() >= 0 and after.max() <= 1
    assert (after[:, :, 0, 0] == 1).all()
    ink = 1 - after
    mass = ink.sum((1, 2, 3))
    seen = mass > 0  # a cover may hide it
    assert seen.float().mean() > 0.95 and len(set(mass.tolist())) > 380
    columns = torch.arange(PICTURE_SIZE, dtype=torch.float)
    middle = (ink.sum((1, 2)) * columns).sum(1)[seen] / mass[seen]
    assert 20 < middle.min() < 30 < 34 < middle.max() < 44


def test_pictures_are_drawn_with_lines_without_colours_and_in_other_ones() -> None:
    colours = changed(red_square(), np.random.default_rng(0)).flatten(2).amin(2)  # (400, 3), least of each channel
    grey = (colours.amax(1) - colours.amin(1)) < 0.02
    red = colours[:, 0] > colours[:, 1:].amax(1) + 0.2
    others = colours[:, 1:].amax(1) > colours[:, 0] + 0.2
    shares = [float(one.float().mean()) for one in (grey, red, others)]
    assert 0.1 < shares[0] < 0.6 and 0.3 < shares[1] < 0.8 and 0.02 < shares[2] < 0.2


def test_pictures_repainted_may_have_their_dark_parts_light(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dark square in a lighter one: its middle is the darkest, but where each channel goes through a random curve."""
    squares = torch.ones(400, 3, PICTURE_SIZE, PICTURE_SIZE)
    squares[:, :, 12:52, 12:52], squares[:, :, 22:42, 22:42] = 0.6, 0
    for share in ("OUTLINED", "BLURRED", "COVERED", "THINNER", "THICKER"):
        monkeypatch.setattr(picture_changes, share, 0.0)
    lighter = []
    for repainted in (0.0, 1.0):
        monkeypatch.setattr(picture_changes, "REPAINTED", repainted)
        dark = 1 - changed(squares, np.random.default_rng(0)).mean(1)
        lighter.append(float((dark[:, 32, 32] < 0.9 * dark.amax((1, 2))).float().mean()))
    assert lighter[0] == 0 and 0.1 < lighter[1] < 0.9


def test_pictures_changes_are_a_function_of_the_generator() -> None:
    one, same, other = (changed(red_square()[:9], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_pictures_shown_are_of_a_concept_of_each_story_with_its_word(data: Path, tmp_path: Path) -> None:
    folder = load_data(data)
    plain = conditioner_of(folder, None)
    word = max(plain.words.stories, key=lambda word: plain.words.stories[word])
    Image.new("RGB", (PICTURE_SIZE,) * 2, "red").save(tmp_path / "it.png")
    (tmp_path / "all.jsonl").write_text(json.dumps({"image": "it.png", "words": [word]}))
    call(prepare.main, "--pictures", tmp_path, "--out", tmp_path / "prepared")
    conditioner = conditioner_of(folder, tmp_path / "prepared")
    stories = torch.from_numpy(folder.train.take(np.arange(20)).astype(np.int64))
    shown = conditioner.show(stories, np.random.default_rng(0))
    assert conditioner.pictures is not None
    telling = sum(conditioner.pictures.tells_of(text_of(plain.tokenizer, s.numpy()), 0) for s in stories)
    assert len(shown) == telling > 0
    assert all(one.words == [plain.tokens_of(word)] and one.pictures.shape == (1, 3, 64, 64) for one in shown)
    assert not torch.equal(shown[0].pictures, shown[-1].pictures)
    assert conditioner.show(torch.full((2, 5), PAD), np.random.default_rng(0)) == []


def test_contrast_is_the_cross_entropy_of_scores_by_distance() -> None:
    words = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    apart = torch.eye(3, dtype=torch.bool)
    spread = float((words - words.mean(0)).square().sum(1).mean())
    found = words + torch.tensor([[0.1, 0.0], [0.0, 0.3], [1.0, 0.0]])
    scores = -10 * torch.cdist(found, words).square() / spread
    wanted = -scores.log_softmax(1).diagonal().sum()
    assert float(contrast(found, words, apart)) == pytest.approx(float(wanted), rel=1e-4)


def test_contrast_counts_a_word_given_twice_once() -> None:
    words = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    same = (words[:, None] == words).all(2)
    twice = float(contrast(words, words, same))
    assert twice < 0.01 < float(contrast(words, words, torch.eye(3, dtype=torch.bool)))
    assert np.isfinite(float(contrast(words[:2], words[:2], same[:2, :2])))
