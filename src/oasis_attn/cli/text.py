"""The options `--text` and `--text-file` of the commands that read one text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from oasis_attn.errors import UserError, check_unicode, shown

if TYPE_CHECKING:
    from oasis_attn.data import Corpus


def given_text(text: str | None, text_file: Path | None) -> str | Corpus | None:
    """The text of `--text`, or the file of `--text-file`; None if neither is given.

    Raises:
        UserError: both are given, the text is empty, not Unicode or the name of a file, or there is
            no such file.  Text that cannot be read raises it when the file is used.
    """
    from oasis_attn.data import whole_file
    from oasis_attn.data.readers import SUFFIXES

    if text_file is not None:
        if text is not None:
            raise UserError("text: give either --text or --text-file")
        return whole_file(text_file)
    if text is not None and not text.strip():
        raise UserError("text: it is empty")
    if text is not None:
        check_unicode("text", text)
    if text is not None and text.endswith(SUFFIXES) and len(text.split()) == 1:
        raise UserError(f"text: {shown(text)} is the name of a file; give it as --text-file")
    return text
