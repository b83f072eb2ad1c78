"""Prepare training data: `python -m host.data` alone downloads TinyStories and makes data/tinystories.

Text is streamed twice, to sample text for the tokenizer and to encode it; memory does not grow with the input.
"""

import argparse
import hashlib
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from tokenizers import Tokenizer

from host.data.picture_sources import HUB, shown_in
from host.data.pictures import prepare_pictures
from host.data.shards import DATA_FILE, FORMAT_VERSION, SPLITS, DataMeta, SplitMeta, SplitName, SplitWriter, load_data
from host.data.sources import FILE_ENDINGS, Corpus, corpus_name, open_corpus, source_identity
from host.data.tokenizer import (
    MAX_VOCAB_SIZE,
    MIN_VOCAB_SIZE,
    encode_stories,
    head,
    identity_of,
    load_tokenizer,
    plain_tokenizer,
    token_byte_lengths,
    train_tokenizer,
)
from host.data.tokenizer_sample import DISTINCT_WORD_BYTES, SAMPLE_BYTES, SpreadSample, with_few_words
from host.files import swapped_in
from host.progress import progress
from shared.errors import ConfigError, DataError
from shared.manifest import TOKENIZER, sha256_of
from shared.tokens import CANVAS_LEN

DEFAULT_SOURCE: Final = "roneneldan/TinyStories"
DEFAULT_OUT: Final = Path("data/tinystories")
DEFAULT_VOCAB_SIZE: Final = 8192
HOLD_OUT_OF: Final = 50
STORIES_AT_ONCE: Final = 256  # bounds memory: a long story has 4,000 tokens before it is cut


def labelled_texts(corpus: Corpus) -> Iterator[tuple[SplitName, str]]:
    """Every story with its split: the corpus's own, else one text in HOLD_OUT_OF is held out for valid and for test.

    The hash of the text decides, so that copies of a story fall into the same split.
    """
    for text in corpus.train():
        bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % HOLD_OUT_OF
        if bucket == 0 and corpus.valid is None:
            yield "valid", text
        elif bucket == 1 and corpus.test is None:
            yield "test", text
        else:
            yield "train", text
    if corpus.valid is not None:
        yield from (("valid", text) for text in corpus.valid())
    if corpus.test is not None:
        yield from (("test", text) for text in corpus.test())


def learn_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Train a tokenizer on a sample of the training text: of all local text, or of the beginning of a download."""
    sample = SpreadSample()
    for split, text in progress(labelled_texts(corpus), desc="reading", unit=" stories", unit_scale=True):
        if split == "train":
            sample.offer(head(text))
        if sample.stride > 1 and not corpus.cheap_to_reread:
            break
    if not sample.texts:
        raise DataError(f"{corpus.name} has too few stories: none is left to train on")
    return train_tokenizer(with_few_words(sample.texts), vocab_size)


def write_splits(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict[SplitName, SplitMeta]:
    """Encode every story into the shards of its split; DataError when a split gets none."""
    token_bytes = token_byte_lengths(tokenizer)
    writers = {split: SplitWriter(folder, split, token_bytes) for split in SPLITS}
    waiting: dict[SplitName, list[str]] = {split: [] for split in SPLITS}
    for split, text in progress(labelled_texts(corpus), desc="encoding", unit=" stories", unit_scale=True):
        waiting[split].append(head(text))
        if len(waiting[split]) == STORIES_AT_ONCE:
            writers[split].add(encode_stories(tokenizer, waiting[split]))
            waiting[split].clear()
    for split, texts in waiting.items():
        writers[split].add(encode_stories(tokenizer, texts))
    metas = {split: writer.finish() for split, writer in writers.items()}
    for split, meta in metas.items():
        if not meta.stories:
            raise DataError(
                f"{corpus.name} has too few stories: none fell to {split}, which takes one text in "
                f"{HOLD_OUT_OF}; add some, or give files named valid* and test*"
            )
    return metas


def given_tokenizer(folder: Path) -> Path:
    """The tokenizer of a run or data folder; DataError when it has none."""
    file = folder / TOKENIZER
    if not file.is_file():
        raise DataError(f"--tokenizer {folder} has no {TOKENIZER}: give the folder of a run or of prepared data")
    load_tokenizer(file)
    return file


def input_fingerprint(sources: Sequence[str], vocabulary: int | str) -> str:
    """Hash of all that determines the folder's content: files, options, format.

    vocabulary: its size, or the hash of the tokenizer that is reused.
    """
    parts = [
        FORMAT_VERSION,
        CANVAS_LEN,
        vocabulary,
        SAMPLE_BYTES,
        DISTINCT_WORD_BYTES,
        HOLD_OUT_OF,
        *source_identity(sources),
    ]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def is_up_to_date(out: Path, fingerprint: str) -> bool:
    """Whether `out` is whole and was made from the same input with the same options.

    Raises DataError when preparing would delete something else: data of other text, or a folder of other content.
    """
    try:
        meta = load_data(out).meta
    except DataError:  # missing, damaged, or of another version
        ours = (out.is_dir() and not any(out.iterdir())) or (out / DATA_FILE).exists()
        if (out.is_symlink() or out.exists()) and not ours:
            raise DataError(f"--out {out} exists and is not a data folder: choose another --out") from None
        return False
    if meta.fingerprint != fingerprint:
        raise DataError(
            f"{out} holds data prepared from {meta.source} with other text or settings: "
            "choose another --out, or remove it first"
        )
    return True


def default_out(sources: Sequence[str]) -> Path:
    """data/NAME, after the sources."""
    name = corpus_name(sources).split("/")[-1].lower()
    for ending in FILE_ENDINGS:
        name = name.removesuffix(ending)
    return Path("data") / re.sub(r"[^\w.-]+", "-", name)


def prepare(
    sources: Sequence[str], out: Path, vocab_size: int = DEFAULT_VOCAB_SIZE, tokenizer_of: Path | None = None
) -> DataMeta:
    """Make the data folder `out`, unless it is there and nothing changed; data of other text are never replaced.

    sources: local files and folders, or one data set of the Hub. tokenizer_of: a run or data folder whose tokenizer is
    reused; vocab_size then does not matter. Raises DataError for unusable text or folders, ConfigError for an
    impossible vocabulary size, DiffusionLLMError when the disk refuses.
    """
    reused = None if tokenizer_of is None else given_tokenizer(tokenizer_of)
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(f"--vocab-size must be {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, not {vocab_size}")
    fingerprint = input_fingerprint(sources, vocab_size if reused is None else identity_of(reused))
    if is_up_to_date(out, fingerprint):
        print(f"{out} is up to date")
        return load_data(out).meta
    corpus = open_corpus(sources)
    with swapped_in(out) as folder:
        if reused is None:
            learned = learn_tokenizer(corpus, vocab_size)
            (folder / TOKENIZER).write_text(learned.to_str(pretty=True), encoding="utf-8")
        else:
            (folder / TOKENIZER).write_bytes(plain_tokenizer(reused))
        tokenizer = load_tokenizer(folder / TOKENIZER)
        meta = DataMeta(
            format_version=FORMAT_VERSION,
            source=corpus.name,
            licence=corpus.licence,
            vocab_size=tokenizer.get_vocab_size(),
            canvas_len=CANVAS_LEN,
            tokenizer_sha256=sha256_of(folder / TOKENIZER),
            fingerprint=fingerprint,
            **write_splits(corpus, tokenizer, folder),
        )
        (folder / DATA_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(meta)))
    for split in SPLITS:
        of_split: SplitMeta = getattr(meta, split)
        print(
            f"{split}: {of_split.stories} stories, {of_split.tokens} tokens, {of_split.text_bytes} bytes of text, "
            f"{of_split.truncated} stories cut at {CANVAS_LEN} positions"
        )
    print(f"{out} is ready, with a vocabulary of {meta.vocab_size}; train with python -m host.train --data {out}")
    return meta


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m host.data",
        description="Train a tokenizer and write stories as memory-mapped canvases of 256 tokens.",
        epilog="example: python -m host.data --source train.jsonl.gz valid.jsonl.gz test.jsonl.gz --out data/stories",
    )
    parser.add_argument(
        "--source",
        nargs="+",
        action="extend",
        help=f"local files and folders of {', '.join(FILE_ENDINGS)}, or one data set OWNER/NAME of the Hugging Face "
        'Hub; JSON lines and parquet have a field "text"; stories of a .txt file are separated by <|endoftext|> lines '
        "or, if it has none, by blank lines; of several files those named valid* and test* are these splits, else one "
        f"text in {HOLD_OUT_OF} goes to each (default: {DEFAULT_SOURCE})",
    )
    parser.add_argument("--out", type=Path, help="data folder to make (default: data/NAME, after the source)")
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="prepare pictures instead, for host.train --stage conditions: a folder with a .jsonl of pictures and words"
        " or captions, and zip files of drawing styles if there are any; --source hub:NAME does so with an image-"
        "caption set of the Hub",
    )
    parser.add_argument(
        "--held-out-style",
        nargs="+",
        default=[],
        metavar="STYLE",
        help="with --pictures: drawing styles kept for evaluation (default: none)",
    )
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, help="tokens of the vocabulary (default: %(default)s)"
    )
    tokenizer.add_argument(
        "--tokenizer",
        type=Path,
        metavar="RUN_OR_DATA",
        help="reuse the tokenizer of this run or data folder, so that a run can go on with other text "
        "(default: train one)",
    )
    return parser.parse_args()


def main() -> None:
    """Prepare data; a run that is stopped by SIGTERM removes its partial output."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = parse_arguments()
    sources = args.source or [DEFAULT_SOURCE]
    of_hub = [source for source in args.source or () if source.startswith(HUB)]
    if args.pictures is not None and args.source:
        raise ConfigError("--pictures is a source by itself: it cannot be combined with --source")
    if of_hub and len(sources) > 1:
        raise ConfigError(f"--source {of_hub[0]} is prepared alone")
    if args.pictures is not None or of_hub:
        source = of_hub[0] if of_hub else str(args.pictures)
        name = source.removeprefix(HUB) if of_hub else args.pictures.resolve().name
        out = args.out or default_out([f"pictures-{name.replace('/', '-')}"])
        prepare_pictures(shown_in(source), out, source=name, held_out=args.held_out_style)
        return
    if args.held_out_style:
        raise ConfigError("--held-out-style is about pictures: it needs --pictures, or --source hub:NAME")
    prepare(sources, args.out or default_out(sources), args.vocab_size, args.tokenizer)
