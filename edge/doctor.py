"""What this device has, what it lacks, and what to fix first: `python -m edge.doctor`.

A device that is meant to serve from its CPU lacks nothing without a GPU.
"""

import argparse
import grp
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from edge.backends import choose_backend
from edge.backends.native_rows import NativeRows
from edge.backends.trt import engine_cache as engines
from edge.backends.trt.driver import Gpu
from edge.backends.trt.find_tensorrt import TEGRA, import_tensorrt, is_gpu_device, on_jetson
from edge.client import connect, health
from edge.config import CONFIG, Config, load_config, settings_file
from edge.decoding.blocks import AnyRows, BlocksLoop, RowsBackend
from edge.measure.conditions import KINDS, measure_condition
from edge.measure.self_test import (
    MIN_AGREEMENT,
    STEPS,
    Compared,
    compare_blocks,
    compare_profiles,
    open_row,
    step_ms,
)
from edge.native import why_not
from edge.serving.loaded_bundle import LoadedBundle
from edge.system.board import SYS, read_rails, read_zones
from edge.system.bundle_store import check_files
from edge.system.memory import available_mb
from edge.transports.mqtt.login import try_login
from edge.transports.peer_credentials import user_id
from shared.errors import BundleError, ConfigError, DeviceError, DiffusionLLMError, command_name, run_main
from shared.manifest import ROLE_OF, Manifest, Role, Target, find_graph, read_manifest
from shared.messages import GenerateRequest

MIN_DISK_MIB: Final = 64
MIN_MEMORY_MIB: Final = 256
BLOCKS_TEST: Final = GenerateRequest(prompt="", seed=1, max_tokens=16, window=0)
BUNDLE: Final = "bundle"
JETPACKS: Final = {36: 6, 38: 7, 39: 7}
"""Major version of Jetson Linux → of JetPack."""
NODES: Final = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvmap", "/dev/dri/renderD128")


class Finding(Struct, frozen=True):
    """One line of the report. fix: what to do, if anything."""

    name: str
    value: str
    fix: str | None = None


def jetpack(release: Path = TEGRA[0]) -> Finding:
    """JetPack's major version goes with that of Jetson Linux: "# R36 (release), REVISION: 4.3, …" is JetPack 6."""
    try:
        line = release.read_text("utf-8").partition("\n")[0]
    except OSError:
        return Finding("jetpack", "no Jetson Linux")
    version = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", line)
    if version is None or (major := JETPACKS.get(int(version[1]))) is None:
        return Finding("jetpack", line, "this Jetson Linux is not supported: JetPack 6 (R36) is the oldest that is")
    return Finding("jetpack", f"{major} (Jetson Linux {version[1]}.{version[2]})")


def system() -> list[Finding]:
    """Python, board, power mode, device nodes."""
    found = [Finding("python", f"{platform.python_version()} on {platform.machine()}"), jetpack()]
    if shutil.which("nvpmodel"):
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, check=False, timeout=10)
        found.append(Finding("power mode", " ".join(done.stdout.split()) or done.stderr.strip()))
    else:
        found.append(Finding("power mode", "no nvpmodel"))
    nodes = NODES if on_jetson() else NODES[:2]  # elsewhere a render node may belong to another vendor's GPU
    return [*found, *device_nodes([Path(node) for node in nodes])]


def device_nodes(nodes: list[Path]) -> list[Finding]:
    """Which device nodes exist, and whether this user may open them."""
    present = [node for node in nodes if node.exists()]
    if not present:
        return [Finding("device nodes", "none")]
    closed = [node for node in present if not os.access(node, os.R_OK | os.W_OK)]
    if not closed:
        return [Finding("device nodes", ", ".join(map(str, present)))]
    group = closed[0].group()
    members = [grp.getgrgid(g).gr_name for g in os.getgroups()]
    fix = f"{closed[0]} is closed to this user (groups: {', '.join(members)}): sudo usermod -aG {group} $USER"
    return [Finding("device nodes", f"{len(closed)} of {len(present)} are closed", fix)]


def sensors(root: Path = SYS) -> list[Finding]:
    """Power of each rail and temperature of each zone, where the board tells."""
    rails = [f"{name} {value:.2f} W" for name, value in read_rails(root).items()]
    zones = [f"{name} {value:.0f} °C" for name, value in read_zones(root).items()]
    return [
        Finding("power", ", ".join(rails) or "no INA3221 sensor"),
        Finding("temperature", ", ".join(zones) or "no thermal zone"),
    ]


Profiles = dict[Role, list[tuple[int, int]]]
"""(batch, length) or (requests, rows) of an engine, by the role of its graph."""
ENGINES: Final[dict[Role, str]] = {
    "canvas": "engine",
    "step": "engine of blocks",
    "encode.text": "engine of words",
    "encode.image": "engine of pictures",
}


def gpu_and_engine(folder: Path, manifest: Manifest | None) -> tuple[list[Finding], Profiles]:
    """Driver, GPU, TensorRT, engines.  → findings, the profiles of the engines that can be loaded"""
    found, profiles = list[Finding](), Profiles()
    with ExitStack() as stack:
        try:
            gpu = Gpu()
            stack.callback(gpu.close)
            free, total = gpu.free_memory()
        except DeviceError as error:
            return [Finding("gpu", "absent", str(error))], {}
        found.append(Finding("gpu", f"{gpu.name}, {gpu.architecture}, CUDA {gpu.cuda_version}"))
        found.append(Finding("gpu memory", f"{free >> 20} of {total >> 20} MiB free"))
        try:
            trt = import_tensorrt()
            found.append(Finding("tensorrt", trt.__version__))
            if manifest is None:
                return found, profiles
            for role in engines.built_roles(manifest) or ["canvas"]:
                facts = engines.facts_of(folder, manifest, tensorrt=trt.__version__, gpu=gpu, role=role)
                place = engines.find(facts, engines.cache_folders())
                fix = None if place else f"python -m edge.build --bundle {folder}"
                found.append(Finding(ENGINES[role], str(place or "not built yet"), fix))
                if place:
                    profiles[role] = list(facts.shapes)
        except DiffusionLLMError as error:
            found.append(Finding("tensorrt", "unusable", str(error)))
    return found, profiles


def _compiled(rows: AnyRows) -> str:
    """What computes passes by blocks on the CPU, and where it is ONNX Runtime, why."""
    if isinstance(rows, NativeRows):
        return f"the compiled library ({rows.networks.library.instructions})"
    return f"ONNX Runtime, as the compiled library {why_not() or 'does not know the graphs of this bundle'}"


def self_test(folder: Path, manifest: Manifest, profiles: Profiles, threads: int = 0) -> list[Finding]:
    """Blocks and canvas on the CPU; and every profile of the engines, compared with the CPU from the same texts.

    threads: of the CPU, as the daemon has them.
    """
    with ExitStack() as stack:
        loaded = LoadedBundle.load(folder, "ort", threads)
        stack.callback(loaded.close)
        found, cpu, rows_on_cpu = list[Finding](), loaded.backend, loaded.rows
        if loaded.rows is not None:
            plan, started_s = loaded.prepare(BLOCKS_TEST), time.perf_counter()
            steps = loaded.run(plan).steps
            cost_ms = (time.perf_counter() - started_s) * 1e3 / steps
            found.append(Finding("blocks on the cpu", f"{cost_ms:.2f} ms a pass, by {_compiled(loaded.rows)}"))
        for kind in KINDS if loaded.takes_conditions else ():
            cost = measure_condition(loaded, kind)
            found.append(
                Finding(
                    f"{kind} on the cpu", f"{cost.encode_ms:.2f} ms, then {cost.passes[0].conditioned:.2f} × a pass"
                )
            )
        if cpu is not None:
            rows = [open_row(manifest, manifest.model.canvas_len, seed=1)]
            cpu_ms = statistics.median(step_ms(cpu, manifest, rows) for _ in range(STEPS))
            found.append(Finding("step on the cpu", f"{cpu_ms:.2f} ms"))
        if not profiles:
            return found
        compared: list[tuple[str, Compared]] = []
        gpu = choose_backend("trt", folder, manifest, 0)
        for backend in (gpu.backend, gpu.rows):
            if backend is not None:
                stack.callback(backend.close)
        if gpu.backend is not None and cpu is not None:
            compared += [("", one) for one in compare_profiles(gpu.backend, cpu, manifest, profiles["canvas"])]
        if isinstance(gpu.rows, BlocksLoop) and isinstance(rows_on_cpu, RowsBackend):
            for one in compare_blocks(gpu.rows, rows_on_cpu, manifest, profiles["step"]):
                compared.append((f" rows with {one.kind}" if one.kind else " rows", one))
    for what, one in compared:
        name = f"{one.batch} × {one.length}{what} on the gpu"
        fix = None if one.agreement >= MIN_AGREEMENT else f"{name} disagrees with the CPU: python -m edge.build --force"
        found.append(Finding(name, f"{one.step_ms:.2f} ms, {one.agreement:.0%} of the tokens are the CPU's", fix))
    return found


def serves_from_gpu(config: Config, has_gpu: bool) -> bool:
    """Whether this device is meant to serve from a GPU: by its settings, or with `auto` because it has one."""
    return config.backend.startswith("trt") or (config.backend == "auto" and (has_gpu or is_gpu_device()))


def whole_bundle(folder: Path, target: Target) -> Finding:
    """Whether the bundle can be read, has the graphs for the target, and all files match their hashes."""
    try:
        manifest = read_manifest(folder)
        for decoder in manifest.decoders if target == "cpu" else manifest.decoders[-1:]:  # a GPU may serve one alone
            find_graph(folder, manifest, target, ROLE_OF[decoder])
        check_files(folder)
    except DiffusionLLMError as error:
        return Finding(BUNDLE, "unusable", str(error))
    graphs = ", ".join(dict.fromkeys(f"{graph.target} {graph.precision}" for graph in manifest.graphs))
    return Finding(BUNDLE, f"{manifest.name}: {graphs}")


def listener(path: Path) -> Finding:
    """Which process listens on the daemon's socket, and its health."""
    try:
        connection = connect(path)
    except ConfigError as error:
        return Finding("socket", str(path), f"{error}: see `ls -l {path}`")
    if connection is None:
        return Finding("socket", f"{path}: no daemon listens")
    with connection:
        uid, daemon = user_id(connection), health(connection)
    if daemon is None:
        fix = f"what listens on {path}, of user {uid}, is not this daemon: stop it, or choose another `socket`"
        return Finding("socket", f"{path}: not this daemon", fix)
    failing = None if daemon.failure is None else f"the daemon is in state {daemon.state}: {daemon.failure}"
    return Finding("socket", f"{path}: {daemon.model} on {daemon.backend}, {daemon.state}, of user {uid}", failing)


def surroundings(config: Config, on_gpu: bool) -> list[Finding]:
    """Socket, broker, disk of the state and of the engines, memory."""
    found = [listener(config.socket)]
    if config.mqtt.host is None:
        found.append(Finding("broker", "none is configured"))
    else:
        broker, fix = f"{config.mqtt.host}:{config.mqtt.port}", try_login(config.mqtt, f"edgelm-{config.device}-doctor")
        found.append(Finding("broker", broker if fix else f"{broker} accepts our login", fix))
        found.append(Finding("topics", f"{config.mqtt.base_topic}/{config.device}/…"))
    for folder in (config.state, *engines.cache_folders()[: 1 if on_gpu else 0]):
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        found.append(_room("disk", f"for {folder}", shutil.disk_usage(place).free >> 20, MIN_DISK_MIB))
    if (free_mb := available_mb()) is not None:
        found.append(_room("memory", "available", int(free_mb * 1e6) >> 20, MIN_MEMORY_MIB))
    return found


def _room(name: str, what: str, mib: int, least_mib: int) -> Finding:
    fix = None if mib >= least_mib else f"{name}: {mib} MiB {what}, at least {least_mib} are needed"
    return Finding(name, f"{mib} MiB {what}", fix)


def examine(config: Config) -> list[Finding]:
    """The whole report; every failure becomes a finding. GPU findings need a fix only where a GPU is meant to serve."""
    manifest = None
    with suppress(DiffusionLLMError):  # reported by whole_bundle
        manifest = read_manifest(config.bundle)
    gpu, profiles = gpu_and_engine(config.bundle, manifest)
    on_gpu = serves_from_gpu(config, has_gpu=gpu[0].value != "absent")
    bundle = whole_bundle(config.bundle, "cuda" if on_gpu else "cpu")
    if not on_gpu:
        gpu = [Finding(finding.name, finding.value) for finding in gpu]
    found = [*system(), Finding("serves from", "GPU" if on_gpu else "CPU"), bundle, *gpu]
    if manifest is not None and not any(graph.target == "cpu" for graph in manifest.graphs):
        found.append(Finding("self-test", "none: the bundle has no graph for the CPU, which the GPU is compared with"))
    elif manifest is not None and bundle.fix is None:
        try:
            found += self_test(config.bundle, manifest, profiles if on_gpu else {}, config.threads)
        except DiffusionLLMError as error:
            found.append(Finding("self-test", "failed", str(error)))
    return [*found, *sensors(), *surroundings(config, on_gpu)]


def main(argv: list[str] | None = None) -> int:
    """Print the report; the exit status is 0 when nothing needs a fix, else 66 for a bundle and 69."""
    parser = argparse.ArgumentParser(
        prog=command_name("edge.doctor"),
        description=__doc__,
        epilog="exit codes: 0 all is well, 66 the bundle cannot be used, 69 something else needs a fix first; "
        "example: edgelm doctor --bundle bundles/mine",
    )
    parser.add_argument("--bundle", metavar="DIR", help="bundle to examine (default: the one that is served)")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"its settings (default: {CONFIG}, if it is there)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    found = examine(load_config(settings_file(args.config), {"bundle": args.bundle} if args.bundle else {}))
    fixes = [finding.fix for finding in found if finding.fix]
    if args.json:
        print(msgspec.json.encode({"findings": found, "fix_first": fixes[0] if fixes else None}).decode())
    else:
        for finding in found:
            print(f"{'✗' if finding.fix else ' '} {finding.name:16} {finding.value}")
        if fixes:
            print(f"fix first: {fixes[0]}", file=sys.stderr)
    of_bundle = next((finding.name for finding in found if finding.fix), "") == BUNDLE
    return 0 if not fixes else BundleError.exit_code if of_bundle else DeviceError.exit_code


if __name__ == "__main__":
    run_main(main)
