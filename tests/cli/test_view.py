from __future__ import annotations

import json
import subprocess
import sys

import pytest


def test_a_page_is_written_and_its_findings_are_printed(oasis, model, tmp_path) -> None:
    out = tmp_path / "pages" / "view.html"
    code, (printed, _) = oasis("view", model, "--text", "w5 w6 w7 w5 w6", "--out", out)
    assert code == 0
    assert f"<h1>{printed.splitlines()[0]}</h1>" in out.read_text().replace("&nbsp;", " ")
    assert printed.splitlines()[-1] == f"Saved: {out}."
    code, (printed, _) = oasis("view", model, "--text", "w5 w6 w7", "--out", out, "--json")
    assert code == 0
    found = json.loads(printed)
    assert found["tokens"] == 3
    assert f"<h1>{found['findings'][0]}</h1>" in out.read_text().replace("&nbsp;", " ")


def test_files_and_chats(oasis, model, tmp_path) -> None:
    text, chat = tmp_path / "text.txt", tmp_path / "chat.json"
    text.write_text("w5 w6\nw7 w8\n")
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w5 w6"}]
    chat.write_text(json.dumps(messages))
    for words, count in (
        (["--text-file", text], 4),
        (["--text-file", text, "--tokens", 3], 3),
        (["--text-file", text, "--chat"], 6),
        (["--text", "w5 w6", "--chat"], 4),
        (["--text-file", chat, "--chat"], 7),
    ):
        code, (out, _) = oasis("view", model, *words, "--json", "--out", tmp_path / "view.html")
        assert code == 0
        assert json.loads(out)["tokens"] == count


BAD = [
    ([], "--text: give either --text or --text-file"),
    (["--text", "w5", "--text-file", "text.txt"], "--text: give either --text or --text-file"),
    (["--text", " "], "--text: it is empty"),
    (["--text", "w5 \udc80"], "--text: character 3 is not Unicode"),
    (["--text", "text.txt"], "--text: 'text.txt' is the name of a file; give it as --text-file"),
    (["--text", "absent.txt"], "--text: 'absent.txt' is the name of a file; give it as"),
    (["--text-file", "empty.txt"], "--text-file: 'empty.txt' has no text"),
    (["--text-file", "absent.txt"], "--text-file: file 'absent.txt' does not exist"),
    (["--text-file", "chat.json"], "--text-file: file 'chat.json' is not one of .txt"),
    (["--text-file", "chat.json", "--chat"], "is not a list of messages, each with role"),
    (["--text-file", "absent.json", "--chat"], "--text-file: 'absent.json' cannot be read"),
    (["--text", "w5 w6", "--tokens", "1"], "--tokens: 1 is not a whole number of at least 2"),
    (["--text", "w5 w6", "--out", "."], "--out: '.' is a folder; give a file"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_refused(oasis, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("w5 w6")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "chat.json").write_text('[{"role": "user"}]')
    code, (out, error) = oasis("view", "absent", *words)
    assert (code, out) == (2, "")
    assert message in error
    kept = ["chat.json", "empty.txt", "text.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_refusals_come_before_torch_is_imported(tmp_path) -> None:
    code = (
        "import sys; from oasis_attn.cli import main; sys.argv = ['oasis', *sys.argv[1:]];"
        "code = main(); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "view", "./absent", "--text", "some text"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "2 False\n"
    assert "./absent" in done.stderr
