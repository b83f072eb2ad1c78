"""Blocks beside llama.cpp: `python -m edge.bench --peers`. In turns, with the same threads and as many tokens each.

llama.cpp runs GPT-2's architecture in the bundle's shape (pre-norm, learned positions, GELU, 4 D wide, head tied to the
embedding) with random weights, which cost what trained ones do. Ours depends on the weights where drafts are kept.
Packages: llama-cpp-python and gguf, the extra `peers`. D: width.
"""

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Completion
from shared.errors import ConfigError
from shared.manifest import Manifest, ModelSpec, find_graph
from shared.messages import GenerateRequest
from shared.tokens import FIRST_TEXT_ID

TOKENS: Final = 200
"""Of a text, or fewer where ours ends itself; llama.cpp then writes as many."""
TURNS: Final = 11
TEMPERATURE: Final = 0.8
REQUEST: Final = GenerateRequest(
    prompt="Once upon a time", max_tokens=TOKENS, temperature=TEMPERATURE, top_p=1.0, decode="blocks"
)
QUANTIZATIONS: Final = ("Q8_0", "Q4_0")
BASE: Final = "llama.cpp Q8_0"
BYTES: Final = {"llama.cpp Q8_0": 34 / 32, "llama.cpp Q4_0": 18 / 32}
"""Of a weight: 32 share a scale in FP16."""
READS: Final = 50
REST_S: Final = 0.1
"""Before a text, so that no thread of the other runtime still spins."""
SILENT: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
"""llama.cpp's log goes there for as long as the process lives."""

Writer = Callable[[int, int, int], None]
"""Writes a text. Arguments: tokens of the prompt, tokens to write, seed."""


class Speed(Struct):
    """A runtime's medians over turns. ratio: its tokens/s over llama.cpp's with Q8_0 in the same turn.

    read_gbs: weights that its passes read in a second: all but the embedding's and the drafter's.
    """

    runtime: str
    tokens_per_s: float
    ratio: float
    read_gbs: float


class Turn(NamedTuple):
    """One seed's texts. rates, passes: a second, by runtime."""

    tokens: int
    same_text: bool
    rates: dict[str, float]
    passes: dict[str, float]


class Peers(Struct):
    """tokens: median length of the texts. same_texts: turns in which drafts did not change ours.

    read_peak_gbs: what one core reads of as many bytes as the weights have in INT8. mflop: of a token's products.
    reference: the machine's matmul peaks, from `host.bench step`; None where the host is not installed.
    """

    bundle: str
    threads: int
    turns: int
    tokens: int
    same_texts: int
    speeds: list[Speed]
    mflop: float
    read_peak_gbs: float
    reference: dict[str, float] | None


def packages() -> tuple[Any, Any]:
    """The modules llama_cpp, without its log, and gguf. Raises ConfigError."""
    try:
        import gguf
        import llama_cpp
    except ImportError as error:
        raise ConfigError(f'--peers needs its packages ({error}): pip install "diffusion-llm[peers]"') from None
    llama_cpp.llama_log_set(SILENT, None)
    return llama_cpp, gguf


def write_gguf(gguf: Any, file: Path, model: ModelSpec, quantization: str) -> None:
    """A network of the shape with random weights: matrices quantized, norms, biases and positions float32.

    Its tokenizer is "none": it takes and gives ids. Raises ConfigError for a width that cannot be quantized.
    """
    d, kind = model.d_model, gguf.GGMLQuantizationType[quantization]
    if d % (shared := gguf.GGML_QUANT_SIZES[kind][0]):  # weights that have one scale
        raise ConfigError(f"--peers: {quantization} needs a multiple of {shared} as d_model, the bundle has {d}")
    writer, random = gguf.GGUFWriter(file, "gpt2"), np.random.default_rng(0)
    writer.add_context_length(model.canvas_len)
    writer.add_embedding_length(d)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(4 * d)
    writer.add_head_count(model.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantization}"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(model.vocab_size)
    writer.add_tensor("position_embd.weight", random.normal(0, 0.02, (model.canvas_len, d)).astype(np.float32))
    matrices, norms = {"token_embd": (model.vocab_size, d)}, ["output_norm"]  # no matrix `output`: the head is tied
    for block in (f"blk.{layer}" for layer in range(model.layers)):
        matrices |= {f"{block}.attn_qkv": (3 * d, d), f"{block}.attn_output": (d, d)}
        matrices |= {f"{block}.ffn_up": (4 * d, d), f"{block}.ffn_down": (d, 4 * d)}
        norms += [f"{block}.attn_norm", f"{block}.ffn_norm"]
    for name, (outputs, inputs) in matrices.items():
        weights = random.normal(0, inputs**-0.5, (outputs, inputs)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(weights, kind), raw_dtype=kind)
        if name != "token_embd":
            writer.add_tensor(f"{name}.bias", np.zeros(outputs, np.float32))
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(d, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(d, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_writer(llama: Any, file: Path, *, manifest: Manifest, threads: int, closing: ExitStack) -> Writer:
    """llama.cpp by its C functions, without the costs of its Python class. `closing` frees it."""
    model_settings, settings = llama.llama_model_default_params(), llama.llama_context_default_params()
    model_settings.n_gpu_layers = 0
    settings.n_ctx = settings.n_batch = settings.n_ubatch = manifest.model.canvas_len
    settings.n_threads = settings.n_threads_batch = threads
    model = llama.llama_model_load_from_file(str(file).encode(), model_settings)
    closing.callback(llama.llama_model_free, model)  # takes NULL
    context = llama.llama_init_from_model(model, settings) if model else None
    closing.callback(llama.llama_free, context)
    if not context:
        raise ConfigError(f"--peers: llama-cpp-python {llama.__version__} does not load GPT-2 in the bundle's shape")

    def write(prompt: int, count: int, seed: int) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(sampler, llama.llama_sampler_init_top_k(manifest.top_k))
        llama.llama_sampler_chain_add(sampler, llama.llama_sampler_init_temp(TEMPERATURE))
        llama.llama_sampler_chain_add(sampler, llama.llama_sampler_init_dist(seed))
        tokens = (llama.llama_token * prompt)(*range(FIRST_TEXT_ID, FIRST_TEXT_ID + prompt))
        drawn = (llama.llama_token * 1)()
        batch, one = llama.llama_batch_get_one(tokens, prompt), llama.llama_batch_get_one(drawn, 1)
        for _ in range(count):
            if llama.llama_decode(context, batch):
                raise ConfigError(f"--peers: `llama_decode` of llama-cpp-python {llama.__version__} failed")
            drawn[0], batch = llama.llama_sampler_sample(sampler, context, -1), one
        llama.llama_sampler_free(sampler)

    return write


def one_turn(loaded: LoadedBundle, windows: Mapping[str, int | None], theirs: Mapping[str, Writer], seed: int) -> Turn:
    """A text by each runtime, ours first: it says how many tokens there are."""
    texts, rates, passes = list[Completion](), dict[str, float](), dict[str, float]()
    for name, window in windows.items():
        time.sleep(REST_S)
        started = time.perf_counter()
        plan = loaded.prepare(msgspec.structs.replace(REQUEST, window=window, seed=seed))
        texts.append(loaded.run(plan))
        seconds = time.perf_counter() - started
        rates[name], passes[name] = texts[-1].generated_tokens / seconds, texts[-1].steps / seconds
    tokens = texts[0].generated_tokens
    for name, write in theirs.items():
        time.sleep(REST_S)
        started = time.perf_counter()
        write(plan.prompt_tokens + 1, tokens, seed)  # BOS is one
        rates[name] = passes[name] = tokens / (time.perf_counter() - started)
    return Turn(tokens, all(np.array_equal(text.canvas, texts[0].canvas) for text in texts), rates, passes)


def read_peak(size: int) -> float:
    """GB/s that one core reads of so many bytes, again and again: the best of some maxima of float32."""
    numbers, least_s = np.zeros(size // 4, np.float32), float("inf")
    for _ in range(READS):
        started = time.perf_counter()
        numbers.max()
        least_s = min(least_s, time.perf_counter() - started)
    return numbers.nbytes / least_s / 1e9


def measure_peers(loaded: LoadedBundle, bundle: str, threads: int, reference: dict[str, float] | None) -> Peers:
    """Medians over turns, after one that warms all up. Raises ConfigError."""
    manifest = loaded.manifest
    if loaded.rows is None or manifest.blocks is None:
        raise ConfigError(f"--peers times blocks, which {loaded.model} does not decode by on this device")
    llama, gguf = packages()
    windows = {"ours, drafting off": 0} | ({"ours, drafting on": None} if manifest.blocks.window else {})
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        theirs = dict[str, Writer]()
        for name in QUANTIZATIONS:
            file = Path(folder) / f"{name}.gguf"
            write_gguf(gguf, file, manifest.model, name)
            theirs[f"llama.cpp {name}"] = llama_writer(llama, file, manifest=manifest, threads=threads, closing=closing)
        turns = [one_turn(loaded, windows, theirs, seed) for seed in range(TURNS + 1)][1:]
    weights = (
        12 * manifest.model.d_model**2 * manifest.model.layers + manifest.model.d_model * manifest.model.vocab_size
    )
    own_bytes = 1.0 if find_graph(Path(bundle), manifest, "cpu", "step").precision == "int8" else 4.0
    speeds = []
    for name in (*windows, *theirs):
        ratio = statistics.median(turn.rates[name] / turn.rates[BASE] for turn in turns)
        read = weights * BYTES.get(name, own_bytes) * statistics.median(turn.passes[name] for turn in turns) / 1e9
        speeds.append(Speed(name, statistics.median(turn.rates[name] for turn in turns), ratio, read))
    tokens, same = statistics.median_low(turn.tokens for turn in turns), sum(turn.same_text for turn in turns)
    return Peers(
        bundle=bundle,
        threads=threads,
        turns=TURNS,
        tokens=tokens,
        same_texts=same,
        speeds=speeds,
        mflop=2 * weights / 1e6,
        read_peak_gbs=read_peak(weights),
        reference=reference,
    )


def print_peers(peers: Peers) -> None:
    """The table."""
    print(f"{peers.bundle}, {peers.threads} threads, {peers.turns} turns, {peers.tokens} tokens a text (median)")
    print(f"drafting on and off: the same text in {peers.same_texts} of {peers.turns} turns")
    print(f"one core reads {peers.read_peak_gbs:.0f} GB/s of as many bytes as the weights have in INT8")
    int8 = None if peers.reference is None else peers.reference["int8_gflops"]
    if int8 is not None:
        print(f"matmul peak, INT8: {int8:.0f} GOP/s; a token's products: {peers.mflop:.1f} MOP")
    print(
        f"{'':20} {'tokens/s':>9} {'of llama.cpp Q8_0':>18} {'GB/s read':>10} {'of the peak':>12} {'of INT8 peak':>13}"
    )
    for s in peers.speeds:
        reached = "" if int8 is None else f"{s.tokens_per_s * peers.mflop / 1e3 / int8:13.1%}"
        read = f"{s.read_gbs:6.1f} {s.read_gbs / peers.read_peak_gbs:8.2f}"
        print(f"{s.runtime:20} {s.tokens_per_s:9.0f} {s.ratio:18.2f} {read} {reached}".rstrip())
