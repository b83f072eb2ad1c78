"""Run in a process of its own (TensorRT keeps one logger): parse a graph with tensorrt-rtx and perhaps build it."""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """argv: target folder, graph, shapes as JSON (none: parse only).  → JSON with messages, layers, engine bytes"""
    target, graph, shapes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    sys.path.insert(0, target)
    import tensorrt_rtx as trt

    from edge.backends.trt.engine_builder import build, parse
    from edge.backends.trt.find_tensorrt import make_logger
    from shared.errors import DeviceError

    messages: list[tuple[str, str]] = []
    found: dict[str, Any] = {"version": trt.__version__, "messages": messages}
    logger = make_logger(trt, lambda severity, message: messages.append((severity, message)))
    content = graph.read_bytes()
    try:
        if shapes:
            steps: list[str] = []
            engine, timings = build(
                trt,
                logger,
                graph=content,
                shapes=[(batch, length) for batch, length in shapes],
                workspace_mib=256,
                timings=b"",
                progress=lambda phase, done, of: steps.append(phase),
            )
            found |= {"engine": len(engine), "timings": len(timings), "phases": sorted(set(steps))}
        else:
            found["layers"] = parse(trt, trt.Builder(logger), logger, content).num_layers
    except DeviceError as error:
        found["error"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
