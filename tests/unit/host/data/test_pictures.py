"""Prepared pictures: sources, limits, concepts in texts; and the content words of texts."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from host.data import prepare
from host.data.pictures import load_pictures
from host.data.words import ContentWords, candidates, normalized, stem
from tests.support.commands import call, refusal

CAT = {"files": ["cat.png"], "forms": ["cat", "cats"], "concept": "cat"}
ICE = {"files": ["ice.png"], "forms": ["ice cream"]}


def picture(path: Path, colour: str, size: int = 64) -> Path:
    Image.new("RGB", (size, size), colour).save(path)
    return path


@pytest.fixture
def styles(tmp_path: Path) -> Path:
    """Two concepts in two drawing styles, each a zip file."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "concepts.jsonl").write_text(f"{json.dumps(CAT)}\n\n{json.dumps(ICE)}\n")
    for style, colour in (("soft", "red"), ("sharp", "blue")):
        with zipfile.ZipFile(folder / f"{style}.zip", "w") as archive:
            for name in ("cat.png", "ice.png"):
                archive.write(picture(tmp_path / name, colour), name)
    return folder


def test_pictures_of_styles_are_prepared_with_their_concepts(styles: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(prepare.main, "--pictures", styles, "--held-out-style", "sharp", "--out", out)
    made = load_pictures(out, verify=True)
    assert made.trained_styles == ("soft",) and made.meta.held_out == ("sharp",) and made.meta.skipped == 0
    assert [concept.forms for concept in made.meta.concepts] == [("cat", "cats"), ("ice cream",)]
    assert {style: set(found) for style, found in made.by_style.items()} == {"sharp": {0, 1}, "soft": {0, 1}}
    (soft,) = made.by_style["soft"][0]
    assert (np.asarray(made.pixels[soft]) == [255, 0, 0]).all()
    assert made.concepts_in("Two cats. Ice, cream") == [0, 1] and made.concepts_in("catalogue of ice") == []
    assert made.tells_of("She likes ice cream!", 1) and not made.tells_of("Ice is not a cream.", 0)


def test_pictures_with_words_or_captions_and_broken_ones_are_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    picture(folder / "a.png", "green", 200)
    (folder / "text.png").write_text("no picture")
    picture(folder / "dot.png", "red", 1)
    lines = [
        {"image": "a.png", "words": ["Frog"]},
        {"image": "a.png", "caption": "A frog is sitting on a leaf", "style": "photo"},
        {"image": "text.png", "words": ["frog"]},
        {"image": "dot.png", "words": ["frog"]},
        {"image": "gone.png", "words": ["frog"]},
    ]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    call(prepare.main, "--pictures", folder, "--out", out)
    made, printed = load_pictures(out), capsys.readouterr().out
    assert {concept.forms[0] for concept in made.meta.concepts} == {"frog", "sitting", "leaf"}
    assert len(made.meta.pictures) == 4 and made.meta.skipped == 3 and "3 skipped" in printed
    assert "skipped: gone.png is missing: " in printed and "4 pictures of 3 concepts in 2 styles" in printed
    for name in ("text.png", "dot.png", "gone.png"):
        assert sum(name in sentence for sentence in made.meta.skipped_because) == 1 and name in printed


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"image": "a.png"}', 'names no picture, or neither "words" nor a "caption"'),
        ('{"words": ["a"]}', "line 1 names no picture"),
        ('{"image": "../a.png", "words": ["a"]}', "which is outside of"),
        ('{"image": 3}', "line 1 is not"),
        ("{", "is not valid JSON"),
    ],
)
def test_pictures_lines_that_say_nothing_are_refused(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "all.jsonl").write_text(line)
    assert said in refusal(capsys, prepare.main, "--pictures", folder, "--out", tmp_path / "out")[1]
    assert not (tmp_path / "out").exists()


def test_pictures_refuse_styles_and_folders_that_are_not_there(
    styles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        return refusal(capsys, prepare.main, *arguments)[1]

    out = ("--out", tmp_path / "out")
    assert "--held-out-style oil" in said("--pictures", styles, "--held-out-style", "oil", *out)
    every = ("--held-out-style", "soft", "sharp")
    assert "no picture to train on" in said("--pictures", styles, *every, *out)
    assert "no folder with a .jsonl" in said("--pictures", tmp_path / "none", *out)
    assert "holds no prepared pictures" in said("--pictures", styles, "--out", styles)
    assert "cannot be combined" in said("--pictures", styles, "--source", "a.txt", *out)
    assert "needs --pictures" in said("--held-out-style", "soft", *out)


def test_pictures_sentences_name_a_style_without_name_and_count_one_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "mine", ("--out", tmp_path / "out")
    folder.mkdir()
    picture(folder / "a.png", "green")
    lines = [{"image": "a.png", "words": ["frog"]}, {"image": "a.png", "words": ["frog"], "style": "photo"}]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = refusal(capsys, prepare.main, "--pictures", folder, "--held-out-style", "oil", *out)[1]
    assert said == "--held-out-style oil does not occur; styles: one without a name, photo"
    (folder / "all.jsonl").write_text(json.dumps(lines[0]))
    call(prepare.main, "--pictures", folder, *out)
    assert ": 1 picture of 1 concept in 1 style, 0 skipped; " in capsys.readouterr().out


@pytest.mark.slow
def test_pictures_of_a_set_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    folder, out = tmp_path / "hub", tmp_path / "out"
    (folder / "train").mkdir(parents=True)
    picture(folder / "train" / "0001.png", "green")
    picture(folder / "train" / "0002.png", "red")
    rows = [
        {"file_name": "0001.png", "text": "a frog in the grass"},
        {"file_name": "0002.png", "text": "a red balloon"},
    ]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call(prepare.main, "--source", f"hub:{folder}", "--out", out)
    made = load_pictures(out)
    assert {concept.forms[0] for concept in made.meta.concepts} == {"frog", "grass", "red", "balloon"}
    (frog,) = made.by_style[""][made.concepts_in("frog")[0]]
    assert (np.asarray(made.pixels[frog]) == [0, 128, 0]).all()


def test_content_words_leave_out_names_and_what_tells_nothing() -> None:
    text = "Lily said that the dragons were very sad. Dragons! It's a cake, and she has eaten it."
    assert candidates(text) == {"dragons", "sad", "cake", "eaten"}
    counted = ContentWords.of([text] * 9 + ["A sad cake."])
    assert counted.stories == {"sad": 10, "cake": 10} and counted.in_text("A cake for sad dragons") == ["cake", "sad"]
    assert normalized("It's Ice-Cream!") == " it's ice cream "


@pytest.mark.parametrize(
    "forms",
    [
        ("bake", "bakes", "baked", "baking"),
        ("dragon", "dragons"),
        ("run", "running", "runs"),
        ("cry", "cries", "cried"),
    ],
)
def test_stem_is_the_same_for_the_forms_of_a_word(forms: tuple[str, ...]) -> None:
    assert len(set(map(stem, forms))) == 1
    assert stem("grass") == "grass" and stem("cake") != stem("cat")
