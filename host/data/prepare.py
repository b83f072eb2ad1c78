"""Prepare training data: `python -m host.data` alone downloads TinyStories and makes data/tinystories.

Text is streamed twice, first to draw the tokenizer's sample, then to encode; memory does not grow with the input.
"""

import argparse
import hashlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from tokenizers import Tokenizer

from host.data.shards import DATA_FILE, FORMAT_VERSION, DataMeta, SplitName, SplitWriter, load_data
from host.data.sources import FILE_ENDINGS, Corpus, open_corpus, source_identity
from host.data.tokenizer import (
    MAX_VOCAB_SIZE,
    MIN_VOCAB_SIZE,
    encode_stories,
    head,
    token_byte_lengths,
    train_tokenizer,
)
from host.data.tokenizer_sample import DISTINCT_WORD_BYTES, SAMPLE_BYTES, SpreadSample, with_bearable_words
from host.files import swapped_in
from host.progress import progress
from shared.errors import ConfigError, DataError
from shared.manifest import TOKENIZER, sha256_of
from shared.tokens import CANVAS_LEN

DEFAULT_SOURCE: Final = "roneneldan/TinyStories"
DEFAULT_OUT: Final = Path("data/tinystories")
DEFAULT_VOCAB_SIZE: Final = 8192
HOLD_OUT_EVERY: Final = 100
STORIES_AT_ONCE: Final = 256  # bounds memory: long stories make 4,000 tokens each before they are cut


def labelled_texts(corpus: Corpus) -> Iterator[tuple[SplitName, str]]:
    """Every story with its split; without validation files, every 100th story is held out, the first included."""
    for number, text in enumerate(corpus.train()):
        held_out = corpus.valid is None and number % HOLD_OUT_EVERY == 0
        yield ("valid" if held_out else "train"), text
    if corpus.valid is not None:
        for text in corpus.valid():
            yield "valid", text


def learn_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Train on a sample of the training text: of all of it where it is local, of its beginning where it is not."""
    sample = SpreadSample()
    for split, text in progress(labelled_texts(corpus), desc="reading", unit=" stories", unit_scale=True):
        if split == "train":
            sample.offer(head(text))
        if sample.stride > 1 and not corpus.cheap_to_reread:
            break
    if not sample.texts:
        raise DataError(f"{corpus.name} has too few stories: at least two are needed, one of them to validate on")
    return train_tokenizer(with_bearable_words(sample.texts), vocab_size)


def write_splits(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict[SplitName, SplitWriter]:
    """Encode every story into the shards of its split.  → the writers, to be finished"""
    token_bytes = token_byte_lengths(tokenizer)
    writers: dict[SplitName, SplitWriter] = {
        "train": SplitWriter(folder, "train", token_bytes),
        "valid": SplitWriter(folder, "valid", token_bytes),
    }
    waiting: dict[SplitName, list[str]] = {"train": [], "valid": []}
    for split, text in progress(labelled_texts(corpus), desc="encoding", unit=" stories", unit_scale=True):
        waiting[split].append(head(text))
        if len(waiting[split]) == STORIES_AT_ONCE:
            writers[split].add(encode_stories(tokenizer, waiting[split]))
            waiting[split].clear()
    for split, texts in waiting.items():
        writers[split].add(encode_stories(tokenizer, texts))
    return writers


def input_fingerprint(source: str, vocab_size: int) -> str:
    """Hash of everything that decides what the folder holds: files, options, format."""
    parts = [
        FORMAT_VERSION,
        CANVAS_LEN,
        vocab_size,
        SAMPLE_BYTES,
        DISTINCT_WORD_BYTES,
        HOLD_OUT_EVERY,
        *source_identity(source),
    ]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def is_up_to_date(out: Path, fingerprint: str) -> bool:
    """Whether `out` is whole and was made from the same input with the same options."""
    try:
        return load_data(out).meta.fingerprint == fingerprint
    except DataError:
        return False


def check_replaceable(out: Path) -> None:
    """Raise DataError when `out` is something that host.data did not make, which it must not delete."""
    if out.is_dir() and ((out / DATA_FILE).exists() or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise DataError(f"--out {out} exists and is not a data folder: choose another --out")


def prepare(source: str, out: Path, vocab_size: int = DEFAULT_VOCAB_SIZE) -> DataMeta:
    """Make the data folder `out` from `source`, unless it is there and nothing changed.

    Raises DataError for unusable text or folders, ConfigError for an impossible vocabulary size.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(f"--vocab-size must be {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, not {vocab_size}")
    fingerprint = input_fingerprint(source, vocab_size)
    if is_up_to_date(out, fingerprint):
        print(f"{out} is up to date")
        return load_data(out).meta
    check_replaceable(out)
    corpus = open_corpus(source)
    with swapped_in(out) as folder:
        tokenizer = learn_tokenizer(corpus, vocab_size)
        (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        writers = write_splits(corpus, tokenizer, folder)
        meta = DataMeta(
            format_version=FORMAT_VERSION,
            source=corpus.name,
            licence=corpus.licence,
            vocab_size=tokenizer.get_vocab_size(),
            canvas_len=CANVAS_LEN,
            tokenizer_sha256=sha256_of(folder / TOKENIZER),
            fingerprint=fingerprint,
            train=writers["train"].finish(),
            valid=writers["valid"].finish(),
        )
        (folder / DATA_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(meta)))
    for name, split in (("train", meta.train), ("valid", meta.valid)):
        print(
            f"{name}: {split.stories} stories, {split.tokens} tokens, {split.text_bytes} bytes of text, "
            f"{split.truncated} stories cut at {CANVAS_LEN} positions"
        )
    print(f"{out} is ready, with a vocabulary of {meta.vocab_size}")
    return meta


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m host.data",
        description="Train a tokenizer and write stories as memory-mapped canvases of 256 tokens.",
        epilog="example: python -m host.data --source stories.jsonl.gz --out data/stories --vocab-size 4096",
    )
    parser.add_argument(
        "--source",
        default=DEFAULT_SOURCE,
        help=f"a data set of the Hugging Face hub, or a local file or folder of {', '.join(FILE_ENDINGS)}; JSON lines "
        'and parquet have a field "text"; stories of a .txt file are separated by <|endoftext|> lines or, if it has '
        "none, by blank lines; files named valid* are the validation split, else every 100th story is "
        "(default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="data folder to make (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, help="tokens of the vocabulary (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Prepare data; a run that is told to stop clears up behind itself."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = parse_arguments()
    prepare(args.source, args.out, args.vocab_size)
