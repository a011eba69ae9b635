"""Random changes to the JSON files of valid folders: a `UserError` in one line, or a model."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from oasis_attn import quantize
from oasis_attn.errors import UserError
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_sizes import text_config
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from tiny_models import tiny_config, tiny_model, word_tokenizer

SECONDS, MEGABYTES = 5.0, 512  # that one folder may take

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 7, -(10**9), 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -2.5, 1e-300, 1e300,
     float("inf"), float("-inf"), float("nan")]
)  # fmt: skip
LEAVES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["llama", "oasis", "bert", "float32", "full_attention", "a/b", "../x", "\x00"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _with_prefix():
    model = tiny_model()
    return with_prefix(model, compute_prefix(model, [3, 4]))


MODELS = {
    "llama": lambda: AutoModelForCausalLM.from_config(tiny_config()),
    "gpt2": lambda: AutoModelForCausalLM.from_config(tiny_config("gpt2")),
    "qwen3_moe": lambda: AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")),
    "oasis": tiny_model,
    "prefix": _with_prefix,
    "quantized": lambda: quantize(tiny_model(), "w8a8-dynamic"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> a valid folder; and what each of its JSON files holds."""
    made = {}
    for name, make in MODELS.items():
        folder = tmp_path_factory.mktemp("valid") / name
        model = make()
        model.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        load_model(folder)
        made[name] = folder
    return made


def _places(value, at=()):
    """Every key and index in nested JSON, as a path."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from _places(inner, (*at, key))


def _change(data, content):
    """`content` with one to three values replaced, removed or moved to another key."""
    for _ in range(data.draw(st.integers(1, 3))):
        places = sorted(_places(content), key=str)
        if not places:
            return content
        *above, last = data.draw(st.sampled_from(places))
        parent = content
        for key in above:
            parent = parent[key]
        deed = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "move"]))
        if deed == "replace":
            parent[last] = data.draw(VALUES)
        else:
            value = parent.pop(last)
            if deed == "move" and isinstance(parent, dict):
                parent[data.draw(st.text(min_size=1, max_size=6))] = value
    return content


def _check(load, path):
    started, before = time.process_time(), _peak()
    try:
        load(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert time.process_time() - started < SECONDS
    assert _peak() - before < MEGABYTES


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _bounded(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@_bounded(80)
@given(data=st.data())
def test_any_folder_loads_or_is_refused(folders, name, data):
    folder = folders[name]
    files = sorted(folder.rglob("*.json"))
    path = data.draw(st.sampled_from([folder / "config.json", *files]), label="file")
    before = path.read_text()
    try:
        if data.draw(st.integers(0, 9)):
            changed = _change(data, copy.deepcopy(json.loads(before)))
        else:
            changed = data.draw(VALUES)
        path.write_text(json.dumps(changed))
        _check(load_model, folder)
    finally:
        path.write_text(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@_bounded(60)
@given(data=st.data())
def test_any_size_is_read_or_refused(folders, tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("size") / "size.json"
    content = json.loads((folders[name] / "config.json").read_text())
    path.write_text(json.dumps(_change(data, content)))
    _check(text_config, path)
    shutil.rmtree(path.parent)
