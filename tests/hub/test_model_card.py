"""A saved model says what it is, and what was measured on it."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from example_records import diagnosis
from oasis_attn import OasisForCausalLM, variants
from oasis_attn.hub.model_card import variant_of, write_card
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.quantization import quantize, schemes
from oasis_attn.records import Metric
from tiny_models import tiny_config, tiny_model

RECORD = diagnosis(
    metrics=(
        Metric(name="perplexity.windowed", value=12.345678, n=7, standard_error=0.25),
        Metric(name="sink.mass", value=0.5, where="layer 0"),
    ),
)


@pytest.mark.parametrize("name", variants())
def test_each_variant_is_known_by_its_settings(name):
    assert variant_of(tiny_model(name).config) == name


def test_other_settings_are_custom():
    assert variant_of(tiny_model("oasis", depth_block_size=3).config) == "custom"


def test_the_card_beside_the_weights(tmp_path):
    model = tiny_model("oasis")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert head["tags"] == ["oasis-attn", "llama", "oasis"]
    added = sum(p.numel() for p in model.model.depth.parameters())
    assert f"{model.num_parameters():,} parameters, of which" in card
    assert f"adds {added:,}." in card
    assert "| `null_signal` | `on` |" in card
    assert "Measured" not in card


def test_the_record_is_quoted_as_it_was_measured(tmp_path):
    RECORD.save(tmp_path / "model" / "record.json")
    tiny_model().save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "## Measured\n" in card
    assert "| `perplexity.windowed` | 12.3457 | 7 | 0.25 |" in card
    assert "| corpus | `made up` |" in card
    assert "sink.mass" not in card  # whole-model numbers only
    # A copy saved elsewhere says which checkpoint was measured.
    OasisForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "copy")
    assert "## Measured, on `model` as it was loaded\n" in (tmp_path / "copy/README.md").read_text()


def test_a_persons_card_is_kept_and_ours_is_renewed(tmp_path):
    model, path = tiny_model(), tmp_path / "README.md"
    path.write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert path.read_text() == "# Mine\n"
    path.unlink()
    model.save_pretrained(tmp_path)
    replace(RECORD, seed=5).save(tmp_path / "record.json")
    write_card(model, tmp_path)
    assert "| seed | `5` |" in path.read_text()


def test_a_push_includes_our_card_and_the_copy_of_a_prefix(tmp_path, monkeypatch):
    """transformers puts a template of its own in the folder just before the upload, and uploads
    before `save_pretrained` returns."""
    from transformers.utils.hub import PushToHubMixin

    uploaded = []
    ours = tiny_model()
    native = AutoModelForCausalLM.from_config(tiny_config())
    rescued = with_prefix(native, compute_prefix(native, (5, 6)))

    def upload(_self, folder, *_args, **_kwargs):
        uploaded.extend(sorted(path.name for path in Path(folder, "prefix").glob("*")))
        uploaded.append(Path(folder, "README.md").read_text())

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    prefixed = with_prefix(ours, compute_prefix(ours, (5, 6)))
    for model, expected in ((ours, []), (rescued, adapter), (prefixed, adapter)):
        (tmp_path / "README.md").write_text("This model card has been automatically generated.")
        model._upload_modified_files(str(tmp_path))
        assert uploaded.pop().startswith("---\nlibrary_name: transformers")
        assert uploaded == expected
        uploaded.clear()


def test_a_familys_own_model_says_what_it_needs(tmp_path):
    native = AutoModelForCausalLM.from_config(tiny_config()).eval()
    rescued = with_prefix(native, compute_prefix(native, (5, 6)))
    quantize(rescued, "w8a8-dynamic").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["oasis-attn", "llama"]
    assert "# llama, w8a8-dynamic, with a prefix" in card
    assert "import oasis_attn  #" in card
    assert f"A `llama` decoder with {native.num_parameters():,} parameters." in card
    assert "28\nlayers and tensors" in card
    assert "prefix (tokens: 2)" in card
    assert "output head" not in card
    rotated = schemes()["w8a8-dynamic"].with_options({"rotation": "folded"})
    quantize(native, rotated).save_pretrained(tmp_path / "rotated")
    entries = native.get_output_embeddings().weight.numel()
    card = (tmp_path / "rotated" / "README.md").read_text()
    assert f"output head of its own, which is {entries:,} of the parameters" in card
