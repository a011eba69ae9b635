from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest

from oasis_attn.data import CORPORA, load_corpus
from oasis_attn.errors import UserError

DATA = os.environ.get("OASIS_DATA")
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    """The Hub seems to be reachable; tests that read from it replace `datasets.load_dataset`."""
    monkeypatch.setattr("oasis_attn.hub.locate.ask_hub", lambda *_: True)


def write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_hash_splits_are_a_partition_and_duplicates_stay_together(tmp_path):
    documents = [f"document {i}" for i in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in documents + documents[:50]])
    parts = {split: list(load_corpus(path, split).texts()) for split in SPLITS}
    assert sorted(itertools.chain(*parts.values())) == sorted(documents + documents[:50])
    assert not set(parts["train"]) & set(parts["validation"])
    assert not set(parts["train"]) & set(parts["test"])
    assert not set(parts["validation"]) & set(parts["test"])
    assert all(parts.values())
    assert len(parts["train"]) > 300


def test_half_of_a_surrogate_pair_is_told_with_its_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "abc \ud800"}])
    with pytest.raises(UserError, match=r"line 2 is not .* a string `text` in Unicode"):
        list(load_corpus(path, "train").texts())


def test_adding_documents_moves_none(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(100)])
    before = set(load_corpus(path, "test").texts())
    write_jsonl(path, [{"text": f"{i}"} for i in reversed(range(200))])
    assert before <= set(load_corpus(path, "test").texts())


def test_sha256_follows_content_and_document_ends(tmp_path):
    one = write_jsonl(tmp_path / "x" / "train.jsonl", [{"text": "ab"}, {"text": "c"}])
    two = write_jsonl(tmp_path / "y" / "train.jsonl.gz", [{"text": "ab"}, {"text": "c"}])
    three = write_jsonl(tmp_path / "z" / "train.jsonl", [{"text": "a"}, {"text": "bc"}])
    hashes = [load_corpus(path.parent).sha256 for path in (one, two, three)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_stdlib_is_the_running_pythons_source():
    texts = {split: list(load_corpus("stdlib", split).texts()) for split in SPLITS}
    assert len(texts["validation"]) > 20
    assert texts["validation"] == list(load_corpus("stdlib", "validation").texts())
    assert Path(json.__file__).read_text() in {text for part in texts.values() for text in part}


def test_pydoc_splits_do_not_overlap():
    parts = [set(load_corpus("pydoc", split).texts()) for split in SPLITS]
    assert len(set.union(*parts)) == sum(map(len, parts)) > 50


def test_txt_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    text = "".join(f"paragraph {i} {'word ' * 60}\n\n" for i in range(30))
    (tmp_path / "train.txt").write_text(text)
    documents = list(load_corpus(tmp_path).texts())
    assert "".join(documents) == text
    assert len(documents) > 3
    assert all(document.endswith("\n\n") and len(document) >= 1024 for document in documents[:-1])


def test_wikitext_is_cut_before_titles(tmp_path, monkeypatch):
    text = " \n = First = \n \n a \n = = Part = = \n b \n \n = Second = \n \n c \n"
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "test.txt").write_text(text)
    monkeypatch.setenv("OASIS_DATA", str(tmp_path))
    documents = list(load_corpus("wikitext-2", "test").texts())
    assert [d.split("\n")[0] for d in documents] == [" = First = ", " = Second = "]
    assert " \n" + "".join(documents) == text


def test_data_folder_comes_first_and_gsm8k_form_is_read(tmp_path, monkeypatch):
    row = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", [row])
    monkeypatch.setenv("OASIS_DATA", str(tmp_path))
    texts = list(load_corpus("gsm8k", "test").texts())
    assert texts == ["Question: 1 + 1?\nAnswer: It is 2.\n#### 2"]


def test_a_folder_in_the_data_folder_is_a_name(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "mine" / "train.jsonl", [{"text": "t"}])
    monkeypatch.setenv("OASIS_DATA", str(tmp_path))
    assert list(load_corpus("mine").texts()) == ["t"]


def test_hub_failure_is_one_line(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.delenv("OASIS_DATA", raising=False)
    for name in ("wikitext-103", "bookcorpus+wiki40b", "gsm8k", "imdb", "fineweb-edu"):
        with pytest.raises(UserError, match=r"from the Hub: no route; without the Hub, put"):
            list(load_corpus(name).texts())


def test_a_split_the_data_folder_lacks_is_told_with_those_it_has(tmp_path, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setenv("OASIS_DATA", str(tmp_path))
    for split in ("test", "validation"):
        write_jsonl(tmp_path / "wikitext-2" / f"{split}.jsonl", [{"text": "t"}])
    with pytest.raises(UserError, match=r"no route; .*wikitext-2' holds test, validation$"):
        list(load_corpus("wikitext-2", "train").texts())


def test_hub_rows_are_read_as_the_local_files_are(monkeypatch):
    rows = [{"text": x} for x in ("", " = One = \n", "", " a \n", " = Two = \n", " b \n")]
    monkeypatch.setattr("datasets.load_dataset", lambda *_args, **_kwargs: rows)
    texts = list(load_corpus("wikitext-2", "test").texts())
    assert texts == [" = One = \n \n a \n", " = Two = \n b \n"]


def test_every_named_corpus_has_training_text():
    assert all("train" in source.splits and source.about for source in CORPORA.values())


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("stdlb", "train", "did you mean 'stdlib'"),
        ("", "train", "is not one of"),
        ("nowhere/at/all.txt", "train", "does not exist"),
        ("nowhere/at/all", "train", "corpus: 'nowhere/at/all' does not exist"),
        ("gsm8k", "validation", "is not one of train, test"),
        ("stdlib", "dev", "is not one of train, validation, test"),
    ],
)
def test_unknown_names(name, split, message):
    with pytest.raises(UserError, match=message):
        load_corpus(name, split)


def test_unfit_files(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"a\.csv' is not one of \.txt"):
        load_corpus(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"holds no <split>\.txt"):
        load_corpus(tmp_path)
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match="'train' twice"):
        load_corpus(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.txt", b"", "has no text"),
        ("train.txt", b" \n\n", "has no text"),
        ("train.txt", b"fine\nb\xe4d\n", "line 2 is not valid UTF-8"),
        ("train.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not a JSON object"),
        ("train.jsonl", b'{"txt": "a"}\n', "line 1 is not a JSON object with a string"),
        ("train.jsonl", b'{"text": 3}\n', "line 1"),
        ("train.jsonl", b"[1]\n", "line 1"),
        ("train.jsonl", b"[" * 100_000, "line 1"),
        ("train.txt", "text".encode("utf-16"), "is UTF-16, not UTF-8; convert it"),
        ("train.jsonl", "text".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("train.txt", b"\xfe\xff\x00a", "is UTF-16, not UTF-8"),
        ("train.txt", "text".encode("utf-16-le"), "line 1 has a NUL byte"),
        ("train.txt", b"fine\n\0\n", "line 2 has a NUL byte"),
        ("train.txt", b"fine\rb\xe4d\r", "line 2 is not valid UTF-8"),
        ("train.jsonl", gzip.compress(b"{}", mtime=0), "is compressed by gzip, not UTF-8"),
        ("train.jsonl.gz", b"not gzip", "cannot be read"),
        ("train.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_unreadable_text(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(load_corpus(tmp_path).texts())
    assert "\n" not in str(caught.value)


FORMS = {
    "CR LF": lambda data: data.replace(b"\n", b"\r\n"),
    "CR": lambda data: data.replace(b"\n", b"\r"),
    "BOM": lambda data: b"\xef\xbb\xbf" + data,
    "BOM, CR LF and Ctrl-Z": lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n") + b"\x1a",
    "CR and Ctrl-Z": lambda data: data.replace(b"\n", b"\r") + b"\x1a\x1a",
    "mixed": lambda data: data.replace(b"\n", b"\r\n", 5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("name", ["mine", "wikitext-2"])
def test_line_ends_and_marks_do_not_change_the_documents(tmp_path, monkeypatch, form, end, name):
    passage = "\n".join(f"é line {i} of words" for i in range(60))
    texts = {
        "mine": "\n \n".join(f"{i}: {passage}" for i in range(3)),
        "wikitext-2": " = One = \n \n a \n = = Part = = \n b \n \n = Two = \n \n c ",
    }
    monkeypatch.setenv("OASIS_DATA", str(tmp_path))
    folder = tmp_path / name
    rows = "".join(json.dumps({"text": f"{i}\r\n{i}"}) + "\n" for i in range(3))
    found = []
    for change in (lambda data: data, FORMS[form]):
        data = texts[name].encode() + end
        folder.mkdir(exist_ok=True)
        (folder / "train.txt").write_bytes(change(data))
        (folder / "test.jsonl").write_bytes(change(rows.encode()))
        (folder / "validation.jsonl.gz").write_bytes(gzip.compress(change(rows.encode())))
        found.append([list(load_corpus(name, split).texts()) for split in SPLITS])
        found.append([load_corpus(name, split).sha256 for split in SPLITS])
    assert found[:2] == found[2:]
    assert [len(documents) for documents in found[0]] == [3 if name == "mine" else 2, 3, 3]


def test_blank_lines_between_rows_are_nothing(tmp_path):
    (tmp_path / "train.jsonl").write_text('\n{"text": "a"}\n  \n{"text": "b"}\n\n')
    assert list(load_corpus(tmp_path).texts()) == ["a", "b"]


def refusals(path: Path) -> list[str]:
    """What is told of the splits of a file that have no document."""
    found = []
    for split in SPLITS:
        try:
            list(load_corpus(path, split).texts())
        except UserError as error:
            found.append(str(error))
    return found


def test_documents_that_became_one_are_told_how_to_be_kept_apart(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"document {i} {'word ' * 40}\n" for i in range(50)))
    told = refusals(path)
    assert len(told) == 2
    for message in told:
        assert "became 1 document, and none is in this split" in message
        assert "put blank lines between the documents" in message
        assert "\n" not in message
    told = refusals(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}]))
    assert "became 2 documents" in told[0]
    assert "has a document on each line" in told[0]


@pytest.mark.skipif(not DATA, reason="$OASIS_DATA is not set")
def test_the_data_folder(monkeypatch):
    monkeypatch.setenv("OASIS_DATA", DATA)
    assert sum(1 for _ in load_corpus("gsm8k", "test").texts()) == 1319
    assert sum(1 for _ in load_corpus("imdb", "validation").texts()) == 1000
    raw = Path(DATA, "wikitext-2", "test.txt").read_text(encoding="utf-8")
    assert "".join(load_corpus("wikitext-2", "test").texts()) == raw.removeprefix(" \n")
