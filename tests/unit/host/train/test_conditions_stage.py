"""The stage of conditions: what it draws, what it trains, and a network that does not move by a bit."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from host import generate, join
from host.data.shards import load_data
from host.evaluate import __main__ as evaluate
from host.evaluate.conditions import ConditionFigures, evaluate_conditions
from host.evaluate.likelihood import held_out_split, token_nats
from host.export import __main__ as export
from host.model.conditions import Given
from host.train import trainer as train
from host.train.batches import make_batch
from host.train.checkpoint import BEST, LAST, load_model
from host.train.conditioner import conditioner_of, text_of
from host.train.logging import LOG_FILE, read_log
from host.train.objectives import Settings, conditioned
from host.train.published import CONDITIONS, WEIGHTS, read_published
from host.train.run_folder import data_of, load_run, pictures_of, training_stages
from shared.manifest import CONDITIONED_ROLES, bundle_digest, read_manifest
from tests.support.commands import call, refusal, small


def test_conditions_drawn_name_what_the_story_tells_of(data: Path, pictures: Path) -> None:
    folder = load_data(data)
    conditioner = conditioner_of(folder, pictures)
    assert conditioner.pictures is not None
    rng, kinds = np.random.default_rng(0), set()
    for canvas in folder.train.take(np.arange(60)):
        text = text_of(conditioner.tokenizer, canvas)
        words = conditioner.draw_words(text, 3, rng)
        assert len(set(words)) == len(words) <= 3 and all(word in text for word in words)
        concepts = conditioner.draw_concepts(text, 2, rng)
        assert len(set(concepts)) == len(concepts) and all(conditioner.pictures.tells_of(text, c) for c in concepts)
        story = torch.from_numpy(canvas.astype(np.int64))
        drawn = conditioner.draw(story, rng)
        if drawn is not None:
            condition, told = drawn
            of_words = {token for word in condition.words for token in word}
            assert condition.words == [] or of_words <= set(story[told].tolist())
            kinds.add((bool(condition.words), bool(len(condition.pictures))))
            assert bool(((condition.pictures >= 0) & (condition.pictures <= 1)).all())
    assert kinds == {(True, False), (False, True), (True, True)}


def test_conditions_tell_of_a_word_or_a_picture_where_it_comes_first(data: Path) -> None:
    conditioner = conditioner_of(load_data(data), None)
    one, other, third = sorted(conditioner.words.stories)[:3]
    tokens = {word: conditioner.tokens_of(word) for word in (one, other, third)}
    story = torch.tensor([7, *tokens[one], 8, *tokens[other], *tokens[one], *tokens[third], *tokens[other]])
    (a, b), start = (len(tokens[word]) for word in (one, other)), 1
    after = start + a + 1

    def told(*parts: tuple[str, ...]) -> list[int]:
        return conditioner.first_places(story, parts).nonzero()[:, 0].tolist()

    assert told((one,)) == [*range(start, start + a)]
    assert told((one,), (other,)) == [*range(start, start + a), *range(after, after + b)]
    assert told((other, third)) == [*range(after, after + b)]  # a concept's words: whichever comes first
    assert told(()) == []


def test_conditions_weigh_the_tokens_that_they_name(data: Path) -> None:
    folder = load_data(data)
    settings = Settings(conditioner=conditioner_of(folder, None))
    stories = torch.from_numpy(folder.train.take(np.arange(8)).astype(np.int64))
    for example in conditioned.examples(stories, np.random.default_rng(0), settings):
        assert example.condition is not None
        named = set(example.target[example.weight == 1].tolist())
        assert named == {token for word in example.condition.words for token in word}
        assert sorted(set(example.weight.tolist())) == pytest.approx([conditioned.REST, 1.0])


def test_conditions_draw_rare_words_as_often_as_frequent_ones(data: Path) -> None:
    conditioner = conditioner_of(load_data(data), None)
    rare, *_, frequent = sorted(conditioner.words.stories, key=lambda word: conditioner.words.stories[word])
    share = conditioner.words.stories[rare] / conditioner.words.stories[frequent]
    rng = np.random.default_rng(0)
    drawn = [conditioner.draw_words(f"the {rare} and the {frequent}", 1, rng)[0] for _ in range(2000)]
    assert drawn.count(frequent) / 2000 == pytest.approx(share / (1 + share), abs=0.04)


def test_conditions_batches_are_a_function_of_seed_and_step(data: Path, pictures: Path) -> None:
    folder = load_data(data)
    settings = Settings(conditioner=conditioner_of(folder, pictures))
    made = [
        make_batch(
            folder.train, step, seed=3, batch_size=12, micro_size=5, mixture={"conditioned": 1.0}, settings=settings
        )
        for step in (2, 2, 3)
    ]
    given = [[part.given for part in batch.parts] for batch in made]
    same = zip(given[0], given[1], strict=True)
    assert all(a is not None and b is not None and all(map(torch.equal, a, b)) for a, b in same)
    assert isinstance(given[2][0], Given) and given[0][0] is not None
    assert not torch.equal(given[2][0].tokens, given[0][0].tokens)
    pairs = zip(made[0].parts, given[0], strict=True)
    assert all(one is not None and len(part.rows.tokens) == len(one.tokens) for part, one in pairs)


@pytest.mark.slow
def test_conditions_stage_leaves_the_network_to_the_bit_and_learns(data: Path, runs: tuple[Path, Path, Path]) -> None:
    body, _, conditions = runs
    before, after = (load_file(run / BEST) for run in (body, conditions))
    kept = [name for name in before if name.startswith("ema.")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert any(name.startswith("ema.conditions.") and bool(after[name].any()) for name in after if ".out." in name)
    valid = [float(row["valid"]) for row in read_log(conditions / LOG_FILE) if row["valid"]]
    assert valid[-1] < valid[0]
    stories = held_out_split(load_data(data), 16).canvases
    plain, after_it = (token_nats(load_run(run)[0], stories) for run in (body, conditions))
    assert np.array_equal(plain, after_it)  # the law without a condition
    assert [stage.objectives for stage in training_stages(conditions)] == [("ar", "infill"), ("conditions",)]


@pytest.mark.slow
def test_reads_stage_leaves_network_and_encoders_to_the_bit(
    data: Path, runs: tuple[Path, Path, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, _, conditions = runs
    stage = ["--data", data, "--stage", "reads", "--pictures", pictures, "--steps", 2, "--batch-size", 8]
    call(train.main, *stage, "--init", conditions, "--out", tmp_path / "r")
    before, after = (load_file(run / BEST) for run in (conditions, tmp_path / "r"))
    moved = {name for name in before if name.startswith("ema.") and not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("ema.conditions.reads.") for name in moved)
    stage[stage.index("reads")] = "pictures"
    call(train.main, *stage, "--init", conditions, "--out", tmp_path / "p")
    for number, (first, second) in enumerate((("p", "r"), ("r", "p"))):  # each its own part, whichever comes first
        call(join.main, tmp_path / first, tmp_path / second, "--out", tmp_path / f"both{number}")
        joined = load_file(tmp_path / f"both{number}" / LAST)
        reads, shown = (load_file(tmp_path / run / BEST) for run in ("r", "p"))
        of_shown = {name for name in shown if name.startswith("ema.conditions.pictures.")}
        assert of_shown and not any(torch.equal(reads[name], shown[name]) for name in of_shown if ".weight" in name)
        kept = {name for name in reads if name.startswith("ema.")}
        assert all(torch.equal(joined[name], (shown if name in of_shown else reads)[name]) for name in kept)
    stage[stage.index("pictures")] = "reads"
    said = refusal(capsys, train.main, *stage, "--init", body, "--out", tmp_path / "q")[1]
    assert said == f"{body} takes no words: --stage reads comes after --stage conditions"


@pytest.mark.slow
def test_join_makes_one_run_of_a_drafter_and_conditions(
    runs: tuple[Path, Path, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, drafter, conditions = runs
    for number, (one, other) in enumerate(((drafter, conditions), (conditions, drafter))):
        out = tmp_path / f"both{number}"
        call(join.main, one, other, "--out", out)
        model, progress = load_run(out)
        assert model.drafter is not None and model.conditions is not None and progress.model == model.config
        for run in (drafter, conditions):
            part = load_model(run / BEST)[0]
            mine = dict(model.named_parameters())
            assert all(torch.equal(p, mine[name]) for name, p in part.named_parameters())
        first, *after = (stage.objectives for stage in training_stages(out))
        assert first == ("ar", "infill") and set(after) == {("drafter",), ("conditions",)}
        assert pictures_of(out) == pictures and data_of(out).meta == data_of(body).meta
        assert "nothing to join" in refusal(capsys, join.main, out, one, "--out", tmp_path / "c")[1]
    assert "nothing to join" in refusal(capsys, join.main, body, drafter, "--out", tmp_path / "c")[1]
    other = tmp_path / "other"
    call(train.main, *small(data_of(body).path, other, "--objectives", "ar", "--steps", 2, "--valid-every", 2))
    apart = ["--data", data_of(body).path, "--init", other, "--stage", "drafter", "--steps", 2]
    call(train.main, *apart, "--out", tmp_path / "d")
    assert "same network" in refusal(capsys, join.main, tmp_path / "d", conditions, "--out", tmp_path / "c")[1]


@pytest.mark.slow
def test_conditions_are_published_beside_the_network(
    runs: tuple[Path, Path, Path], data: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network's file is the one that is published without them, and `--stage pictures` starts from the folder."""
    (body, _, conditions), plain, out = runs, tmp_path / "plain", tmp_path / "hub"
    for run, folder in ((body, plain), (conditions, out)):
        call(export.main, "--run", run, "--hf", folder, "--stories", 4)
    assert (out / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes() and not (plain / CONDITIONS).exists()
    (model, _), (again, _) = load_run(conditions), load_run(out)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    training = read_published(out).training
    assert (training.stages, training.condition_stages) == (training_stages(body), training_stages(conditions)[1:])
    bundle = tmp_path / "bundle"
    call(export.main, "--run", conditions, "--out", bundle, "--target", "cpu", "--stories", 12)
    call(export.main, "--run", conditions, "--hf", tmp_path / "again", "--hf-figures", bundle)
    assert read_published(tmp_path / "again").training.bundle_sha256 == bundle_digest(bundle)
    assert "start a run from it" in refusal(capsys, export.main, "--run", out, "--out", tmp_path / "c")[1]
    stage = ["--data", data, "--stage", "pictures", "--init", out, "--pictures", pictures, "--steps", 1]
    call(train.main, *stage, "--batch-size", 8, "--out", tmp_path / "p")
    assert training_stages(tmp_path / "p")[:2] == training_stages(conditions)
    (out / CONDITIONS).write_bytes((out / WEIGHTS).read_bytes())
    said = refusal(capsys, train.main, *stage, "--out", tmp_path / "r")[1]
    assert said == f"{out / CONDITIONS} does not hold what reads words and pictures"
    (out / CONDITIONS).unlink()
    said = refusal(capsys, train.main, *stage, "--out", tmp_path / "q")[1]
    assert said.startswith(f"{out / CONDITIONS} cannot be read: ")


@pytest.mark.slow
def test_generate_takes_words_and_pictures_within_limits(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, card, fake = runs[2], tmp_path / "card.png", tmp_path / "fake.png"
    Image.new("RGB", (100, 50), "red").save(card)
    fake.write_text("no picture")
    call(generate.main, "--run", run, "--word", "Cake", "--image", card, "--guidance", 2, "--seed", 1)
    assert "— seed 1" in capsys.readouterr().out

    def said(*arguments: object) -> str:
        return refusal(capsys, generate.main, "--run", run, *arguments)[1]

    assert "--word is given 4 times: at most 3" in said(*["--word", "cake"] * 4)
    assert "--image is given 4 times: at most 3" in said(*["--image", card] * 4)
    assert "tokens: it must have 1 to 8" in said("--word", "x" * 300) and "it must have 1" in said("--word", " ")
    assert "is neither PNG nor JPEG" in said("--image", fake)
    assert "gone.png cannot be read" in said("--image", tmp_path / "gone.png")


@pytest.mark.slow
def test_conditions_are_evaluated_and_exported(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[2]
    call(evaluate.main, "--run", run, "--conditions", "--stories", 16, "--count", 3, "--guidance", 0, 1)
    printed = capsys.readouterr().out
    assert printed.count("\nwords ") == 6 and "pictures, dark (held out)" in printed and "another story" in printed
    wanted = ["--int8", "--target", "cpu", "--stories", 12, "--guidance", 1.5]
    call(export.main, "--run", run, "--out", tmp_path / "b", *wanted)
    manifest = read_manifest(tmp_path / "b")
    assert manifest.conditions is not None and manifest.conditions.guidance == 1.5
    roles = {graph.role for graph in manifest.graphs}
    assert {*CONDITIONED_ROLES["cpu"], "prefill.conditioned"} < roles
    assert [parity.graph for parity in manifest.law_parity] == ["step.cpu.int8.onnx", "step.conditioned.cpu.int8.onnx"]
    assert abs(manifest.law_parity[1].law_ratio - 1) <= 0.005
    assert {one.given for one in manifest.conditions.asked_for} >= {"words", "pictures, trained styles"}
    assert all(one.guidance == 1.5 for one in manifest.conditions.asked_for) and manifest.conditions.laws
    wanted = ["--fp16", "--int8", "--target", "cuda", "--stories", 12]
    call(export.main, "--run", run, "--out", tmp_path / "c", *wanted)
    manifest = read_manifest(tmp_path / "c")
    assert manifest.conditions is not None and {graph.target for graph in manifest.graphs} == {"cuda"}
    half, whole = manifest.law_parity
    assert (half.graph, whole.graph) == ("step.cuda.fp16.onnx", "step.cuda.int8.onnx")
    for parity, worst in ((half, 0.01), (whole, 0.1)):
        assert parity.conditioned_ratio is not None and abs(parity.conditioned_ratio - 1) <= 0.005
        assert parity.memory_error is not None and 0 < parity.memory_error < worst


@pytest.mark.slow
def test_conditions_in_texts_of_a_bundle_are_those_in_texts_of_its_run(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bundle = runs[2], tmp_path / "b"
    call(export.main, "--run", run, "--out", bundle, "--target", "cpu", "--stories", 4)
    shown, data = ["--conditions", "--stories", 16, "--count", 3, "--guidance", 1], data_of(run)
    in_float32 = evaluate_conditions(
        load_run(run)[0],
        conditioner_of(data, pictures_of(run)),
        held_out=held_out_split(data, 16),
        count=3,
        guidances=(1.0,),
    )
    call(evaluate.main, "--bundle", bundle, "--scorer", run, *shown, "--json")
    found = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1], type=ConditionFigures)
    assert [one.asked for one in found.told] == [one.asked for one in in_float32.told] and len(found.told) == 9
    assert all(one.perplexity for one in found.told) and not found.laws
    assert "needs --scorer RUN" in refusal(capsys, evaluate.main, "--bundle", bundle, "--conditions")[1]
    plain = tmp_path / "plain"
    call(export.main, "--run", runs[1], "--out", plain, "--target", "cpu", "--stories", 4)
    refused = ["--bundle", plain, "--conditions", "--scorer", run]
    assert refusal(capsys, evaluate.main, *refused)[1] == f"{plain} takes no words and pictures"


def test_conditions_stage_refuses_what_does_not_go_with_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        return refusal(capsys, train.main, "--data", data, "--out", tmp_path / "x", *arguments)[1]

    assert "--stage conditions needs --init RUN" in said("--stage", "conditions")
    assert "--pictures needs --stage conditions, pictures or reads" in said("--pictures", tmp_path)
    assert "cannot be combined with --stage conditions" in said(
        "--stage", "conditions", "--init", "a", "--dropout", 0.1
    )
    assert not (tmp_path / "x" / LAST).exists()


@pytest.mark.slow
def test_pictures_stage_makes_pictures_say_what_their_words_say(
    runs: tuple[Path, Path, Path], data: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, _, conditions = runs
    stage = ["--data", data, "--stage", "pictures", "--pictures", pictures, "--out", tmp_path / "p", "--steps", 40]
    call(train.main, *stage, "--init", conditions, "--batch-size", 8, "--valid-every", 10)
    before, after = (load_file(run / BEST) for run in (conditions, tmp_path / "p"))
    moved = {name for name in before if name.startswith("ema.") and not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("ema.conditions.pictures.") for name in moved)
    valid = [float(row["valid"]) for row in read_log(tmp_path / "p" / LOG_FILE) if row["valid"]]
    assert valid[-1] < 0.8 * valid[0]
    refused = ["--data", data, "--stage", "pictures", "--out", tmp_path / "q", "--init"]
    assert "comes after --stage conditions" in refusal(capsys, train.main, *refused, body, "--pictures", pictures)[1]
    assert "needs --pictures DATA" in refusal(capsys, train.main, *refused, conditions)[1]
