"""A quantized model whose prefix an engine computes, from tokens that the tokenizer adds."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oasis_attn.data import load_corpus, read_windows
from oasis_attn.errors import UserError
from oasis_attn.evaluation import evaluate
from oasis_attn.hub.loading import quiet
from oasis_attn.hub.prefix import compute_prefix, prefix_of, with_prefix, without_prefix
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.quantization import quantize, schemes
from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint
from oasis_attn.quantization.served_prefix import check_served_prefix, clipped_layers
from oasis_attn.quantization.simulate import linear_targets
from quantization.exported_models import has_int8_kernels
from tiny_models import VOCABULARY, tiny_config, word_tokenizer

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

SINK = 5
STATIC, DYNAMIC = schemes()["w8a8-static-linear"], schemes()["w8a8-dynamic"]
CLIPPED = "model.layers.1.mlp.down_proj"


def make():
    """A model in which the token `SINK` alone has massive activations, made by layer 1."""
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.2, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0
        embedding[SINK, 0] = 0.4
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0  # nothing else writes to this channel
        for name in ("gate_proj", "up_proj"):
            model.model.layers[1].mlp.get_submodule(name).weight[:, 0] = 10.0
    return model


def windows(count=4):
    return torch.randint(6, VOCABULARY, (count, 12), generator=torch.manual_seed(0))


def prefixed():
    model = make()
    return with_prefix(model, compute_prefix(model, [SINK]))


def quantized(model, scheme, **keywords):
    calibration = windows().split(1) if scheme.needs_calibration else None
    return quantize(model, scheme, calibration=calibration, **keywords)


def test_names_the_layers_whose_ranges_clip_the_prefix():
    model = prefixed()
    ours = quantized(model, STATIC)
    layers = clipped_layers(without_prefix(ours), prefix_of(ours))
    assert layers[0] == [CLIPPED]
    fused = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert fused in layers  # they read the same tensor
    with pytest.raises(UserError, match=f"change the prefix most: --ignore {CLIPPED}$"):
        check_served_prefix(ours, model, windows())
    assert all(m.enabled for m in ours.modules() if hasattr(m, "enabled"))


def test_without_these_layers_the_prefix_works_from_tokens():
    model = prefixed()
    left = [name for name in linear_targets(model) if name != CLIPPED]
    check_served_prefix(quantized(model, STATIC, targets=left), model, windows())
    check_served_prefix(quantized(model, DYNAMIC), model, windows())


@pytest.fixture
def folder(tmp_path):
    prefixed().save_pretrained(tmp_path / "prefixed")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %} w3 {{ m.content }} w4{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "prefixed")
    words = " ".join(f"w{6 + 7 * i % (VOCABULARY - 6)}" for i in range(300))
    (tmp_path / "text.txt").write_text(words)
    return tmp_path


def run(folder, scheme, format="compressed-tensors", **options):
    common = {"calibration": str(folder / "text.txt"), "evaluation_split": "train"}
    common |= {"format": format, "window": 12, "windows": 4}
    with quiet():
        return quantize_checkpoint(
            folder / "prefixed", folder / "out", scheme=scheme, **common | options
        )


@pytest.mark.parametrize(
    ("scheme", "format"), [(STATIC, "compressed-tensors"), (DYNAMIC, "torchao")]
)
@torch.no_grad()
def test_the_folder_has_the_prefix_in_its_tokenizer(folder, scheme, format):
    if format == "torchao" and not has_int8_kernels():
        pytest.skip("torchao has no int8 kernels here")
    record = run(folder, scheme, format, ignore=[CLIPPED])
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    text = "w7 w8 w9"
    assert tokenizer(text).input_ids == [SINK, 7, 8, 9]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False)
    assert chat == [SINK, 3, 7, 8, 9, 4]
    stored = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == record.arithmetic == format
    assert CLIPPED in stored["modules_to_not_convert" if format == "torchao" else "ignore"]
    assert not (folder / "out" / "prefix").exists()
    assert f"tokens [{SINK}] of the prefix" in (folder / "out" / "README.md").read_text()

    with quiet():
        served = AutoModelForCausalLM.from_pretrained(folder / "out")
    corpus = load_corpus(str(folder / "text.txt"), "train")
    ids = read_windows(corpus, word_tokenizer(), window=12, windows=4).ids_NT
    model = prefixed()
    left = [name for name in linear_targets(model) if name != CLIPPED]
    seen = ids.split(1) if scheme.needs_calibration else None
    ours = quantize(model, scheme, targets=left, calibration=seen)(ids).logits
    found = served(torch.cat([torch.full((len(ids), 1), SINK), ids], 1)).logits[:, 1:]
    assert (found - ours).norm() < (ours - model(ids).logits).norm()
    _, after = record.before_after("perplexity.windowed")
    assert after == pytest.approx(float(token_losses(found, ids).mean().exp()), rel=1e-4)
    again = evaluate(
        folder / "out", corpus=str(folder / "text.txt"), split="train", window=12, limit=4
    )
    assert again["perplexity.windowed"] == pytest.approx(after, rel=1e-4)
    assert again.data["perplexity"]["prefix"] == (SINK,)


def test_a_prefix_in_bfloat16_is_served_too(folder):
    model = make().bfloat16()
    with_prefix(model, compute_prefix(model, [SINK])).save_pretrained(folder / "prefixed")
    run(folder, DYNAMIC)
    assert AutoTokenizer.from_pretrained(folder / "out")("w7").input_ids == [SINK, 7]


def test_by_default_a_prefix_that_would_be_clipped_stays_stored(folder):
    record = run(folder, STATIC, format="auto", simulate=True)
    assert record.arithmetic == "simulated"
    assert record.fallback.endswith(f"change the prefix most: --ignore {CLIPPED}")
    with quiet():
        assert prefix_of(AutoModelForCausalLM.from_pretrained(folder / "out")).tokens == (SINK,)


def test_what_cannot_be_served_is_refused_and_nothing_written(folder):
    with pytest.raises(UserError, match=f"--ignore {CLIPPED}$"):
        run(folder, STATIC)
    groups = {"weight.granularity": "group", "weight.group_size": 16}
    with pytest.raises(
        UserError, match=f"only be simulated.* add --simulate .*--ignore {CLIPPED}$"
    ):
        run(folder, STATIC.with_options(groups), format="auto")
    model = prefixed()
    stored = prefix_of(model)
    tuned = replace(stored, keys_LGPd=stored.keys_LGPd + 0.1)
    with_prefix(without_prefix(model), tuned).save_pretrained(folder / "prefixed")
    with pytest.raises(UserError, match="it was tuned"):
        run(folder, DYNAMIC)
    assert sorted(path.name for path in folder.iterdir()) == ["prefixed", "text.txt"]
