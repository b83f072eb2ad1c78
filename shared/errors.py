"""The errors a user can meet.

DiffusionLLMError           one sentence naming the field, file or value; printed as it is, exit status `exit_code`
├── ConfigError             configuration file, environment or command line
├── DataError               training or evaluation text
├── BundleError             manifest, hashes, versions, shapes
├── DeviceError             GPU, driver, TensorRT or engine: absent, unfit, or failed
└── RequestError            a refused or failed request; carries the typed `code` of the reply
"""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Final

MAX_SENTENCE: Final = 1000
"""Characters of an error at most: it may quote a value as long as a whole message."""

OUTPUT_ERRNOS: Final = frozenset({errno.EPIPE, errno.ENOSPC, errno.EDQUOT})
"""The reader of the output left, or the disk is full: not an error of the program, so no traceback."""


def one_line(text: str) -> str:
    """`text` as one line of limited length, with control characters escaped."""
    text = text if len(text) <= MAX_SENTENCE else f"{text[:MAX_SENTENCE]}…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class DiffusionLLMError(Exception):
    """Base of all errors whose message is for the user."""

    exit_code = 1


class ConfigError(DiffusionLLMError):
    """A setting that cannot be used; systemd must not restart on it (RestartPreventExitStatus=78)."""

    exit_code = 78


class DataError(DiffusionLLMError):
    """Text that cannot be read, or an unsuitable data folder."""

    exit_code = 65


class BundleError(DiffusionLLMError):
    """A bundle that is missing, damaged, or made for another version."""

    exit_code = 66

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class DeviceError(DiffusionLLMError):
    """The GPU, its driver, TensorRT or an engine is absent, unsuitable, or has failed."""

    exit_code = 69


ERROR_CODES: Final[dict[str, tuple[int, bool]]] = {
    "bad_request": (400, False),
    "unauthorized": (401, False),
    "bad_reply_topic": (403, False),
    "forbidden": (403, False),
    "not_found": (404, False),
    "method_not_allowed": (405, False),
    "too_slow": (408, True),
    "conflict": (409, False),
    "too_large": (413, False),
    "unsupported_media": (415, False),
    "queue_full": (429, True),
    "headers_too_large": (431, False),
    "cancelled": (499, False),
    "internal": (500, False),
    "broker_lost": (502, True),
    "draining": (503, True),
    "timeout": (504, False),
    "storage_full": (507, True),
}
"""Reply code → (HTTP status, whether the same request may succeed when sent again under its id).

Not retryable is what ends an accepted request: its id keeps that answer. Another attempt takes another id.
"""


class RequestError(DiffusionLLMError):
    """A request that ends in an error reply.

    code: a key of ERROR_CODES. retry_after_ms: when trying again may help.
    """

    def __init__(self, code: str, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(one_line(message))
        self.code = code
        self.retryable = ERROR_CODES[code][1]
        self.retry_after_ms = retry_after_ms


def command_name(module: str) -> str:
    """How this command was called, for its help: `edgelm build`, or `python -m edge.build`."""
    return sys.argv[0] if sys.argv[0].startswith("edgelm ") else f"python -m {module}"


def run_main(main: Callable[[], int | None], *, debug: bool = False) -> None:
    """Run a command line's `main`: errors of this project become one line on stderr and an exit code, Ctrl-C 130.

    debug: show tracebacks instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # "?" for characters that the terminal lacks
            stream.reconfigure(errors="replace")
    try:
        status = main()
        sys.stdout.flush()  # raises here if the reader left, not in the interpreter's last flush
        sys.exit(status)
    except DiffusionLLMError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in OUTPUT_ERRNOS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # buffered output goes there
        if isinstance(error, BrokenPipeError):  # the reader of our output left, as `head` does
            sys.exit(0)
        print(f"error: {error.filename or 'the output'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(os.EX_IOERR)
    except KeyboardInterrupt:
        sys.exit(130)
