"""`python -m edge.generate`: ask the daemon for text, or generate in this process when none listens."""

import argparse
import base64
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from edge.client import ask, connect
from edge.config import Config, default_socket, load_config, socket_candidates
from edge.terminal_view import View, laid_out
from shared.errors import ERROR_CODES, ConfigError, DiffusionLLMError, RequestError, command_name, run_main
from shared.manifest import Decoder, SamplingDefaults, Selection
from shared.messages import MAX_MESSAGE_BYTES, GenerateRequest, Partial, Reply, Response, decode_request, encode

MAX_IMAGE_BYTES: Final = MAX_MESSAGE_BYTES * 3 // 4 - 1024
"""In base64, with room for the rest of a request."""
GAP: Final = re.compile(r"___(?::(\d+))?")

EPILOG = """examples:
  python -m edge.generate "Once upon a time" --stream
  python -m edge.generate --infill "Tom had a ___ and it was ___:6." --seed 7
  python -m edge.generate "Lily found a" --decode canvas --steps 32 --json
  python -m edge.generate --word dragon --word cake --seed 7
  python -m edge.generate "Once upon a time" --image card.png --guidance 1"""


def parse_infill(text: str) -> list[Any]:
    """`Tom had a ___ and it was ___:6.` as a request's segments; ___:6 is a gap of 6 tokens. Raises RequestError."""
    segments: list[Any] = []
    end = 0
    for gap in GAP.finditer(text):
        segments += [text[end : gap.start()], {"gap": int(gap[1]) if gap[1] else None}]
        end = gap.end()
    if not segments:
        raise RequestError("bad_request", "--infill has no gap: write ___ where text is missing, ___:6 for 6 tokens")
    return [segment for segment in [*segments, text[end:]] if segment != ""]


def read_image(file: Path) -> bytes:
    """A picture's file, which the daemon decodes. Raises RequestError when it cannot be read, or fits no message."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_IMAGE_BYTES + 1)
            size = max(os.fstat(opened.fileno()).st_size, len(content))  # a pipe has no size
    except OSError as error:
        raise RequestError("bad_request", f"--image {file} cannot be read: {error.strerror}") from None
    if len(content) > MAX_IMAGE_BYTES:
        limit = f"a picture within a message may have {MAX_IMAGE_BYTES}"
        raise RequestError("too_large", f"--image {file} has {size} bytes; {limit}: make it smaller")
    return content


def build_request(args: argparse.Namespace) -> GenerateRequest:
    """The request that the flags describe, checked as the daemon would. Raises RequestError."""
    names = GenerateRequest.__struct_fields__
    fields = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers, and would say null
            raise RequestError("bad_request", f"`{name}` must be a number, not {value}")
    if args.infill is not None:
        fields["segments"] = parse_infill(args.infill)
    if args.images is not None:
        fields["images"] = [base64.b64encode(read_image(file)).decode() for file in args.images]
    try:
        return decode_request(msgspec.json.encode(fields))
    except UnicodeEncodeError:
        raise RequestError("bad_request", "the text is not UTF-8: check the terminal's locale") from None


def find_daemon(config: Config, named: bool = False) -> socket.socket | None:
    """A connection to the configured socket, or to the first default one that answers; None when none does.

    named: the user named this socket, default or not. Raises ConfigError when none listens at a named one.
    """
    if named or config.socket != default_socket():
        if (connection := connect(config.socket)) is None:
            raise ConfigError(f"no daemon listens at {config.socket}; --bundle DIR generates without one")
        return connection
    for path in socket_candidates():
        with suppress(OSError, ConfigError):  # no daemon is expected there
            # In a folder open to all, anyone could pose as the daemon and read the prompts.
            if path.lstat().st_uid in (0, os.getuid()) and (connection := connect(path)) is not None:
                return connection
    return None


def ask_daemon(connection: socket.socket, request: GenerateRequest, show: Callable[[Partial], None]) -> Response:
    """The daemon's answer; `show` gets the snapshots before it. Raises RequestError when the daemon leaves."""
    with closing(ask(connection, request)) as replies:  # else a signal at its end would be swallowed
        for reply in replies:
            if isinstance(reply, Response):
                return reply
            show(reply)
    raise AssertionError("ask ends with a response")


def generate_here(config: Config, request: GenerateRequest, show: Callable[[Partial], None]) -> Response:
    """The same answer from this very process. Raises BundleError or ConfigError."""
    from edge.serving.loaded_bundle import LoadedBundle  # not at the top: a client of the daemon needs no runtime
    from edge.serving.scheduler import Scheduler

    responses: list[Response] = []

    def receive(reply: Reply) -> None:
        if isinstance(reply, Response):
            responses.append(reply)
        elif isinstance(reply, Partial):
            show(reply)

    loaded = LoadedBundle.load(config.bundle, config.backend, config.threads)
    scheduler = Scheduler(loaded, queue_size=1)
    scheduler.submit(request, receive)
    scheduler.refuse_new()
    scheduler.run()
    loaded.close()
    return responses[0]


def unwrap(response: Response, images: Sequence[Path] = ()) -> str:
    """The text of an answer; raises the error it carries instead, which names a picture by its file."""
    if response.error is not None:
        code, message = response.error.code, response.error.message
        for i, file in enumerate(images):
            message = message.replace(f"`images[{i}]`", f"--image {file}")
        if code not in ERROR_CODES:
            raise DiffusionLLMError(message)
        raise RequestError(code, message, response.error.retry_after_ms)
    return response.text or ""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, get the text, print it."""
    parser = command_line()
    args = parser.parse_args(argv)
    if args.prompt is None and args.infill is None and (args.words or args.images):
        args.prompt = ""
    if (args.prompt is None) == (args.infill is None):
        parser.error("give either a prompt or --infill TEXT; with --word or --image the prompt may be left out")
    request = build_request(args)
    flags = {key: value for key in ("bundle", "socket") if (value := getattr(args, key)) is not None}
    config = load_config(flags=flags)
    connection = find_daemon(config, named=args.socket is not None) if args.bundle is None else None
    with View(sys.stderr) as view:
        if connection is not None:
            with connection:
                response = ask_daemon(connection, request, view.show)
        else:
            absent = "no daemon listens; " if args.bundle is None else ""
            print(f"{absent}generating in this process with {config.bundle}", file=sys.stderr)
            response = generate_here(config, request, view.show)
    if args.json:
        print(encode(response).decode())
        return 0 if response.error is None else RequestError.exit_code
    print(laid_out(unwrap(response, args.images or ()), sys.stdout))
    return 0


def command_line() -> argparse.ArgumentParser:
    """The flags."""
    usual = SamplingDefaults()
    parser = argparse.ArgumentParser(
        prog=command_name("edge.generate"),
        description="Ask the daemon for text, or generate in this process when none listens.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", help="how the text begins; not needed with --word or --image")
    parser.add_argument("--infill", metavar="TEXT", help="text with gaps: ___, or ___:6 for 6 tokens, at most (blocks)")
    parser.add_argument("--stream", action="store_true", default=None, help="watch the text appear (on stderr)")
    parser.add_argument("--json", action="store_true", help="print the whole response")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--socket", metavar="PATH", help="the daemon's socket (default: the first that answers of the usual ones)"
    )
    where.add_argument(
        "--bundle", metavar="DIR", help="generate in this process with this bundle (default: the daemon's)"
    )
    sampling = parser.add_argument_group(
        "sampling", "Defaults are those of the bundle's manifest; in brackets, those of most bundles."
    )
    add = sampling.add_argument
    add("--seed", type=int, help="repeats a text exactly, on the same kind of processor (random)")
    add("--temperature", type=float, metavar="T", help=f"0 always takes the likeliest token ({usual.temperature})")
    add("--top-p", type=float, metavar="P", help=f"sample from the likeliest tokens of this mass ({usual.top_p:g})")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (as many as the bundle has)")
    add("--max-tokens", type=int, metavar="N", help="most tokens to add to a prompt (as many as fit)")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given four times (never)")
    blocks = parser.add_argument_group("blocks", "From left to right; the default where the bundle has it.")
    blocks.add_argument("--window", type=int, metavar="N", help="most drafts in a pass: the speed, never the text")
    add = blocks.add_argument
    add("--word", action="append", dest="words", metavar="WORD", help="what the text is to tell of; may be repeated")
    add("--image", action="append", dest="images", type=Path, metavar="FILE", help="the same, by a PNG or JPEG")
    add("--guidance", type=float, metavar="W", help="strength of words and pictures, 0 to 5 (the bundle's)")
    canvas = parser.add_argument_group("canvas", "Anywhere at once; chosen by any of these flags.")
    add = canvas.add_argument
    add("--decode", choices=get_args(Decoder), help="choose one of the two by name (the bundle's first)")
    add("--steps", type=int, metavar="N", help=f"denoising steps; at most so many with a bound below ({usual.steps})")
    add("--selection", choices=get_args(Selection), help=f"which tokens to commit first ({usual.selection})")
    add("--threshold", type=float, metavar="P", help="instead: commit every token at least this probable (off)")
    add("--entropy-bound", type=float, metavar="NATS", help="instead: commit tokens up to this summed entropy (off)")
    return parser


if __name__ == "__main__":
    run_main(main)
