from __future__ import annotations

import pytest

from oasis_attn.errors import UserError
from oasis_attn.training.checkpoints import last_checkpoint, publish

RUN = {"variant": "oasis", "steps": 10, "settings": {}}


def save(folder, step):
    staged = folder / ".staged" / f"checkpoint-{step}"
    (staged / "deep").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"weights")
    (staged / "deep" / "state").write_bytes(b"state")
    publish(staged, folder, RUN)


def test_newest_of_the_last_two(tmp_path):
    assert last_checkpoint(tmp_path, RUN) is None
    for step in (2, 9, 10, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert not list((tmp_path / ".staged").iterdir())
    assert last_checkpoint(tmp_path, RUN).name == "checkpoint-100"


def test_staged_is_not_seen(tmp_path):
    save(tmp_path, 5)
    (tmp_path / ".staged" / "checkpoint-10").mkdir()
    assert last_checkpoint(tmp_path, RUN).name == "checkpoint-5"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "model.safetensors").write_bytes(b"weig"),
        lambda path: (path / "deep" / "state").unlink(),
        lambda path: (path / "complete.json").unlink(),
        lambda path: (path / "complete.json").write_text("{"),
        lambda path: (path / "complete.json").write_text("{}"),
    ],
)
def test_damaged(tmp_path, damage):
    save(tmp_path, 5)
    save(tmp_path, 10)
    damage(tmp_path / "checkpoint-10")
    with pytest.raises(UserError, match=r"checkpoint-10' is damaged .* remove it"):
        last_checkpoint(tmp_path, RUN)


def test_of_another_run(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(UserError, match="has variant 'oasis', but this run has 'vanilla'"):
        last_checkpoint(tmp_path, RUN | {"variant": "vanilla"})
    with pytest.raises(UserError, match="has corpus None, but this run has 'imdb'"):
        last_checkpoint(tmp_path, RUN | {"corpus": "imdb"})
