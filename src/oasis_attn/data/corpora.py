"""Corpora by name: a table of their splits and how to read them.

Splits never overlap.  A corpus that comes with splits keeps them.  Any other is split by a hash of
each document's content, so that identical documents are in the same split, and adding documents
moves none from one split to another.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from oasis_attn.data import readers
from oasis_attn.data.arith import arith_rows
from oasis_attn.data.majority import MajorityTask, majority_task
from oasis_attn.data.tasks import is_task
from oasis_attn.errors import UserError, check_choice, shown

Reader = Callable[[], Iterator[str]]

_ARGUMENTS = ("corpus", "split")
_WHOLE = "whole"
_SHARES = {"train": range(90), "validation": range(90, 95), "test": range(95, 100)}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One split of a corpus.

    Attributes:
        name: its name in `CORPORA`, or its path.
        split: the name of the split, such as `train`.
        reader: reads the documents from the start at each call.
        task: the task whose sequences are the documents, or the first of them; None for text.
        argument: the argument that gave it, for error messages.
    """

    name: str
    split: str
    reader: Reader = field(repr=False, compare=False)
    task: MajorityTask | None = None
    argument: str = field(default="corpus", repr=False, compare=False)

    @property
    def has_text(self) -> bool:
        """Whether some documents are text, not sequences of a task."""
        return self.task is None or "+" in self.name

    def texts(self) -> Iterator[str]:
        """The documents that are not blank, in a fixed order.

        Raises:
            UserError: there is none, or the text cannot be read.
        """
        empty = True
        with _named(self.argument):
            for text in self.reader():
                if text.strip():
                    empty = False
                    yield text
        if empty:
            raise UserError(f"{self.label} has no text")

    def check(self) -> None:
        """Raise `UserError` unless there is text that can be read."""
        next(self.texts())

    @property
    def label(self) -> str:
        """The argument, name and split, for error messages."""
        split = "" if self.split == _WHOLE else f" split {self.split!r}"
        return f"{self.argument}: {self.name!r}{split}"

    @cached_property
    def sha256(self) -> str:
        """Hash of the documents, each preceded by its length, in hexadecimal."""
        digest = hashlib.sha256()
        for text in self.texts():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Source:
    """A row of `CORPORA`.

    Attributes:
        about: one line about the content and where it comes from.
        splits: a reader for each split.
        cut: divides the lines of a local .txt file of this corpus into documents.
    """

    about: str
    splits: Mapping[str, Reader]
    cut: Callable[[Iterable[str]], Iterator[str]] = readers.passages


def by_hash(reader: Reader) -> dict[str, Reader]:
    """Split documents by hash: 90 % train, 5 % validation, 5 % test."""
    return {split: partial(_share, reader, share) for split, share in _SHARES.items()}


def _share(reader: Reader, share: range) -> Iterator[str]:
    return (text for text in reader() if _hundredth(text) in share)


def _hundredth(text: str) -> int:
    """The hash of a document, from 0 to 99."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") % 100


def _hub(path: str, config: str | None, split: str, **options: str) -> Iterator[str]:
    return map(readers.document, readers.hub_rows(path, config, split, **options))


def _hub_wikitext(config: str, split: str) -> Iterator[str]:
    # On the Hub, each row is a line, and blank lines (" \n" in the original files) are empty.
    rows = readers.hub_rows("Salesforce/wikitext", config, split)
    return readers.articles(row["text"] or " \n" for row in rows)


def _wikitext(config: str, about: str) -> Source:
    splits = {split: partial(_hub_wikitext, config, split) for split in _SHARES}
    return Source(about=about, splits=splits, cut=readers.articles)


def _arith(split: str) -> Iterator[str]:
    return map(readers.document, arith_rows(split))


def _after(*parts: Reader) -> Iterator[str]:
    for part in parts:
        yield from part()


_BOOKS = by_hash(
    partial(_hub, "bookcorpus/bookcorpus", None, "train", revision="refs/convert/parquet")
)
_REVIEWS = by_hash(partial(_hub, "stanfordnlp/imdb", None, "unsupervised"))

CORPORA: dict[str, Source] = {
    "stdlib": Source(
        about="source code of the running Python's standard library (about 30 MB)",
        splits=by_hash(readers.stdlib),
    ),
    "pydoc": Source(
        about="language reference of the running Python (about 0.5 MB of prose)",
        splits=by_hash(readers.pydoc),
    ),
    "wikitext-2": _wikitext("wikitext-2-v1", "WikiText-2, tokenized form with <unk>"),
    "wikitext-103": _wikitext("wikitext-103-v1", "WikiText-103, tokenized form with <unk>"),
    "bookcorpus+wiki40b": Source(
        about="BookCorpus followed by the English part of Wiki-40B",
        splits={
            split: partial(_after, _BOOKS[split], partial(_hub, "google/wiki40b", "en", split))
            for split in _SHARES
        },
    ),
    "gsm8k": Source(
        about="GSM8K problems with their worked answers",
        splits={split: partial(_hub, "openai/gsm8k", "main", split) for split in ("train", "test")},
    ),
    "arith": Source(
        about="generated word problems of one to three steps, in the form of GSM8K (11 MB)",
        splits={split: partial(_arith, split) for split in _SHARES},
    ),
    "majority": Source(
        about="generated sequences for which softmax attention needs a sink (5 M tokens)",
        splits=by_hash(MajorityTask().documents),
    ),
    "imdb": Source(
        about="film reviews (Maas et al. 2011): the unlabeled and the labeled test part",
        splits={
            "train": partial(_after, _REVIEWS["train"], _REVIEWS["test"]),
            "validation": _REVIEWS["validation"],
            "test": partial(_hub, "stanfordnlp/imdb", None, "test"),
        },
    ),
    "fineweb-edu": Source(
        about="FineWeb-Edu, the first file of its 10 B token sample (about 0.7 B tokens)",
        splits=by_hash(
            partial(
                _hub, "HuggingFaceFW/fineweb-edu", None, "train",
                data_files="sample/10BT/000_00000.parquet",
            )
        ),
    ),
}  # fmt: skip


def load_corpus(
    name_or_path: str | Path, split: str = "train", *, arguments: tuple[str, str] = _ARGUMENTS
) -> Corpus:
    """A split of a corpus.  It is read when its texts are used.

    Args:
        name_or_path: a name in `CORPORA`; or a .txt, .jsonl or .jsonl.gz file, which is split by
            hash (rows of .jsonl have a field `text`, or `question` and `answer`); or a folder with
            such a file for each split, named after the split.  For a name, the splits in the folder
            `$OASIS_DATA/<name>/` replace those of `CORPORA`.  `majority-128` has windows of 128
            tokens, and `majority-128+stdlib` also the documents of another corpus, after its own.
        split: `train`, `validation`, `test`, or a split in the folder.
        arguments: the names of these two for error messages.

    Raises:
        UserError: an unknown name (the message suggests the nearest one), a missing file, or an
            unknown split.  Text that cannot be read raises it when the texts are used.
    """
    name = str(name_or_path)
    argument, split_argument = arguments
    with _named(argument):
        splits = _splits(name)
        if not splits:
            raise UserError(f"corpus: folder {name!r} holds no <split>.txt, .jsonl or .jsonl.gz")
    check_choice(f"{split_argument} (of {name!r})", split, splits)
    task, _ = _task_and_text(name)
    return Corpus(name=name, split=split, reader=splits[split], task=task, argument=argument)


def calibration_corpora(
    calibration: str, calibration_split: str, evaluation: str | None, evaluation_split: str
) -> tuple[Corpus, Corpus]:
    """The text to calibrate on, and the text to measure on: by default, of the same corpus.

    Raises:
        UserError: see `load_corpus`; the message names one of these arguments.
    """
    source = "calibration" if evaluation is None else "evaluation"
    return (
        load_corpus(calibration, calibration_split, arguments=("calibration", "calibration_split")),
        load_corpus(
            calibration if evaluation is None else evaluation,
            evaluation_split,
            arguments=(source, "evaluation_split"),
        ),
    )


def whole_file(path: str | Path) -> Corpus:
    """All of a text file, without splits: one document, or one a line for .jsonl and .jsonl.gz.

    Raises:
        UserError: a missing file, or one of another type.
    """
    with _named("text_file"):
        file = _text_file(str(path))
    reader = partial(readers.file_documents, file, readers.whole)
    return Corpus(name=str(path), split=_WHOLE, reader=reader, argument="text_file")


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Context in which error messages about the `corpus` name `argument` instead."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{argument}{str(error).removeprefix('corpus')}") from error


def _task_and_text(name: str) -> tuple[MajorityTask | None, str]:
    """The task in a name, and the corpus after `+`, if there are any."""
    first, _, text = name.partition("+")
    return majority_task(first), text


def _splits(name: str) -> Mapping[str, Reader]:
    data = os.environ.get("OASIS_DATA")
    kept = Path(data, name) if data and name else None
    task, text = _task_and_text(name)
    if task is not None:
        own = by_hash(task.documents)
        if not text:
            return own
        if _task_and_text(text)[0] is not None:
            raise UserError(f"corpus: {name!r} has two tasks; only text can follow the first")
        other = _splits(text)
        return {split: partial(_after, own[split], other[split]) for split in own if split in other}
    if name not in CORPORA:
        folder = kept if kept and os.path.isdir(kept) else Path(name)
        if name and os.path.isdir(folder):
            return _folder_splits(folder)
        if os.path.isfile(name) or name.endswith(readers.SUFFIXES):
            path = _text_file(name)
            return {split: partial(_file_share, path, share) for split, share in _SHARES.items()}
        if is_task(name):
            raise UserError(f"corpus: {name!r} is a task of vectors, which only studies train on")
        if "/" in name:
            raise UserError(f"corpus: {shown(name)} does not exist")
        check_choice("corpus (or a text file)", name, CORPORA)
    source = CORPORA[name]
    local = _folder_splits(kept, source.cut) if kept else {}
    if local:
        hint = f"{str(kept)!r} holds {', '.join(sorted(local))}"
    else:
        hint = (
            f"without the Hub, put its splits into $OASIS_DATA/{name}/<split>.txt or .jsonl, or use"
            " stdlib or pydoc, which need no network"
        )
    return {split: partial(_read, reader, hint) for split, reader in source.splits.items()} | local


def _read(reader: Reader, hint: str) -> Iterator[str]:
    """What `reader` reads; error messages end with `hint`."""
    try:
        yield from reader()
    except UserError as error:
        raise UserError(f"{error}; {hint}") from error


def _file_share(path: Path, share: range) -> Iterator[str]:
    """As `_share`, with an error that gives the reason if no document of a file is in the share."""
    count = kept = 0
    for text in readers.file_documents(path):
        if text.strip():
            count += 1
            if _hundredth(text) in share:
                kept += 1
                yield text
    if count and not kept:
        cut = (
            "is divided at the first blank line after every 1,024 characters: put blank lines"
            " between the documents, or use .jsonl with a document on each line"
            if path.suffix == ".txt"
            else "has a document on each line"
        )
        raise UserError(
            f"corpus: {str(path)!r} became {count} document{'s' * (count > 1)}, and none is in"
            f" this split; a {path.suffix} file {cut}; or use a folder with a file for each split"
        )


def _text_file(name: str) -> Path:
    if not name.endswith(readers.SUFFIXES):
        suffixes = ", ".join(readers.SUFFIXES)
        raise UserError(f"corpus: file {shown(name)} is not one of {suffixes}")
    if not os.path.isfile(name):
        raise UserError(f"corpus: file {shown(name)} does not exist")
    return Path(name)


def _folder_splits(folder: Path, cut=readers.passages) -> dict[str, Reader]:
    found: dict[str, Reader] = {}
    for suffix in readers.SUFFIXES:
        for path in sorted(folder.glob(f"*{suffix}")):
            split = path.name.removesuffix(suffix)
            if split in found:
                raise UserError(f"corpus: {str(folder)!r} holds split {split!r} twice")
            found[split] = partial(readers.file_documents, path, cut)
    return found
