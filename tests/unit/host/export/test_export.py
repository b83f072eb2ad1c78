"""`python -m host.export`: a whole bundle that passed its gate, or nothing."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from host import files
from host.evaluate.likelihood import evaluate, held_out_split
from host.evaluate.scorers import TorchScorer
from host.export import __main__ as export
from host.export.bundle_writer import BundleGraph
from host.export.pipeline import Built, most_faithful
from host.export.stages import Stages
from host.model.network import count_parameters
from host.train.checkpoint import BEST, LAST, load_model
from host.train.run_folder import data_of, read_config, training_stages, work_behind, write_config
from shared.manifest import MANIFEST, TOKENIZER, Parity, read_manifest, verified_bytes
from tests.support.commands import call, refusal, small_disk


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_cpu(precision: str) -> list[tuple[str, str, str]]:
    roles = ("step", "prefill", "draft", "canvas")
    return [(f"{role}.cpu.{precision}.onnx", precision, "cpu") for role in roles]


def on_cuda(*precisions: str) -> list[tuple[str, str, str]]:
    pairs = [(role, precision) for role in ("step", "canvas", "weights") for precision in precisions]
    return [(f"{role}.cuda.{precision}.onnx", precision, "cuda") for role, precision in pairs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "graphs"),
    [
        ([], on_cpu("fp32")),
        (["--int8"], [*on_cpu("int8"), *on_cuda("int8")]),
        (["--fp16"], on_cuda("fp16")),
        (["--int8", "--fp16"], [*on_cpu("int8"), *on_cuda("fp16", "int8")]),
        (["--int8", "--fp16", "--fp32-norms", "--target", "cuda"], on_cuda("fp16", "int8")),
        (["--int8", "--fp16", "--target", "cpu"], on_cpu("int8")),
    ],
    ids=lambda value: " ".join(value) or "no flags" if value and isinstance(value[0], str) else None,
)
def test_export_flags_choose_the_graphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], graphs: list[tuple[str, str, str]]
) -> None:
    out = tmp_path / "bundle"
    call(export.main, "--untrained", "debug", "--out", out, *flags)
    manifest = read_manifest(out)
    assert sorted((g.file, g.precision, g.target) for g in manifest.graphs) == sorted(graphs)
    assert {p.name for p in out.iterdir()} == {MANIFEST, TOKENIZER, *(file for file, _, _ in graphs)}
    for graph in manifest.graphs:
        verified_bytes(out, graph.file, graph.sha256)
        names = ["canvas", "t", "wanted"][: 3 if graph.target == "cpu" else 2]
        assert graph.role != "canvas" or [value.name for value in graph.inputs] == names
    runs_here = any(target == "cpu" for _, _, target in graphs)
    assert ("python -m edge.generate --bundle" in capsys.readouterr().out) == runs_here
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_export_of_a_run_writes_its_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest run, by default into bundles/NAME-OF-RUN."""
    shutil.copytree(trained, tmp_path / "runs" / "stories")
    monkeypatch.chdir(tmp_path)
    call(export.main, "--int8", "--fp16", "--steps", 32, "--temperature", 0.8, "--report")
    printed = capsys.readouterr().out
    manifest = read_manifest(Path("bundles/stories"))
    model, progress = load_model(trained / BEST)
    assert manifest.name == "stories"
    assert manifest.model.parameters == count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    assert (manifest.model.vocab_size, manifest.top_k, manifest.schedule) == (300, 64, "linear")
    assert (manifest.defaults.steps, manifest.defaults.temperature) == (32, 0.8)
    assert (manifest.data.name, manifest.data.stories) == ("stories", 396)
    assert manifest.data.tokens_seen == progress.tokens_seen > 0 and manifest.decoders == ("canvas",)
    assert (Path("bundles/stories") / TOKENIZER).read_bytes() == (trained / TOKENIZER).read_bytes()
    by_graph = {e.graph: e for e in manifest.evaluations}
    assert list(by_graph) == ["torch fp32", *(graph.file for graph in manifest.graphs)]  # all, because of --report
    held_out = held_out_split(data_of(trained))
    assert by_graph["torch fp32"] == evaluate(TorchScorer(model), held_out, progress.schedule, draws=1)
    assert [parity.graph for parity in manifest.parity] == [graph.file for graph in manifest.graphs]
    for parity in manifest.parity:
        assert abs(parity.nelbo_ratio - 1) <= 0.01 and parity.top1_agreement >= 0.95
    parity = manifest.parity[0]
    for scheme in ("dynamic", "static"):
        assert f"cpu int8 {scheme}: NELBO × " in printed  # both were tried
    for rule in ("largest", "percentile", "entropy"):
        assert f"cuda int8 {rule}: NELBO × " in printed
    assert parity.scheme in ("dynamic", "static")
    assert ("canvas.cpu.int8.onnx: at run time, per pass" in manifest.calibration) == (parity.scheme == "dynamic")
    assert "error of each linear layer alone in INT8" in printed
    layers = [line.split()[0] for line in printed.splitlines() if line.startswith("  blocks.") and line.endswith("%")]
    assert len(layers) == 4 * model.config.layers


INSIDE = {"norm1.": "qkv.weight", "norm2.": "up.weight"}
EVERYWHERE = INSIDE | {"ema.norm.": "ema.head.weight"}


def with_outliers(trained: Path, run: Path, pairs: dict[str, str]) -> None:
    """The same function in float32, with one channel of every normalised vector 10,000 times larger.

    What a LayerNorm multiplies, the next matrix divides: real networks grow such channels, and INT8 activations, whose
    step is set by the largest, lose all the others.
    """
    shutil.copytree(trained, run)
    for file in (LAST, BEST):
        with safe_open(run / file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name in list(tensors):
            for norm, matrix in pairs.items():
                if name.startswith("ema.") and norm in name:
                    tensors[name][0] *= 1e4
                    if name.endswith("weight"):
                        tensors[name.replace(f"{norm}weight", matrix)][:, 0] /= 1e4
        save_file(tensors, run / file, metadata=metadata)


@pytest.mark.slow
def test_export_of_a_network_that_int8_ruins_keeps_the_old_bundle(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "outliers", tmp_path / "bundles" / "mine"
    with_outliers(trained, run, EVERYWHERE)
    call(export.main, "--run", run, "--out", out)
    before = snapshot(tmp_path)
    reference = {e.graph: e.nelbo_nats_per_token.value for e in read_manifest(out).evaluations}
    model, progress = load_model(trained / BEST)
    unchanged = evaluate(TorchScorer(model), held_out_split(data_of(trained)), progress.schedule, draws=1)
    assert reference["torch fp32"] == pytest.approx(unchanged.nelbo_nats_per_token.value, rel=1e-3)

    code, sentence = refusal(capsys, export.main, "--run", run, "--out", out, "--int8")
    assert code == 66
    assert sentence == (
        "no INT8 scheme for CPU reaches NELBO within 1% and top-1 agreement of at least 95%, even with half of the "
        "layers in float; nothing was written: train longer, or leave out --int8"
    )
    assert snapshot(tmp_path) == before
    assert refusal(capsys, export.main, "--run", run, "--out", tmp_path / "new", "--int8")[0] == 66
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_export_leaves_layers_in_float_that_int8_ruins(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "outliers", tmp_path / "mine"
    with_outliers(trained, run, INSIDE)
    call(export.main, "--run", run, "--out", out, "--int8", "--report")
    ruined = {f"blocks.{i}.{layer}.out.matmul" for i in range(2) for layer in ("qkv", "up")}
    for parity in read_manifest(out).parity:
        assert set(parity.kept_float) == ruined
        assert parity.top1_agreement >= 0.95
    printed = capsys.readouterr().out
    assert ": fails the gate" in printed and "4 layers in float" in printed
    table = [line for line in printed.splitlines() if " ± " in line]
    measured = ["torch fp32", "canvas.cpu.int8.onnx", "canvas.cuda.int8.onnx"]
    assert [line.split("  ")[0] for line in table] == measured == [e.graph for e in read_manifest(out).evaluations]
    assert any(
        line.startswith("left in float: ") and "blocks.0.qkv.out.matmul" in line for line in printed.splitlines()
    )


@pytest.mark.slow
def test_export_replaces_an_old_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    call(export.main, "--untrained", "debug", "--out", out)
    call(export.main, "--untrained", "debug", "--out", out, "--int8")
    assert {g.precision for g in read_manifest(out).graphs} == {"int8"} and not list(out.glob("*fp32*"))
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_swap_leaves_no_moment_without_a_bundle(tmp_path: Path) -> None:
    """Looked for at every call and return of the code that replaces it; two renames are caught between them."""
    out = tmp_path / "bundle"
    moments: list[bool] = []

    def replace(content: str) -> None:
        with files.swapped_in(out) as folder:
            (folder / MANIFEST).write_text(content)

    replace("old")
    sys.setprofile(lambda *event: moments.append((out / MANIFEST).is_file()))
    try:
        replace("new")
    finally:
        sys.setprofile(None)
    assert len(moments) > 50 and all(moments)
    assert (out / MANIFEST).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_swap_on_a_disk_that_cannot_exchange_is_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    call(export.main, "--untrained", "debug", "--out", out)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # there is no such disk here
    call(export.main, "--untrained", "debug", "--out", out, "--fp16")
    assert [g.role for g in read_manifest(out).graphs] == ["step", "canvas", "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_export_to_a_full_disk_leaves_the_old_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    call(export.main, "--untrained", "debug", "--out", out)
    before = snapshot(tmp_path)
    with small_disk(200_000):  # the tokenizer fits, the graph does not
        refused = refusal(capsys, export.main, "--untrained", "debug", "--out", out, "--fp16")
    assert refused == (1, f"{out} cannot be written: File too large")
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_export_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        call(export.main, "--untrained", "debug", "--out", tmp_path / folder / "bundle", "--int8", "--fp16")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.slow
def test_export_takes_figures_from_other_text(trained: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    call(export.main, "--run", trained, "--out", out, "--source", corpus, "--stories", 3)
    found = read_manifest(out).evaluations
    assert [(e.graph, e.source, e.stories) for e in found] == [
        ("torch fp32", "stories", 3),
        ("canvas.cpu.fp32.onnx", "stories", 3),
    ]
    assert found[0].nelbo_nats_per_token.value == pytest.approx(found[1].nelbo_nats_per_token.value, rel=1e-4)


def test_export_writes_the_bundle_before_its_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who stops the command while it measures keeps a bundle that works, without figures."""
    out, found = tmp_path / "bundle", []

    def stopped(*args: object, **options: object) -> None:
        found.append(read_manifest(out))
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        call(export.main, "--run", trained, "--out", out)
    assert found == [read_manifest(out)] and found[0].evaluations == ()
    verified_bytes(out, "canvas.cpu.fp32.onnx", found[0].graphs[0].sha256)
    assert [line[:5] for line in capsys.readouterr().out.splitlines() if line.startswith("[")] == ["[1/2]", "[2/2]"]


def test_export_to_an_unwritable_place_is_refused_first(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "load_run", lambda run: pytest.fail("it began to work"))
    (tmp_path / "note").write_text("mine")
    out = tmp_path / "note" / "bundle"
    refused = refusal(capsys, export.main, "--run", trained, "--out", out)
    assert refused == (1, f"{out} cannot be written: File exists")


def built(nelbo_ratio: float, top1_agreement: float, scheme: str) -> Built:
    parity = Parity(graph="g", scheme=scheme, nelbo_ratio=nelbo_ratio, top1_agreement=top1_agreement)
    return Built(BundleGraph(onnx.ModelProto(), "canvas", "int8", "cuda"), parity, 1.0)


def test_range_rule_is_chosen_by_its_nelbo() -> None:
    """As the shipped network's rules measured: by top-1 agreement, a NELBO eight times as far off was shipped."""
    largest, percentile = built(1.0006, 0.958, "largest"), built(1.0051, 0.969, "percentile")
    assert most_faithful([percentile, largest]) is largest
    assert most_faithful([built(0.994, 0.97, "percentile"), largest]) is largest  # too good is not faithful either


def test_stages_say_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr("host.export.stages.time.monotonic", lambda: next(now))
    stages = Stages({"one": 1, "two": 2, "three": 30})
    for name in ("one", "two", "three"):
        stages.begin(name)
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] one",
        "[2/3] two, about 5 minutes left",
        "[3/3] three, about 5 minutes left",
    ]


def test_export_adds_up_the_tokens_of_every_stage(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """A run that began with another's weights learned from that one's tokens too."""
    for run in ("first", "second"):
        shutil.copytree(trained, tmp_path / run)
    first = tmp_path / "first"
    config = read_config(tmp_path / "second")
    began = replace(config, init=first, init_work=work_behind(first), init_stages=training_stages(first))
    write_config(replace(began, out=tmp_path / "second"))
    out = tmp_path / "bundle"
    call(export.main, "--run", tmp_path / "second", "--out", out, "--source", corpus, "--stories", 2)
    assert read_manifest(out).data.tokens_seen == 2 * load_model(trained / LAST)[1].tokens_seen > 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 65, "no trained run in runs/: make one with `python -m host.train`"),
        (["--run", "nowhere"], 65, "nowhere holds no checkpoint"),
        (["--untrained", "debug", "--out", "taken"], 78, "taken exists and is not a bundle: choose another --out"),
        (["--run", "{trained}", "--out", "taken"], 78, "taken exists and is not a bundle: choose another --out"),
        (["--untrained", "debug", "--out", "taken/note"], 78, "taken/note exists and is not a bundle"),
        (["--untrained", "debug", "--out", "my bundle"], 78, "a bundle's name is letters, digits"),
        (["--untrained", "debug", "--target", "cuda"], 78, "--target cuda needs --fp16 or --int8"),
        (["--untrained", "debug", "--fp32-norms"], 78, "--fp32-norms is about CUDA graphs"),
        (["--untrained", "debug", "--report"], 78, "not with --untrained"),
        (["--untrained", "debug", "--source", "x.txt"], 78, "not with --untrained"),
        (["--untrained", "debug", "--target", "cpu", "--fp16"], 78, "--fp16 is the precision of the CUDA graph"),
        (["--run", "{trained}", "--steps", 0], 78, "--stories must be at least 1, --steps from 1 to 1024"),
        (["--run", "{trained}", "--steps", 1025], 78, "--stories must be at least 1, --steps from 1 to 1024"),
        (["--run", "{trained}", "--temperature", "nan"], 78, "--temperature must be a number from 0 to 10, not nan"),
        (["--run", "{trained}", "--stories", -3], 78, "--stories must be at least 1, --steps from 1 to 1024"),
    ],
    ids=lambda value: " ".join(map(str, value)) or "no runs" if isinstance(value, list) else None,
)
def test_export_refuses_in_one_sentence(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/note").write_text("mine")
    found, sentence = refusal(capsys, export.main, *(str(a).format(trained=trained) for a in arguments))
    assert found == code
    assert words in sentence
    assert snapshot(tmp_path) == {"taken/note": b"mine"}
