"""`python -m edge.generate`: ask the daemon for text, or generate in this process when none listens."""

import argparse
import math
import os
import re
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, get_args

import msgspec

from edge.client import ask, connect
from edge.config import Config, default_socket, load_config, socket_candidates
from edge.terminal_view import View, printable
from shared.errors import ERROR_CODES, ConfigError, DiffusionLLMError, RequestError, command_name, run_main
from shared.manifest import Selection
from shared.messages import GenerateRequest, Partial, Reply, Response, decode_request, encode

DEFAULT_GAP: Final = 4
GAP: Final = re.compile(r"___(?::(\d+))?")

EPILOG = """examples:
  python -m edge.generate "Once upon a time" --stream
  python -m edge.generate --infill "Tom had a ___ and it was ___:6." --seed 7
  python -m edge.generate "Lily found a" --steps 32 --temperature 0.8 --json"""

FIELDS: Final = (
    "seed", "steps", "temperature", "top_p", "top_k", "selection", "threshold", "entropy_bound", "max_tokens", "stream"
)  # fmt: skip
"""Flags that go into the request as they are."""


def parse_infill(text: str) -> list[Any]:
    """`Tom had a ___ and it was ___:6.` as a request's segments; ___ is a gap of 4 tokens. Raises RequestError."""
    segments: list[Any] = []
    end = 0
    for gap in GAP.finditer(text):
        segments += [text[end : gap.start()], {"gap": int(gap[1] or DEFAULT_GAP)}]
        end = gap.end()
    if not segments:
        raise RequestError("bad_request", "--infill has no gap: write ___ where 4 tokens are missing, ___:6 for 6")
    return [segment for segment in [*segments, text[end:]] if segment != ""]


def build_request(args: argparse.Namespace) -> GenerateRequest:
    """The request that the flags describe, checked as the daemon would. Raises RequestError."""
    fields = {name: value for name in FIELDS if (value := getattr(args, name)) is not None}
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers, and would say null
            raise RequestError("bad_request", f"`{name}` must be a number, not {value}")
    if args.infill is None:
        fields["prompt"] = args.prompt
    else:
        fields["segments"] = parse_infill(args.infill)
    try:
        return decode_request(msgspec.json.encode(fields))
    except UnicodeEncodeError:
        raise RequestError("bad_request", "the text is not UTF-8: check the terminal's locale") from None


def find_daemon(config: Config) -> socket.socket | None:
    """A connection to the configured socket, or to the first default one that answers; None when none does."""
    if config.socket != default_socket():
        return connect(config.socket)
    for path in socket_candidates():
        with suppress(OSError, ConfigError):  # nobody said that a daemon listens there
            # In a folder open to all, anyone could pose as the daemon and read the prompts.
            if path.lstat().st_uid in (0, os.getuid()) and (connection := connect(path)) is not None:
                return connection
    return None


def ask_daemon(connection: socket.socket, request: GenerateRequest, show: Callable[[Partial], None]) -> Response:
    """The daemon's answer; `show` gets the snapshots before it. Raises RequestError when the daemon leaves."""
    for reply in ask(connection, request):
        if isinstance(reply, Response):
            return reply
        show(reply)
    raise AssertionError("ask ends with a response")


def generate_here(config: Config, request: GenerateRequest, show: Callable[[Partial], None]) -> Response:
    """The same answer from this very process. Raises BundleError or ConfigError."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the engine imports ONNX Runtime
    from edge.serving.loaded_bundle import Engine  # not at the top: a client of the daemon needs no runtime
    from edge.serving.scheduler import Scheduler

    responses: list[Response] = []

    def receive(reply: Reply) -> None:
        if isinstance(reply, Response):
            responses.append(reply)
        elif isinstance(reply, Partial):
            show(reply)

    engine = Engine.load(config.bundle, config.backend, config.threads)
    scheduler = Scheduler(engine, queue_size=1)
    scheduler.submit(request, receive)
    scheduler.refuse_new()
    scheduler.run()
    engine.close()
    return responses[0]


def unwrap(response: Response) -> str:
    """The text of an answer; raises the error it carries instead."""
    if response.error is not None:
        if response.error.code not in ERROR_CODES:
            raise DiffusionLLMError(response.error.message)
        raise RequestError(response.error.code, response.error.message, response.error.retry_after_ms)
    return response.text or ""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, get the text, print it."""
    parser = command_line()
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.infill is None):
        parser.error("give either a prompt or --infill TEXT")
    request = build_request(args)
    flags = {key: value for key in ("bundle", "socket") if (value := getattr(args, key)) is not None}
    config = load_config(flags=flags)
    connection = None if args.bundle is not None else find_daemon(config)
    with View(sys.stderr) as view:
        if connection is not None:
            with connection:
                response = ask_daemon(connection, request, view.show)
        else:
            absent = "" if args.bundle is not None else f"no daemon listens at {config.socket}; "
            print(f"{absent}generating in this process with {config.bundle}", file=sys.stderr)
            response = generate_here(config, request, view.show)
    if args.json:
        print(encode(response).decode())
        return 0 if response.error is None else RequestError.exit_code
    text = unwrap(response)
    print(printable(text) if sys.stdout.isatty() else text)
    return 0


def command_line() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog=command_name("edge.generate"),
        description="Ask the daemon for text. Fields left out take the bundle's defaults.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", help="how the text begins")
    parser.add_argument("--infill", metavar="TEXT", help="text with gaps: ___ for 4 tokens, ___:6 for 6")
    parser.add_argument("--stream", action="store_true", default=None, help="watch the canvas unmask (on stderr)")
    parser.add_argument("--json", action="store_true", help="print the whole response")
    parser.add_argument(
        "--seed", type=int, help="repeats a text exactly, on the same kind of processor (default: random)"
    )
    parser.add_argument("--steps", type=int, help="passes of the network; the most of them with the two bounds below")
    parser.add_argument("--threshold", type=float, metavar="P", help="commit every token at least this probable")
    parser.add_argument("--entropy-bound", type=float, metavar="NATS", help="commit tokens up to this summed entropy")
    parser.add_argument("--selection", choices=get_args(Selection), help="which tokens to commit first")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this total mass")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to add to a prompt")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="the daemon's socket")
    where.add_argument("--bundle", metavar="DIR", help="generate in this process with this bundle, ask no daemon")
    return parser


if __name__ == "__main__":
    run_main(main)
