"""Stories, streamed from local files or the Hugging Face hub through `datasets`.

Text and JSON lines go through the line reader of `datasets`: its JSON reader guesses types (a story that is a
date comes back as another text) and knows no line numbers. Each of these files is scanned once before, because the
line reader neither bounds the length of a line nor says where bytes are no text.
"""

import glob
import gzip
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shared.errors import DataError

if TYPE_CHECKING:  # takes seconds to import, and an unchanged rerun does without
    import datasets

TEXT_FIELD: Final = "text"
STORY_SEPARATOR: Final = "<|endoftext|>"
FILE_ENDINGS: Final = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
MAX_LINE_BYTES: Final = 4 << 20  # ROWS_AT_ONCE of them must fit into memory, several times
MAX_STORY_CHARS: Final = 1 << 16  # far behind the end of any canvas; bounds the memory of a file without separators
ROWS_AT_ONCE: Final = 64
PARQUET_BUFFER_BYTES: Final = 1 << 20
HUB_TIMEOUT_S: Final = 10
UNKNOWN_LICENCE: Final = "unknown"
LICENCES: Final = {"tinystories": "CDLA-Sharing-1.0"}
"""By the last part of the source's name, in lower case."""

_VALIDATION_NAME = re.compile(r"(^|[^a-z])(valid|validation|val)([^a-z]|$)")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Corpus:
    """Stories of one source. `valid` is None when the source has no validation split.

    cheap_to_reread: a second pass over `train` costs no download.
    """

    name: str
    licence: str
    cheap_to_reread: bool
    train: Callable[[], Iterator[str]]
    valid: Callable[[], Iterator[str]] | None


class _Record(msgspec.Struct):
    text: str


def source_identity(source: str) -> tuple[str, ...]:
    """What changes when the source does: names, sizes and times of local files, else the hub's name, unasked.

    Raises DataError when `source` can be neither, or is a folder without stories.
    """
    if not _is_local(source):
        return (source,)
    files = text_files(Path(source))
    return tuple(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)


def open_corpus(source: str) -> Corpus:
    """Open an existing file or folder, else a data set of the hub ("owner/name").

    Raises DataError when it is neither, cannot be reached, or has no split to train on.
    """
    return _local_corpus(Path(source)) if _is_local(source) else _hub_corpus(source)


def read_texts(source: Path) -> Iterator[str]:
    """Every story of a local file or folder, stripped of outer blanks, empty ones left out.

    A .txt file's stories are separated by lines that say <|endoftext|>, or, when it has none, by blank lines. Very long
    stories are cut far behind the end of any canvas.

    Raises DataError, which names the file and the line or record, for whatever is no story.
    """
    return _texts_of(text_files(source))


def text_files(source: Path) -> tuple[Path, ...]:
    """The files of a folder that can be read, or the file itself, sorted by name.

    Raises DataError when there are none.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist: give a file or folder of {', '.join(FILE_ENDINGS)}")
    if not source.is_dir():
        if not source.name.lower().endswith(FILE_ENDINGS):
            raise DataError(f"{source} has an unknown ending: stories are read from {', '.join(FILE_ENDINGS)}")
        return (source,)
    try:
        files = tuple(sorted(p for p in source.iterdir() if p.name.lower().endswith(FILE_ENDINGS) and p.is_file()))
    except OSError as error:
        raise DataError(f"the folder {source} cannot be read: {error.strerror}") from None
    if not files:
        raise DataError(f"the folder {source} has no files ending in {', '.join(FILE_ENDINGS)}")
    return files


def _is_local(source: str) -> bool:
    if Path(source).exists():
        return True
    if not _HUB_NAME.fullmatch(source) or source.lower().endswith(FILE_ENDINGS):
        raise DataError(f"--source {source} does not exist: give a file, a folder, or a hub data set OWNER/NAME")
    return False


def _local_corpus(source: Path) -> Corpus:
    files = text_files(source)
    valid = tuple(f for f in files if source.is_dir() and _VALIDATION_NAME.search(f.name.lower()))
    train = tuple(f for f in files if f not in valid)
    if not train:
        raise DataError(f"the folder {source} has validation files only: add files to train on")
    name = source.resolve().name  # the last part alone: bundles carry it to other machines
    return Corpus(
        name=name,
        licence=LICENCES.get(name.lower().split(".")[0], UNKNOWN_LICENCE),
        cheap_to_reread=True,
        train=lambda: _texts_of(train),
        valid=(lambda: _texts_of(valid)) if valid else None,
    )


def _texts_of(files: tuple[Path, ...]) -> Iterator[str]:
    found = False
    for path in files:
        for text in _file_texts(path):
            stripped = text.strip()
            if stripped:
                found = True
                yield stripped[:MAX_STORY_CHARS]
    if not found:
        raise DataError(f"{', '.join(str(f) for f in files)}: no stories, only blanks")


def _file_texts(path: Path) -> Iterator[str]:
    name = path.name.lower()
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if name.endswith(".parquet"):
        return _parquet_texts(path)
    has_separators = _scan(path)
    lines = _lines(path)
    return _paragraphs(lines, has_separators) if name.endswith(".txt") else _json_texts(path, lines)


def _scan(path: Path) -> bool:
    """Check that a file is UTF-8 text in lines of bearable length.  → whether it has story separators"""
    has_separators = False
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: is this text?")
                if b"\0" in line:
                    raise DataError(f"{path}, line {number} holds a zero byte: this is binary content, not text")
                line.decode()
                has_separators = has_separators or line.strip() == STORY_SEPARATOR.encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}, byte {error.start + 1} is not UTF-8 text") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: the gzip data is damaged or cut off ({error})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return has_separators


def _lines(path: Path) -> Iterator[str]:
    """The lines of a scanned file, through `datasets`, without their ends."""
    try:
        # Streaming caches nothing, but opening leaves a lock file, which is kept out of the user's home.
        with tempfile.TemporaryDirectory(prefix="diffusion-llm-") as cache:
            data_files = glob.escape(str(path.resolve()))
            rows = _load_dataset("text", data_files=data_files, split="train", cache_dir=cache)
        first = True
        for table in rows.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            for line in table.column(TEXT_FIELD).to_pylist():
                yield line.removeprefix("\ufeff") if first else line
                first = False
    except Exception as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from None


def _paragraphs(lines: Iterator[str], has_separators: bool) -> Iterator[str]:
    """Stories of a text file; where separators say where stories end, blank lines are part of them."""
    story: list[str] = []
    size = 0  # characters
    for line in lines:
        if line.strip() == (STORY_SEPARATOR if has_separators else ""):
            yield "\n".join(story)
            story, size = [], 0
        elif size < MAX_STORY_CHARS and (story or line.strip()):
            story.append(line[:MAX_STORY_CHARS])
            size += len(line) + 1
    yield "\n".join(story)


def _json_texts(path: Path, lines: Iterator[str]) -> Iterator[str]:
    decoder = msgspec.json.Decoder(_Record)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield decoder.decode(line).text
        except msgspec.ValidationError as error:
            raise DataError(f'{path}, line {number} is not {{"text": "..."}}: {error}') from None
        except (msgspec.DecodeError, UnicodeError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}") from None


def _parquet_texts(path: Path) -> Iterator[str]:
    """Not through `datasets`, whose reader decodes whole row groups: 1.1 GB of memory for a file of 200 MB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES) as file:
            if TEXT_FIELD not in file.schema_arrow.names:
                raise DataError(f"{path} has no column named text, only {', '.join(file.schema_arrow.names)}")
            kind = file.schema_arrow.field(TEXT_FIELD).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: the column text holds {kind}, not strings")
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[TEXT_FIELD]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is None:
                        raise DataError(f"{path}, record {number}: text is null")
                    yield text
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read as parquet: {_first_line(error)}") from None


def _load_dataset(*args: Any, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # every error ends in one sentence of ours
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # reading a local file is no news for the hub
    return datasets.load_dataset(*args, streaming=True, **options)


def _hub_corpus(name: str) -> Corpus:
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        splits = _load_dataset(name, revision=info.sha)
    except Exception as error:
        raise DataError(
            f"{name} cannot be had from the Hugging Face hub ({_first_line(error)}): "
            "local stories need no network, give them with --source FILE_OR_FOLDER"
        ) from None
    if "train" not in splits or TEXT_FIELD not in (splits["train"].column_names or [TEXT_FIELD]):
        raise DataError(f"{name} has no split train with a column text; it has the splits {', '.join(splits)}")
    card_licence = info.card_data.get("license") if info.card_data else None
    return Corpus(
        name=name,
        licence=LICENCES.get(name.split("/")[-1].lower(), str(card_licence or UNKNOWN_LICENCE)),
        cheap_to_reread=False,
        train=lambda: _hub_texts(name, splits["train"]),
        valid=(lambda: _hub_texts(name, splits["validation"])) if "validation" in splits else None,
    )


def _hub_texts(name: str, rows: "datasets.IterableDataset") -> Iterator[str]:
    try:
        for number, row in enumerate(rows, start=1):
            text = row[TEXT_FIELD]
            if not isinstance(text, str):
                raise DataError(f"{name}, record {number}: text is not a string")
            if text := text.strip():
                yield text[:MAX_STORY_CHARS]
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name}: the download broke off ({_first_line(error)}); try again") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
