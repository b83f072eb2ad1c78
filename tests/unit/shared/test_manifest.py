"""A bundle that does not fit is refused with one sentence that says which part, and why."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from shared.conditions import Conditions
from shared.errors import BundleError
from shared.figures import Figure
from shared.manifest import (
    CONDITIONED_ROLES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    BlocksDefaults,
    Evaluation,
    Graph,
    LawFigures,
    LawParity,
    Manifest,
    ModelSpec,
    Parity,
    Role,
    SamplingDefaults,
    SpecialIds,
    Tensor,
    TrainingData,
    TrainingStage,
    bundle_digest,
    find_graph,
    has_role,
    read_manifest,
    sha256_of,
    verified_bytes,
)

STEP = b"not really a graph"
SHA256 = hashlib.sha256(STEP).hexdigest()

GRAPH = Graph(
    file="canvas.cpu.int8.onnx",
    role="canvas",
    sha256=SHA256,
    precision="int8",
    target="cpu",
    inputs=(Tensor("canvas", "int32", ("batch", "length")), Tensor("t", "float32", ("batch",))),
    outputs=(Tensor("ids", "int32", ("batch", "length", 64)),),
)

WHOLE = Manifest(
    format_version=2,
    name="tinystories",
    model=ModelSpec(
        config="debug",
        d_model=32,
        layers=2,
        heads=2,
        vocab_size=300,
        canvas_len=64,
        time_input=True,
        parameters=50_000,
    ),
    special_ids=SpecialIds(),
    schedule="linear",
    reveal_grid="cosine",
    top_k=64,
    decoders=("canvas",),
    graphs=(GRAPH,),
    tokenizer_sha256=SHA256,
    defaults=SamplingDefaults(steps=32, selection="margin", temperature=0.8, top_p=0.95),
    evaluations=(
        Evaluation(
            graph=GRAPH.file,
            source="valid.txt",
            stories=100,
            text_tokens=20_000,
            text_bytes=80_000,
            nelbo_nats_per_token=Figure(2.5, 0.01),
            bits_per_byte=Figure(0.9, 0.004),
            masked_cross_entropy=Figure(3.1, 0.02),
        ),
    ),
    blocks=None,
    laws=(),
    parity=(Parity(graph=GRAPH.file, scheme="dynamic", nelbo_ratio=1.002, top1_agreement=0.97),),
    law_parity=(),
    calibration="at run time",
    data=TrainingData(
        name="TinyStories",
        licence="CDLA-Sharing-1.0",
        stories=1000,
        tokens_seen=200_000,
        stages=(TrainingStage(name="first", objectives=("canvas",), tokens=200_000),),
    ),
    made_with={"torch": "2.13.0"},
)


def graph_of(role: Role) -> Graph:
    """One more graph, of that role."""
    return structs.replace(GRAPH, file=f"{role}.cpu.int8.onnx", role=role)


BLOCKS = structs.replace(
    WHOLE,
    decoders=("blocks", "canvas"),
    graphs=(GRAPH, *(graph_of(role) for role in ("step", "prefill", "draft"))),
    blocks=BlocksDefaults(window=3),
    laws=(
        LawFigures(
            graph="step.cpu.int8.onnx",
            source="valid.txt",
            stories=64,
            left_to_right_nats_per_token=Figure(1.7, 0.01),
            left_to_right_bits_per_byte=Figure(0.6, 0.004),
            infilling_nats_per_gap_token=Figure(1.6, 0.02),
            infilling_blind_nats_per_gap_token=Figure(2.0, 0.02),
            tokens_per_pass={"0": 2.6, "0.8": 2.1, "1": 1.9},
        ),
    ),
    law_parity=(
        LawParity(
            graph="step.cpu.int8.onnx", scheme="static", law_ratio=1.001, infilling_ratio=None, texts_agreeing=0.7
        ),
    ),
)
"""A manifest of both decoders."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with a whole manifest and the file it lists."""
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode(WHOLE))
    (tmp_path / GRAPH.file).write_bytes(STEP)
    return tmp_path


@pytest.fixture
def edit(bundle: Path) -> Callable[[Callable[[Any], None]], Path]:
    """Change the manifest's JSON in place."""

    def apply(change: Callable[[Any], None]) -> Path:
        wire = msgspec.json.decode((bundle / MANIFEST).read_bytes())
        change(wire)
        (bundle / MANIFEST).write_bytes(msgspec.json.encode(wire))
        return bundle

    return apply


def refusal(folder: Path) -> str:
    """The sentence that a bundle is refused with; it names the folder."""
    with pytest.raises(BundleError) as caught:
        read_manifest(folder)
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    return sentence


def test_manifest_comes_back_as_it_was_written(bundle: Path) -> None:
    for manifest in (WHOLE, BLOCKS):
        (bundle / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        assert read_manifest(bundle) == manifest


def test_manifest_of_no_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a bundle: cannot read manifest.json (No such file or directory)" in refusal(tmp_path / "nowhere")


def test_manifest_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not a bundle: cannot read manifest.json (Not a directory)" in refusal(tmp_path / "file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format_version": ' + b"[" * 100_000,
        b'{"format_version": 2, "name": "\xff"}',
    ],
    ids=["empty", "truncated", "list", "null", "binary", "deep", "not UTF-8"],
)
def test_manifest_damage_is_called_damage(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert "manifest.json is damaged: " in refusal(bundle)


def test_manifest_cut_anywhere_is_damaged(bundle: Path) -> None:
    whole = (bundle / MANIFEST).read_bytes()
    for end in range(0, len(whole), 97):
        (bundle / MANIFEST).write_bytes(whole[:end])
        assert "is damaged: " in refusal(bundle)


def test_manifest_without_end_is_not_read(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    assert f"{MAX_MANIFEST_BYTES + 1} bytes; at most {MAX_MANIFEST_BYTES}" in refusal(bundle)


@pytest.mark.parametrize(
    ("version", "found"), [(0, "0"), (3, "3"), ("2", '"2"'), (None, "null"), (["x" * 1000], '["' + "x" * 38)]
)
def test_manifest_of_another_version_is_refused_before_its_fields_are(
    edit: Callable[[Callable[[Any], None]], Path], version: object, found: str
) -> None:
    """A later release's manifest has fields that this one cannot know."""
    folder = edit(lambda wire: wire.update(format_version=version, later="field"))
    assert refusal(folder).endswith(f"has format_version {found}; this release reads 2")


def test_manifest_without_version_is_refused(edit: Callable[[Callable[[Any], None]], Path]) -> None:
    assert "has format_version none; this release reads 2" in refusal(edit(lambda wire: wire.pop("format_version")))


def test_manifest_of_version_1_is_refused_with_the_remedy(edit: Callable[[Callable[[Any], None]], Path]) -> None:
    sentence = refusal(edit(lambda wire: wire.update(format_version=1)))
    assert sentence.endswith(
        "has format_version 1; this release reads 2; export its run again, with python -m host.export --run"
    )


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda wire: wire.update(surprise=1), "unknown field `surprise`"),
        (lambda wire: wire["model"].update(surprise=1), "unknown field `surprise` - at `$.model`"),
        (lambda wire: wire["graphs"][0].update(surprise=1), "unknown field `surprise` - at `$.graphs[0]`"),
        (lambda wire: wire["model"].pop("layers"), "missing required field `layers` - at `$.model`"),
        (lambda wire: wire["model"].update(layers=0), "$.model.layers"),
        (lambda wire: wire.update(schedule="sigmoid"), "$.schedule"),
        (lambda wire: wire.update(name="../up"), "$.name"),
        (lambda wire: wire["graphs"][0].update(file="../step.onnx"), "$.graphs[0].file"),
        (lambda wire: wire["graphs"][0].update(file=".hidden"), "$.graphs[0].file"),
        (lambda wire: wire["graphs"][0].update(file="step.onnx\n"), "$.graphs[0].file"),
        (lambda wire: wire["graphs"][0].update(sha256=SHA256.upper()), "$.graphs[0].sha256"),
        (lambda wire: wire["graphs"][0].update(precision="int4"), "$.graphs[0].precision"),
        (lambda wire: wire.update(tokenizer_sha256=SHA256[1:]), "$.tokenizer_sha256"),
        (lambda wire: wire["special_ids"].update(mask=4), "special_ids other than PAD 0, BOS 1, EOS 2, MASK 3"),
        (lambda wire: wire.update(top_k=1), "$.top_k"),
        (lambda wire: wire.update(top_k=301), "top_k 301 above vocab_size 300"),
        (lambda wire: wire.update(decoders=[]), "$.decoders"),
        (lambda wire: wire.update(decoders=["causal"]), "$.decoders[0]"),
        (lambda wire: wire.update(decoders=["canvas", "canvas"]), "the decoder canvas twice"),
        (lambda wire: wire["graphs"][0].update(role="encode"), "$.graphs[0].role"),
        (lambda wire: wire["graphs"].pop(0), "the decoder canvas, but no graph of the role canvas"),
        (lambda wire: wire["graphs"].pop(1), "the decoder blocks, but no graph of the role step"),
        (lambda wire: wire["graphs"].pop(3), "the window 3, but no graph of the role draft"),
        (lambda wire: wire.update(blocks=None), "the decoder blocks, but no defaults of `blocks`"),
        (lambda wire: wire.update(decoders=["canvas"]), "defaults of `blocks`, but not that decoder"),
        (lambda wire: wire["blocks"].update(window=9), "$.blocks.window"),
        (lambda wire: wire["blocks"].update(top_p=0), "$.blocks.top_p"),
    ],
)
def test_manifest_field_that_does_not_fit_is_named(
    bundle: Path, edit: Callable[[Callable[[Any], None]], Path], change: Callable[[Any], None], place: str
) -> None:
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(BLOCKS))
    assert place in refusal(edit(change))


def test_manifest_of_conditions_has_their_graphs_for_a_target(bundle: Path) -> None:
    """Encoders alone suffice for CUDA, whose step graph reads the memory itself; a CPU that writes blocks needs its own
    graphs, whatever CUDA has."""
    takes = Conditions(words=3, word_tokens=8, pictures=3, picture_size=64, picture_rows=16)
    roles: tuple[Role, ...] = ("canvas", "step", "encode.text", "encode.image")
    canvas, step, text, image = (
        structs.replace(graph_of(role), target="cuda", file=f"cuda.{role}.onnx") for role in roles
    )
    on_cpu = tuple(graph_of(role) for role in CONDITIONED_ROLES["cpu"])
    for graphs, missing in (
        ((canvas, step, text, image), None),
        ((canvas, step, text), "encode.image for the target cuda"),
        ((*BLOCKS.graphs, *on_cpu), None),
        ((*BLOCKS.graphs, *on_cpu, canvas, step), None),
        ((*BLOCKS.graphs, *on_cpu, canvas, step, text), "encode.image for the target cuda"),
        ((*BLOCKS.graphs, graph_of("encode.text")), "encode.image for the target cpu"),
        (BLOCKS.graphs, "encode.text for the target cpu"),
        ((*BLOCKS.graphs, canvas, step, text, image), "encode.text for the target cpu"),
    ):
        whole = structs.replace(BLOCKS, conditions=takes, graphs=graphs)
        (bundle / MANIFEST).write_bytes(msgspec.json.encode(whole))
        if missing is None:
            assert read_manifest(bundle).conditions == takes
        else:
            assert f"conditions, but no graph of the role {missing}" in refusal(bundle)


def test_verified_bytes_reads_a_file_once(bundle: Path) -> None:
    assert verified_bytes(bundle, GRAPH.file, GRAPH.sha256) == STEP
    assert sha256_of(bundle / GRAPH.file) == GRAPH.sha256


def test_verified_bytes_refuses_another_hash(bundle: Path) -> None:
    (bundle / GRAPH.file).write_bytes(STEP[:-1])
    with pytest.raises(BundleError, match=rf"canvas\.cpu\.int8\.onnx does not match its manifest: .*{SHA256[:12]}"):
        verified_bytes(bundle, GRAPH.file, GRAPH.sha256)


def test_verified_bytes_names_a_missing_file(bundle: Path) -> None:
    (bundle / GRAPH.file).unlink()
    with pytest.raises(BundleError, match=r"canvas\.cpu\.int8\.onnx cannot be read \(No such file or directory\)"):
        verified_bytes(bundle, GRAPH.file, GRAPH.sha256)


def test_find_graph_of_a_target(bundle: Path) -> None:
    assert find_graph(bundle, WHOLE, "cpu") is GRAPH
    assert find_graph(bundle, BLOCKS, "cpu", role="draft").file == "draft.cpu.int8.onnx"
    assert has_role(BLOCKS, "cpu", "draft") and not has_role(BLOCKS, "cuda", "draft")
    assert not has_role(WHOLE, "cpu", "draft")


def test_find_graph_refuses_with_what_there_is(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no graph for this device, whose target is 'cuda'; it lists canvas"):
        find_graph(bundle, WHOLE, "cuda")
    with pytest.raises(BundleError, match=r"no step graph for target 'cpu'; it lists canvas\.cpu\.int8\.onnx \(canvas"):
        find_graph(bundle, WHOLE, "cpu", role="step")


def test_bundle_digest_follows_its_manifest(edit: Callable[[Callable[[Any], None]], Path], bundle: Path) -> None:
    before = bundle_digest(bundle)
    assert before == bundle_digest(bundle)
    assert bundle_digest(edit(lambda wire: wire["graphs"][0].update(sha256="0" * 64))) != before
