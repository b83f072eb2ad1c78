"""A small corpus and a run trained on it, each made once."""

import json
from pathlib import Path

import pytest
from PIL import Image

from host.data.prepare import main as prepare_main
from host.data.prepare import prepare
from host.data.shards import load_data
from host.export import __main__ as export
from host.model.conditions import PICTURE_SIZE
from host.train import trainer as train
from host.train.conditioner import conditioner_of
from tests.support.commands import call, small

NAMES = ("Tom", "Anna", "Ben", "Lily")
THINGS = ("ball", "dog", "cake", "tree")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen stories, over and over, in files of each split."""
    folder = tmp_path_factory.mktemp("corpus") / "stories"
    folder.mkdir()
    pairs = [(NAMES[i % 4], THINGS[i // 4 % 4]) for i in range(400)]
    texts = [f"{name} had a {thing}. The {thing} was red. {name} was happy." for name, thing in pairs]
    held_out = {"valid": texts[::100], "test": texts[1::100]}
    train = [text for i, text in enumerate(texts) if i % 100]
    for split, stories in {"train": train, **held_out}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its data folder, with a vocabulary of 300."""
    out = tmp_path_factory.mktemp("data") / "stories"
    prepare([str(corpus)], out, vocab_size=300)
    return out


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion run of 60 small steps; read it, do not write into it."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    call(
        train.main,
        *("--config", "debug", "--objectives", "canvas", "--data", data, "--out", out, "--steps", 60),
        *("--batch-size", 16, "--valid-every", 30, "--lr", 3e-3),
    )
    return out


@pytest.fixture(scope="session")
def joint_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of all laws and that of its drafter; read them, do not write into them."""
    folder = tmp_path_factory.mktemp("joint")
    a, b = folder / "a", folder / "b"
    call(train.main, *small(data, a, "--objectives", "ar=2,infill,canvas", "--steps", 12, "--lr", 3e-3))
    call(train.main, "--data", data, "--out", b, "--batch-size", 8, "--stage", "drafter", "--init", a, "--steps", 4)
    return a, b


@pytest.fixture(scope="session")
def published(joint_runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second of them as a folder for the Hugging Face libraries."""
    out = tmp_path_factory.mktemp("published") / "stories"
    call(export.main, "--run", joint_runs[1], "--hf", out, "--stories", 4)
    return out


@pytest.fixture(scope="session")
def pictures(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture for each of some content words of the stories, in two styles."""
    folder = tmp_path_factory.mktemp("pictures")
    words = sorted(conditioner_of(load_data(data), None).words.stories)
    assert len(words) > 4
    lines = []
    for i, word in enumerate(words):
        for style in ("plain", "dark"):
            name = f"{word}-{style}.png"
            Image.new("RGB", (PICTURE_SIZE,) * 2, (30 * i, 255 - 30 * i, 40 if style == "dark" else 200)).save(
                folder / name
            )
            lines.append({"image": name, "words": [word], "style": style})
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path_factory.mktemp("prepared") / "pictures"
    call(prepare_main, "--pictures", folder, "--held-out-style", "dark", "--out", out)
    return out


@pytest.fixture(scope="session")
def runs(data: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A network, its drafter, and beside it its conditions."""
    folder = tmp_path_factory.mktemp("conditions")
    a, drafter, conditions = folder / "a", folder / "drafter", folder / "conditions"
    call(train.main, *small(data, a, "--objectives", "ar=2,infill", "--steps", 20, "--valid-every", 20))
    after = ["--data", data, "--init", a, "--batch-size", 8]
    call(train.main, *after, "--out", drafter, "--stage", "drafter", "--steps", 4, "--valid-every", 4)
    stage = ["--stage", "conditions", "--pictures", pictures, "--steps", 30, "--valid-every", 10]
    call(train.main, *after, "--out", conditions, *stage)
    return a, drafter, conditions
