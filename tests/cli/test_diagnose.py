from __future__ import annotations

import json


def test_a_text_is_measured_as_the_file_that_contains_it(oasis, model, tmp_path) -> None:
    """By default, all of a short text is one window."""
    words, file = "w5 w6 w7 w5", tmp_path / "words.txt"
    file.write_text(words)
    code, (out, _) = oasis("diagnose", model, "--text", words, "--json")
    record = json.loads(out)
    assert (code, record["data"]["windows"], record["data"]["corpus"]) == (0, 1, None)
    assert record["data"]["window"] == record["data"]["tokens_scored"] + 1
    code, (out, _) = oasis("diagnose", model, "--text-file", file, "--json")
    of_file = json.loads(out)
    assert (code, of_file["data"]["corpus"]) == (0, str(file))
    assert of_file["metrics"] == record["metrics"]


def test_a_text_that_is_shorter_than_the_window_is_refused(oasis, model) -> None:
    code, (_, error) = oasis("diagnose", model, "--text", "w5 w6", "--window", 9)
    assert code == 2
    assert "the text has 3 tokens, which is less than one window of 9" in error
