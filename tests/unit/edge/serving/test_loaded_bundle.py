"""A bundle end to end, in this process: honest text from a real graph, and every bad bundle in one sentence."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from edge.decoding.types import Row
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from edge.system.bundle_store import check_files
from shared.errors import BundleError, RequestError
from shared.manifest import MANIFEST, TOKENIZER, Graph
from shared.messages import OPEN_POSITION, Gap, GenerateRequest, Reply, Response
from shared.tokens import EOS, FIRST_TEXT_ID, PAD
from tests.conftest import Exported
from tests.support.altered_bundle import changed

REQUESTS = {
    "random": GenerateRequest(prompt="abc", selection="random", steps=6),
    "confidence": GenerateRequest(prompt="abc", selection="confidence", steps=6),
    "margin": GenerateRequest(prompt="abc", selection="margin", steps=6),
    "entropy": GenerateRequest(prompt="abc", selection="entropy", steps=6),
    "hot": GenerateRequest(prompt="", temperature=10, steps=3),
    "argmax": GenerateRequest(prompt="abc", temperature=0, steps=6),
    "threshold": GenerateRequest(prompt="abc", threshold=0.02, steps=12),
    "entropy bound": GenerateRequest(prompt="abc", entropy_bound=20.0, steps=12),
    "short": GenerateRequest(prompt="abc", max_tokens=10),
    "infill": GenerateRequest(segments=["the ", Gap(4), " and ", Gap(3), "."], steps=5),
    "gap at the end": GenerateRequest(segments=["the ", Gap(12)], steps=4),
}


@pytest.fixture(scope="module", params=["fp32", "int8"])
def loaded(request: pytest.FixtureRequest, exported: Exported, exported_int8: Exported) -> Iterator[LoadedBundle]:
    loaded = LoadedBundle.load((exported if request.param == "fp32" else exported_int8).folder, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def fp32(exported: Exported) -> Iterator[LoadedBundle]:
    loaded = LoadedBundle.load(exported.folder, threads=1)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_control_tokens_never_appear_and_pad_only_after_an_end(loaded: LoadedBundle, name: str) -> None:
    for seed in range(4):
        plan = loaded.prepare(replace(REQUESTS[name], seed=seed))
        canvas, layout = loaded.run(plan).canvas, plan.layout
        given_text = layout.canvas >= FIRST_TEXT_ID
        np.testing.assert_array_equal(canvas[given_text], layout.canvas[given_text])
        generated = canvas[layout.fill]
        text_or_end = generated[generated != PAD]
        assert ((text_or_end >= FIRST_TEXT_ID) | (text_or_end == EOS)).all()
        ends = np.flatnonzero(np.isin(canvas, [EOS, PAD]))
        if ends.size:
            assert canvas[ends[0]] == EOS
            assert (canvas[ends[0] + 1 :] == PAD).all()


def test_gaps_between_texts_are_filled_with_text_alone(loaded: LoadedBundle) -> None:
    for seed in range(10):
        plan = loaded.prepare(replace(REQUESTS["infill"], seed=seed))
        completion = loaded.run(plan)
        assert (completion.canvas[plan.layout.fill] >= FIRST_TEXT_ID).all()
        assert completion.generated_tokens == 7
        assert completion.text.startswith("the ")
        assert " and " in completion.text


def test_max_tokens_and_steps_are_bounds_but_for_a_pass_for_a_waiting_end(loaded: LoadedBundle) -> None:
    for bound in (1, 2, 10):
        completion = loaded.run(loaded.prepare(GenerateRequest(prompt="abc", max_tokens=bound, seed=3)))
        assert completion.generated_tokens <= bound
        assert completion.steps <= bound
    for steps in (1, 4):
        completion = loaded.run(loaded.prepare(GenerateRequest(prompt="abc", steps=steps, seed=3)))
        assert completion.steps <= steps + 1


def test_prompt_that_leaves_one_position_gets_one_token(loaded: LoadedBundle) -> None:
    length = loaded.manifest.model.canvas_len
    completion = loaded.run(loaded.prepare(GenerateRequest(prompt="!" * (length - 2), seed=0)))
    assert completion.generated_tokens == 1
    assert completion.text.startswith("!" * (length - 2))


def test_snapshots_count_down_and_show_what_is_open(loaded: LoadedBundle) -> None:
    seen: list[tuple[int, int, int, int]] = []
    plan = loaded.prepare(GenerateRequest(prompt="abc", max_tokens=20, steps=6, seed=1))
    loaded.run(plan, lambda s: seen.append((s.step, s.steps, s.masked, s.text().count(OPEN_POSITION))))
    assert [step for step, *_ in seen] == list(range(1, len(seen) + 1))
    assert all(step <= steps for step, steps, *_ in seen)
    assert all(masked == marks for *_, masked, marks in seen)
    assert seen[-1][2] == 0


def test_top_k_above_the_bundles_is_refused(fp32: LoadedBundle) -> None:
    top_k = fp32.manifest.top_k
    fp32.prepare(GenerateRequest(prompt="", top_k=top_k))
    with pytest.raises(RequestError, match=f"`top_k` {top_k + 1} is above the bundle's {top_k}") as refused:
        fp32.prepare(GenerateRequest(prompt="", top_k=top_k + 1))
    assert refused.value.code == "bad_request"


def test_plan_without_a_seed_gets_one_that_reproduces_the_text(fp32: LoadedBundle) -> None:
    request = GenerateRequest(prompt="abc", max_tokens=30, steps=4)
    plans = [fp32.prepare(request) for _ in range(2)]
    assert plans[0].seed != plans[1].seed
    again = fp32.run(fp32.prepare(replace(request, seed=plans[0].seed)))
    assert again.text == fp32.run(plans[0]).text


def test_text_is_the_same_alone_and_beside_others(loaded: LoadedBundle) -> None:
    """Through the scheduler, between requests that use other lengths, rules and seeds."""
    asked = [replace(REQUESTS[n], seed=7, id=n) for n in ("random", "short", "infill", "threshold")]
    alone = {request.id: loaded.run(loaded.prepare(request)).text for request in asked}
    scheduler = Scheduler(loaded, queue_size=16)
    replies: list[Reply] = []
    arrived = threading.Semaphore(0)

    def reply(message: Reply) -> None:
        replies.append(message)
        arrived.release()

    scheduler.start()
    try:
        for request in [*asked, *reversed(asked), asked[0], asked[0]]:
            scheduler.submit(request, reply)
        assert all(arrived.acquire(timeout=60) for _ in range(10))
    finally:
        scheduler.stop()
    for message in replies:
        assert isinstance(message, Response)
        assert (message.status, message.text) == ("ok", alone[message.id])


def test_text_does_not_depend_on_the_length_that_is_scored(fp32: LoadedBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole canvas at every pass, or only up to the end: positions after it are certain and change nothing."""
    requests = [replace(REQUESTS[n], seed=s) for n in ("short", "random", "confidence") for s in range(2)]
    cut = [fp32.run(fp32.prepare(request)).canvas for request in requests]
    seen = set[int]()

    recount = Row.recount

    def never_cut(row: Row) -> None:
        recount(row)
        seen.add(row.active)
        row.active = row.canvas.size

    monkeypatch.setattr(Row, "recount", never_cut)
    whole = [fp32.run(fp32.prepare(request)).canvas for request in requests]
    assert len(seen) > 1
    np.testing.assert_array_equal(cut, whole)


# --- bundles that do not fit -----------------------------------------------------------------------------------------


@pytest.fixture
def copy(debug_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of links, each of which a test may replace."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in debug_bundle.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    change(manifest)
    write(folder / MANIFEST, msgspec.json.encode(manifest))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def cpu_graph(folder: Path) -> Path:
    return folder / "canvas.cpu.fp32.onnx"


def without_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def truncated_manifest(folder: Path) -> None:
    write(folder / MANIFEST, (folder / MANIFEST).read_bytes()[:200])


def manifest_of_another_kind(folder: Path) -> None:
    write(folder / MANIFEST, b"[1, 2]")


def manifest_that_is_not_text(folder: Path) -> None:
    write(folder / MANIFEST, b"\xff\xfe{}")


def another_version(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(format_version=3))


def unknown_field(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(surprise=4))


def missing_field(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.pop("top_k"))


def a_path_for_a_file_name(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["graphs"][0].update(file="../step.onnx"))


def wrong_graph(folder: Path) -> None:
    content = bytearray(cpu_graph(folder).read_bytes())
    content[len(content) // 2] ^= 1
    write(cpu_graph(folder), bytes(content))


def missing_graph(folder: Path) -> None:
    cpu_graph(folder).unlink()


def wrong_tokenizer(folder: Path) -> None:
    write(folder / TOKENIZER, (folder / TOKENIZER).read_bytes() + b"\n")


def truncated_graph(folder: Path) -> None:
    content = cpu_graph(folder).read_bytes()[:5000]
    write(cpu_graph(folder), content)
    edit_manifest(folder, lambda m: m["graphs"][0].update(sha256=sha256(content)))


def truncated_tokenizer(folder: Path) -> None:
    content = (folder / TOKENIZER).read_bytes()[:500]
    write(folder / TOKENIZER, content)
    edit_manifest(folder, lambda m: m.update(tokenizer_sha256=sha256(content)))


def tokenizer_of_another_size(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["model"].update(vocab_size=600))


def no_cpu_graph(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(graphs=m["graphs"][1:]))


def other_outputs(folder: Path) -> None:
    """The CUDA graph, which ends in logits, listed as the CPU's."""
    edit_manifest(folder, lambda m: m.update(graphs=[m["graphs"][1] | {"target": "cpu"}]))


def other_inputs(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["model"].update(time_input=False))


def another_k(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(top_k=m["top_k"] - 1))


def another_canvas_length(folder: Path) -> None:
    """The graph knows 256 positions; the manifest promises more."""
    edit_manifest(folder, lambda m: m["model"].update(canvas_len=512))


BAD: dict[Callable[[Path], None], str] = {
    without_manifest: "is not a bundle: cannot read manifest.json (No such file or directory)",
    truncated_manifest: "manifest.json is damaged",
    manifest_of_another_kind: "manifest.json is damaged",
    manifest_that_is_not_text: "manifest.json is damaged",
    another_version: "manifest.json has format_version 3; this release reads 2",
    unknown_field: "unknown field `surprise`",
    missing_field: "missing required field `top_k`",
    a_path_for_a_file_name: "`$.graphs[0].file`",
    wrong_graph: "canvas.cpu.fp32.onnx does not match its manifest: sha256",
    missing_graph: "canvas.cpu.fp32.onnx cannot be read (No such file or directory)",
    wrong_tokenizer: "tokenizer.json does not match its manifest: sha256",
    truncated_graph: "canvas.cpu.fp32.onnx cannot be loaded by ONNX Runtime",
    truncated_tokenizer: "tokenizer.json cannot be read",
    tokenizer_of_another_size: "tokenizer.json has 512 tokens, the model 600",
    no_cpu_graph: "has no graph for this device, whose target is 'cpu'; it lists canvas.cuda.fp16.onnx",
    other_outputs: "canvas.cuda.fp16.onnx has inputs and outputs",
    other_inputs: "canvas.cpu.fp32.onnx has inputs and outputs",
    another_k: "canvas.cpu.fp32.onnx gives",
    another_canvas_length: "canvas.cpu.fp32.onnx does not run at length 512",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
@pytest.mark.filterwarnings("error")
def test_bundle_that_does_not_fit_is_refused_in_one_sentence(copy: Path, spoil: Callable[[Path], None]) -> None:
    spoil(copy)
    with pytest.raises(BundleError) as refused:
        LoadedBundle.load(copy, threads=1)
    sentence = str(refused.value)
    print(sentence)
    assert BAD[spoil] in sentence
    assert str(copy) in sentence
    assert "\n" not in sentence


def test_bundle_of_an_earlier_release_serves_without_its_graph_of_several_requests(
    int8_blocks_bundle: Path, tmp_path: Path
) -> None:
    """Its manifest lists one of the role `step.shared`, whose file nothing reads but the installation."""
    content = b"a graph that nothing runs any more"
    shared = Graph(
        file="step.shared.cpu.int8.onnx",
        role="step.shared",
        sha256=hashlib.sha256(content).hexdigest(),
        precision="int8",
        target="cpu",
        inputs=(),
        outputs=(),
    )
    folder = changed(
        int8_blocks_bundle, tmp_path / "b", lambda m: replace(m, graphs=(*m.graphs[:3], shared, *m.graphs[3:]))
    )
    (folder / shared.file).write_bytes(content)
    check_files(folder)
    told = []
    for bundle in (int8_blocks_bundle, folder):
        loaded = LoadedBundle.load(bundle, threads=1)
        plans = [loaded.prepare(replace(request, seed=1)) for request in REQUESTS.values()]
        plans += [loaded.prepare(GenerateRequest(prompt="a", seed=seed, decode="blocks")) for seed in range(3)]
        told.append([type(loaded.rows), loaded.degraded, loaded.window, *(loaded.run(plan).text for plan in plans)])
        loaded.close()
    assert told[0] == told[1]


def test_bundle_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere is not a bundle"):
        LoadedBundle.load(tmp_path / "nowhere")
