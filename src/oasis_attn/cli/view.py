"""`oasis view`: an interactive page about a model's attention and activations on one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from oasis_attn.cli.terminal import (
    AsJson,
    Device,
    Model,
    TrustRemoteCode,
    print_json,
    print_saved,
    working,
)
from oasis_attn.cli.text import given_text
from oasis_attn.errors import UserError, check_whole, parse_json, reason, shown


def view(
    model: Model,
    text: Annotated[str | None, Option(help="Show this text.", show_default=False)] = None,
    text_file: Annotated[
        Path | None,
        Option(help="Show the text of this .txt, .jsonl or .jsonl.gz file.", show_default=False),
    ] = None,
    chat: Annotated[
        bool,
        Option(
            "--chat",
            help="Apply the chat template of the model: the text is a message of the user, or"
            " --text-file is a .json file with a list of messages with role and content.",
        ),
    ] = False,
    tokens: Annotated[
        int, Option(help="Maximum number of tokens on the page: the first ones of the text.")
    ] = 256,
    out: Annotated[Path, Option(help="Write the page to this HTML file.")] = Path("view.html"),
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Make an interactive page: attention of every head, sinks, massive activations, depth routing.

    Example: [bold]oasis view smollm2 --text "The quick brown fox jumps over the lazy dog."[/bold]
    """
    from oasis_attn.devices import check_device
    from oasis_attn.files import check_writable
    from oasis_attn.hub.locate import find_model

    check_whole("tokens", tokens, 2)
    check_device(device)
    given = _given(text, text_file, chat)
    check_writable(out)
    find_model(model)

    from oasis_attn.hub.loading import load_model
    from oasis_attn.report.text_page import view as make_page

    with working(f"running {model}", as_json=as_json):
        loaded, tokenizer = load_model(model, device=device, trust_remote_code=trust_remote_code)
        page = make_page(loaded, tokenizer, given, tokens=tokens)
        page.save(out)
    if as_json:
        print_json(
            {"page": str(out), "tokens": len(page.inspection.ids), "findings": page.findings}
        )
    else:
        print(*page.findings, sep="\n")
        print_saved(out)


def _given(text: str | None, text_file: Path | None, chat: bool) -> str | list[dict[str, str]]:
    """The text, or the messages of a chat."""
    if text is None and text_file is not None and chat and text_file.suffix == ".json":
        return _messages(text_file)
    found = given_text(text, text_file)
    if found is None:
        raise UserError("text: give either --text or --text-file")
    if not isinstance(found, str):
        found = "\n".join(found.texts()).rstrip("\n")
    return [{"role": "user", "content": found}] if chat else found


def _messages(path: Path) -> list[dict[str, str]]:
    try:
        messages: Any = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"text_file: {shown(str(path))} cannot be read: {reason(error)}") from error
    fields = {"role", "content"}
    valid = isinstance(messages, list) and all(
        isinstance(each, dict)
        and set(each) == fields
        and all(isinstance(value, str) for value in each.values())
        for each in messages
    )
    if not (valid and messages):
        raise UserError(
            f"text_file: {shown(str(path))} is not a list of messages, each with role and content"
        )
    return messages
