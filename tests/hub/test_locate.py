"""Finding a model by name: what is local needs no network, and a dead network takes no time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from oasis_attn.errors import UserError
from oasis_attn.hub import locate
from oasis_attn.hub.locate import HubUnreachableError, ask_hub, find_model, offline_if_unreachable


@pytest.fixture
def no_network(monkeypatch):
    """Any request to the Hub fails the test."""

    def ask(repository, kind):
        raise AssertionError(f"the Hub was asked for {kind} {repository!r}")

    monkeypatch.setattr(locate, "ask_hub", ask)


@pytest.fixture
def closed_port(monkeypatch):
    """The Hub is at an address that refuses connections."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The current folder, with the model `runs/vanilla`."""
    folder = tmp_path / "runs" / "vanilla"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", "'smolm2' does not exist; did you mean 'smollm2'"),
        ("SmolLM2", "did you mean 'smollm2'"),
        ("/no/such/folder", "'/no/such/folder' does not exist$"),
        ("./absent", "does not exist"),
        ("~/absent/model", "does not exist"),
        ("absent.gguf", "does not exist"),
        ("runs/vanila", "does not exist; did you mean 'runs/vanilla'"),
        ("runs", r"contains no config\.json; did you mean 'runs/vanilla'"),
    ],
)
@pytest.mark.usefixtures("no_network", "models")
def test_a_path_or_a_misspelt_name_never_goes_to_the_network(name, message):
    with pytest.raises(UserError, match=message):
        find_model(name)


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_found(models):
    assert find_model("runs/vanilla") == "runs/vanilla"
    assert find_model(str(models / "runs" / "vanilla")) == str(models / "runs" / "vanilla")


@pytest.mark.usefixtures("models")
def test_an_id_is_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setattr(locate, "ask_hub", lambda name, kind: (name, kind) == ("a/b", "model"))
    assert find_model("a/b") == "a/b"
    with pytest.raises(UserError, match="'a/c' is neither a local folder nor a model on the Hub"):
        find_model("a/c")


@pytest.mark.usefixtures("closed_port")
def test_an_unreachable_hub_is_one_quick_error(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(HubUnreachableError):
        ask_hub("someone/model", "model")
    with pytest.raises(UserError, match=r"a local folder, and the Hub cannot be reached \(.+\)"):
        find_model("someone/model")
    assert time.monotonic() - start < 5
    assert capfd.readouterr() == ("", "")


def test_a_cached_repository_is_read_if_the_hub_is_unreachable(monkeypatch):
    def ask(_repository, _kind):
        raise HubUnreachableError("no route")

    monkeypatch.setattr(locate, "ask_hub", ask)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: "/cache/someone")
    assert find_model("someone/model") == "/cache/someone"


@pytest.mark.usefixtures("closed_port")
def test_datasets_do_not_retry_if_the_hub_is_unreachable(tmp_path, capfd):
    from datasets import load_dataset
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    start = time.monotonic()
    with pytest.raises(Exception, match="reach"), offline_if_unreachable("a/b", "dataset"):
        load_dataset("a/b", cache_dir=str(tmp_path))
    assert time.monotonic() - start < 10
    assert "Retrying" not in capfd.readouterr().err
    assert get_session().event_hooks == hooks


def test_finding_a_model_does_not_import_torch():
    code = (
        "import sys; from oasis_attn.hub.locate import find_model\n"
        "try: find_model('/no/such/folder')\n"
        "except ValueError: pass\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
