"""Stories, streamed from local files, or from the Hugging Face Hub through `datasets`."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from shared.errors import DataError

if TYPE_CHECKING:  # takes seconds to import
    import datasets

TEXT_FIELD: Final = "text"
STORY_SEPARATOR: Final = "<|endoftext|>"
FILE_ENDINGS: Final = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
MAX_LINE_BYTES: Final = 4 << 20
MAX_STORY_CHARS: Final = 1 << 16  # bounds the memory that a file without separators takes
ROWS_AT_ONCE: Final = 64
PARQUET_BUFFER_BYTES: Final = 1 << 20
HUB_TIMEOUT_S: Final = 10
UNKNOWN_LICENCE: Final = "unknown"
LICENCES: Final = {"tinystories": "CDLA-Sharing-1.0"}
"""By the last part of the source's name, in lower case."""

_VALID_NAME = re.compile(r"(^|[^a-z])(valid|validation|val)([^a-z]|$)")
_TEST_NAME = re.compile(r"(^|[^a-z])test([^a-z]|$)")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")

Texts = Callable[[], Iterator[str]]
_Line = TypeVar("_Line")


@dataclass(frozen=True)
class Corpus:
    """Stories of one or several sources. valid, test: None where these have no such split.

    cheap_to_reread: a second pass over `train` costs no download.
    """

    name: str
    licence: str
    cheap_to_reread: bool
    train: Texts
    valid: Texts | None
    test: Texts | None


class _Record(msgspec.Struct):
    text: str


def corpus_name(sources: Sequence[str]) -> str:
    """Name of the prepared data: the one source, the common folder of several, or all their names.

    Of local paths only the last part, since bundles carry the name to other machines.
    """
    if len(sources) == 1 and not _is_local(sources[0]):
        return sources[0]
    paths = [Path(source).resolve() for source in sources]
    if len(paths) > 1 and len({path.parent for path in paths}) == 1:
        paths = [paths[0].parent]
    return " + ".join(path.name for path in paths)


def source_identity(sources: Sequence[str]) -> tuple[str, ...]:
    """Changes when the sources do: names, sizes and times of local files; of a Hub data set its name alone.

    Raises DataError when one can be neither, or is a folder without stories.
    """
    if len(sources) == 1 and not _is_local(sources[0]):
        return tuple(sources)
    stats = [(file.name, file.stat()) for file in _local_files(sources)]
    return tuple(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def open_corpus(sources: Sequence[str]) -> Corpus:
    """Open local files and folders, or one data set of the Hub ("owner/name").

    Raises DataError when a source is neither, cannot be reached, or there is nothing to train on.
    """
    if len(sources) == 1 and not _is_local(sources[0]):
        return _hub_corpus(sources[0])
    return _local_corpus(sources)


def read_texts(source: Path) -> Iterator[str]:
    """Every story of a local file or folder, stripped of outer blanks, empty ones left out.

    A .txt file's stories are separated by lines of <|endoftext|> or, if it has none, by blank lines. Stories are cut at
    MAX_STORY_CHARS, far beyond the end of any canvas.

    Raises DataError naming the file and the line or record that is not a story.
    """
    return _texts_of(text_files(source))


def text_files(source: Path) -> tuple[Path, ...]:
    """The files of a folder with a known ending, sorted by name, or the file itself.

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
        raise DataError(f"--source {source} does not exist: give a file, a folder, or a Hub data set OWNER/NAME")
    return False


def _local_files(sources: Sequence[str]) -> list[Path]:
    for source in sources:
        if not _is_local(source):
            raise DataError(f"--source {source} is not a local file or folder: a Hub data set is prepared alone")
    files = [file for source in sources for file in text_files(Path(source))]
    for file in files:
        if files.count(file) > 1:
            raise DataError(f"--source names {file} twice")
    return files


def _local_corpus(sources: Sequence[str]) -> Corpus:
    files = _local_files(sources)
    named = {"valid": _VALID_NAME, "test": _TEST_NAME} if len(sources) > 1 or files != [Path(sources[0])] else {}
    held_out = {split: [f for f in files if name.search(f.name.lower())] for split, name in named.items()}
    train = [f for f in files if all(f not in of_split for of_split in held_out.values())]
    if not train:
        raise DataError(f"{', '.join(sources)}: validation and test files only: add files to train on")
    name = corpus_name(sources)
    return Corpus(
        name=name,
        licence=LICENCES.get(name.lower().split(".")[0], UNKNOWN_LICENCE),
        cheap_to_reread=True,
        train=lambda: _texts_of(train),
        valid=(lambda: _texts_of(held_out["valid"])) if held_out.get("valid") else None,
        test=(lambda: _texts_of(held_out["test"])) if held_out.get("test") else None,
    )


def _texts_of(files: Sequence[Path]) -> Iterator[str]:
    stories = (text.strip() for path in files for text in _file_texts(path))
    empty = True
    for story in filter(None, stories):
        empty = False
        yield story[:MAX_STORY_CHARS]
    if empty:
        raise DataError(f"{', '.join(str(f) for f in files)}: no stories, only blanks")


def _file_texts(path: Path) -> Iterator[str]:
    name = path.name.lower()
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if name.endswith(".parquet"):
        return _parquet_texts(path)
    return _paragraphs(path) if name.endswith(".txt") else _json_texts(path)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without line ends; DataError for other content and overlong lines."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: is this text?")
                if b"\0" in line:
                    raise DataError(f"{path}, line {number} holds a zero byte: this is binary content, not text")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}, byte {error.start + 1} is not UTF-8 text") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: the gzip data is damaged or cut off ({error})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _paragraphs(path: Path) -> Iterator[str]:
    """Stories of a text file; with separators, blank lines belong to the stories."""
    has_separators = any(line.strip() == STORY_SEPARATOR for line in _lines(path))
    story: list[str] = []
    size = 0  # characters
    for line in _lines(path):
        if line.strip() == (STORY_SEPARATOR if has_separators else ""):
            yield "\n".join(story)
            story, size = [], 0
        elif size < MAX_STORY_CHARS and (story or line.strip()):
            story.append(line[:MAX_STORY_CHARS])
            size += len(line) + 1
    yield "\n".join(story)


def _json_texts(path: Path) -> Iterator[str]:
    return (record.text for _, record in json_lines(path, _Record, '{"text": "..."}'))


def json_lines(path: Path, kind: type[_Line], looks_like: str) -> Iterator[tuple[int, _Line]]:
    """Each line of a file with its number, blank ones left out; DataError names the line that is not of that kind."""
    decoder = msgspec.json.Decoder(kind)
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield number, decoder.decode(line)
        except msgspec.ValidationError as error:
            raise DataError(f"{path}, line {number} is not {looks_like}: {error}") from None
        except (msgspec.DecodeError, UnicodeError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}") from None


def _parquet_texts(path: Path) -> Iterator[str]:
    """In batches: `datasets` decodes whole row groups, 1.1 GB of memory for a file of 200 MB."""
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


def _hub_corpus(name: str) -> Corpus:
    import datasets
    from huggingface_hub import HfApi

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # every error ends in one sentence of ours
    try:
        info = HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        splits = datasets.load_dataset(name, revision=info.sha, streaming=True)
    except Exception as error:
        raise DataError(
            f"{name} could not be downloaded from the Hugging Face Hub ({_first_line(error)}): "
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
        test=(lambda: _hub_texts(name, splits["test"])) if "test" in splits else None,
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
