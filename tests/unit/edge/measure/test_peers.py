"""`python -m edge.bench --peers`. The whole of it runs where the extra `peers` is installed."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge.measure.bench import main
from edge.measure.peers import QUANTIZATIONS, TOKENS, TURNS, Peers, Speed, measure_peers, print_peers, write_gguf
from edge.serving.loaded_bundle import LoadedBundle
from shared.errors import ConfigError
from shared.manifest import ModelSpec, read_manifest
from tests.support.commands import refusal

REASON = "the extra `peers` is not installed"


@pytest.mark.parametrize("missing", ["gguf", "llama_cpp"])
def test_peers_without_a_package_say_how_to_install_it(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gguf", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    code, sentence = refusal(capsys, main, "--peers", "--bundle", "/no/such/bundle")
    assert code == 78
    assert sentence.startswith("--peers needs its packages (import of " + missing)
    assert sentence.endswith(': pip install "diffusion-llm[peers]"')


def test_peers_of_a_bundle_without_blocks_are_refused(debug_bundle: Path) -> None:
    loaded = LoadedBundle.load(debug_bundle, "ort", 1)
    with pytest.raises(ConfigError, match=r"times blocks, which debug@.* does not decode by"):
        measure_peers(loaded, "debug", 1, None)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_peers_file_has_the_shape_of_the_bundle(quantization: str, blocks_bundle: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason=REASON)
    model, file = read_manifest(blocks_bundle).model, tmp_path / "network.gguf"
    write_gguf(gguf, file, model, quantization)
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.context_length"] == model.canvas_len
    assert fields["gpt2.attention.head_count"] == model.heads
    assert fields["gpt2.vocab_size"] == model.vocab_size
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 4 + 12 * model.layers
    d = model.d_model
    for name, outputs, inputs in (
        ("token_embd", model.vocab_size, d),
        ("blk.0.attn_qkv", 3 * d, d),
        (f"blk.{model.layers - 1}.ffn_down", d, 4 * d),
    ):
        tensor = tensors[f"{name}.weight"]
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert tensor.tensor_type.name == quantization
        assert weights.shape == (outputs, inputs)
        assert np.std(weights) == pytest.approx(inputs**-0.5, rel=0.05)
    assert tensors["position_embd.weight"].data.shape == (model.canvas_len, d)


def test_peers_width_that_cannot_be_quantized_is_refused(blocks_bundle: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason=REASON)
    model: ModelSpec = msgspec.structs.replace(read_manifest(blocks_bundle).model, d_model=72)
    with pytest.raises(ConfigError, match="Q8_0 needs a multiple of 32 as d_model, the bundle has 72"):
        write_gguf(gguf, tmp_path / "network.gguf", model, "Q8_0")


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("gguf") and find_spec("llama_cpp")), reason=REASON)
def test_peers_json_has_every_runtime(blocks_bundle: Path) -> None:
    command = [sys.executable, "-m", "edge.bench", "--bundle", str(blocks_bundle), "--threads", "1", "--peers"]
    done = subprocess.run([*command, "--json"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    peers = msgspec.json.decode(done.stdout, type=Peers)
    names = ["ours, drafting off", "ours, drafting on", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    assert [speed.runtime for speed in peers.speeds] == names
    assert min(min(speed.tokens_per_s, speed.ratio) for speed in peers.speeds) > 0
    assert peers.speeds[2].ratio == 1
    assert (peers.threads, peers.turns) == (1, TURNS)
    assert 0 < peers.tokens <= TOKENS
    assert min(peers.read_peak_gbs, *(speed.read_gbs for speed in peers.speeds)) > 0


@pytest.mark.parametrize("reference", [None, {"int8_gflops": 2000.0}], ids=["edge alone", "with the host"])
def test_peers_table_has_the_peaks_and_the_fractions_reached(
    reference: dict[str, float] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """2,000 tokens/s of 10 MOP each are 20 GOP/s; weights read at 12 GB/s of 48."""
    speeds = [Speed("ours, drafting on", 2000.0, 0.8, 12.0)]
    print_peers(Peers("a", 2, 11, 200, 11, speeds, mflop=10.0, read_peak_gbs=48.0, reference=reference))
    printed = capsys.readouterr().out
    assert "reads 48 GB/s" in printed and ("INT8: 2000 GOP/s" in printed) == (reference is not None)
    wanted = ["ours,", "drafting", "on", "2000", "0.80", "12.0", "0.25"] + ["1.0%"] * (reference is not None)
    assert printed.splitlines()[-1].split() == wanted
