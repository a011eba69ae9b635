"""Reads documents from files, from the running Python and from the Hub."""

from __future__ import annotations

import codecs
import gzip
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oasis_attn.errors import UserError, parse_json, reason
from oasis_attn.hub.locate import offline_if_unreachable

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
_PASSAGE_CHARACTERS = 1024
_TO_UTF_8 = "convert it with: iconv -f UTF-16 -t UTF-8"
_MARKS = {  # first bytes of files that are often mistaken for UTF-8 text
    codecs.BOM_UTF16_LE: ("UTF-16", _TO_UTF_8),
    codecs.BOM_UTF16_BE: ("UTF-16", _TO_UTF_8),
    b"\x1f\x8b": ("compressed by gzip", "decompress it, or name it .jsonl.gz"),
}
_WIKITEXT_TITLE = re.compile(r" = [^=].* = ?\n?")


def passages(lines: Iterable[str]) -> Iterator[str]:
    """Documents of whole paragraphs; each ends at the first blank line after 1 024 characters."""
    run: list[str] = []
    length = 0
    for line in lines:
        run.append(line)
        length += len(line)
        if length >= _PASSAGE_CHARACTERS and not line.strip():
            yield "".join(run)
            run, length = [], 0
    yield "".join(run)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """The articles of WikiText; each begins at a top-level heading ` = Title = `."""
    run: list[str] = []
    for line in lines:
        if _WIKITEXT_TITLE.fullmatch(line):
            yield "".join(run)
            run = []
        run.append(line)
    yield "".join(run)


def whole(lines: Iterable[str]) -> Iterator[str]:
    """All lines as one document."""
    yield "".join(lines)


def document(row: Mapping[str, Any]) -> str:
    """The text of a row: its field `text`, or `question` and `answer` in the form of GSM8K.

    Raises:
        KeyError: the row has neither.
        TypeError: the text is not a string.
        ValueError: the string has no UTF-8 form, because it has half of a surrogate pair.
    """
    text = row["text"] if "text" in row else f"Question: {row['question']}\nAnswer: {row['answer']}"
    if not isinstance(text, str):
        raise TypeError("text is not a string")
    text.encode()
    return text


def file_documents(path: Path, cut=passages) -> Iterator[str]:
    """The documents of a .txt file (divided by `cut`) or a .jsonl or .jsonl.gz file (by line)."""
    if path.name.endswith(".txt"):
        yield from cut(_lines(path))
        return
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield document(parse_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"corpus: {str(path)!r} line {number} is not a JSON object with a string"
                " `text` in Unicode, or `question` and `answer`"
            ) from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with LF, CR LF and CR all read as a newline.

    A byte order mark at the start and a DOS end-of-file character (Ctrl-Z) at the end are left out.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for raw in file:
                if number == 0:
                    _check_encoding(path, raw)
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if not raw.endswith(b"\n"):
                    raw = raw.rstrip(b"\x1a")
                for line in raw.splitlines(keepends=True):
                    number += 1
                    if b"\0" in line:
                        raise UserError(
                            f"corpus: {str(path)!r} line {number} has a NUL byte, so it is"
                            " binary or UTF-16; text must be UTF-8"
                        )
                    text = line.rstrip(b"\r\n")
                    yield text.decode("utf-8") + ("\n" if text != line else "")
    except UnicodeDecodeError as error:
        raise UserError(f"corpus: {str(path)!r} line {number} is not valid UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"corpus: {str(path)!r} cannot be read ({reason(error)})") from error


def _check_encoding(path: Path, start: bytes) -> None:
    for mark, (kind, remedy) in _MARKS.items():
        if start.startswith(mark):
            raise UserError(f"corpus: {str(path)!r} is {kind}, not UTF-8; {remedy}")


def stdlib() -> Iterator[str]:
    """The .py files of the running Python's standard library, in order of their paths.

    Installed packages are left out, and `pydoc_data` (the corpus `pydoc`), and the few files of
    Python's own tests that are not UTF-8 on purpose.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(root).parts):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def pydoc() -> Iterator[str]:
    """The language reference that `help()` of the running Python shows, in passages.

    Whole topics would be too few documents, of too different lengths, to split.
    """
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield from passages(text.splitlines(keepends=True))


def hub_rows(path: str, config: str | None, split: str, **options: Any) -> Iterator[Mapping]:
    """The rows of a dataset on the Hub.

    Raises:
        UserError: it cannot be downloaded or read, for any reason.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with offline_if_unreachable(path, "dataset"):
            rows = load_dataset(path, config, split=split, **options)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"corpus: {path!r} could not be downloaded from the Hub: {reason}"
        ) from error
    yield from rows
