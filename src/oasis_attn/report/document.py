"""The parts of a report, from which its page, its figures and its tables are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oasis_attn.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TONES = ("good", "bad", "neutral", "weak")
"""What a badge says beside its text: a success, a failure, something else, or almost nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A figure.

    Attributes:
        name: name of its files, without a suffix.
        title: what it shows, for screen readers.
        caption: how to read it.
        figure: the figure.
    """

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Badges:
    """Short texts, each with one of `TONES`."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Gallery:
    """Small pictures, several in a row if the page is wide."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Fold:
    """Items that are hidden until the reader opens them; `summary` is always shown."""

    summary: str
    items: tuple[Item, ...]


Item = str | Table | Picture | Gallery | Badges | Fold
"""A part of a section; text is a paragraph, in which text in `backticks` is code."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    items: Sequence[Item]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page.

    Attributes:
        title: its heading.
        answers: what it says first, in sentences and badges.
        lead: what it is about.
        sections: its parts.
        footer: the provenance of the numbers.
    """

    title: str
    answers: Sequence[Item] = ()
    lead: str
    sections: Sequence[Section]
    footer: str


def walk(sections: Iterable[Section]) -> Iterator[Item]:
    """Every item of the sections, also those in folds and galleries."""
    for section in sections:
        yield from _inside(section.items)


def _inside(items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        yield item
        if isinstance(item, Fold):
            yield from _inside(item.items)
        elif isinstance(item, Gallery):
            yield from item.pictures
