"""The code next to a model computes the same in a process that cannot import this library."""

import ast
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from oasis_attn import UserError, register_null_signal
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_code import AUTO_MAP, check_code, model_code
from oasis_attn.hub.model_info import fingerprint
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.ops import compiled
from oasis_attn.quantization import quantize
from tiny_models import cast, greedy, tiny_config, tiny_model, word_tokenizer

NULLS = {"name": "key_value_null", "nulls": 2}
CASES = {
    "oasis": {},
    "blocks": {"variant": "oasis_block", "mix_scale": "rms", "branch_norm": "rms_mlp"},
    "official": {"variant": "official"},
    "averaged": {"null_signal": "averaged", "depth_normalizer": "sigmoid"},
    "nulls": {"token_normalizer": NULLS, "null_logit": "log_context"},
    "sum": {"variant": "softmax1", "token_normalizer": "value_null", "output_gate": "elementwise"},
    "clipped": {"variant": "clipped_softmax"},
    "entmax15": {"variant": "entmax15"},
    "gpt_oss": {"family": "gpt_oss", "token_normalizer": "learned_sink"},  # sinks and experts
    "gemma2": {"family": "gemma2"},  # soft caps, four norms
    "mixtral": {"family": "mixtral"},  # converted weights
    "deepseek_v3": {"family": "deepseek_v3", "token_normalizer": "key_null"},
}
READER = """
import sys, torch
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "oasis_attn":
            raise ModuleNotFoundError("oasis_attn is blocked")
sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(folder, **how):
    how = {"dtype": "auto", "device_map": "cpu"} | how
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how).eval()

def results(model, ids, mask):
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask}
        return model(**given).logits, model.generate(
            **given, max_new_tokens=6, min_new_tokens=6, do_sample=False
        )

ids, mask = torch.load("ids.pt")
found, models = {}, {}
for name in sys.argv[1:]:
    model = models[name] = load(f"{name}/model")
    model.set_experts_implementation("eager")  # the others have no float64
    found[name] = results(model, ids, mask)
first = models["oasis"]
found["maps"] = first(ids, output_attentions=True).attentions
first.gradient_checkpointing_enable()
first.train()(ids, labels=ids).loss.backward()
found["gradients"] = {name: x.grad for name, x in first.named_parameters()}
first.eval().save_pretrained("again")
found["again"] = results(load("again"), ids, mask)  # it has a copy of the code of its own
found["clipped, then"] = results(models["clipped"], ids, mask)
found["bfloat16"] = load("oasis/model", dtype=torch.bfloat16)(ids).logits
try:
    load("oasis/model", attn_implementation="sdpa")
except ValueError as error:
    found["sdpa"] = str(error)
tokenizer = AutoTokenizer.from_pretrained("oasis/model", trust_remote_code=True)
found["tokens"] = tokenizer("w5 w6").input_ids
assert not [name for name in sys.modules if name.split(".")[0] == "oasis_attn"]
torch.save(found, "found.pt")
"""


def with_code(model):
    model.config.auto_map = dict(AUTO_MAP)
    return model


def test_another_process_computes_the_same_bits(tmp_path, ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    torch.save((ids, mask), tmp_path / "ids.pt")
    for name, settings in CASES.items():
        model = with_code(tiny_model(dtype=torch.float64, **settings))
        model.save_pretrained(tmp_path / name / "model")
    word_tokenizer().save_pretrained(tmp_path / "oasis" / "model")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = [sys.executable, "-c", READER, *CASES]
    done = subprocess.run(
        run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt")
    models = {}
    for name in CASES:
        model = OasisForCausalLM.from_pretrained(tmp_path / name / "model", dtype="auto")
        models[name] = cast(model, torch.float64).eval()
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
            tokens = greedy(model, ids, attention_mask=mask)
        assert torch.equal(found[name][0], logits), name
        assert torch.equal(found[name][1], tokens), name
    model = models["oasis"]
    assert all(map(torch.equal, found["again"], found["oasis"]))
    assert all(map(torch.equal, found["clipped, then"], found["clipped"]))
    assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == sorted(model_code())
    assert all(map(torch.equal, found["maps"], model(ids, output_attentions=True).attentions))
    model.train()(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(found["gradients"][name], parameter.grad), name
    assert found["bfloat16"].dtype == torch.bfloat16
    low = OasisForCausalLM.from_pretrained(tmp_path / "oasis" / "model", dtype=torch.bfloat16)
    torch.testing.assert_close(found["bfloat16"], low(ids).logits, rtol=0, atol=0)
    assert "'sdpa' has no null option" in found["sdpa"]
    assert found["tokens"] == word_tokenizer()("w5 w6").input_ids


def test_the_files_are_complete_and_import_nothing_of_ours(tmp_path):
    files = model_code()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, name
        needed = set(get_imports(tmp_path / name)) - sys.stdlib_module_names
        assert needed <= {"torch", "transformers", "huggingface_hub"}, name
        assert text.startswith("# From oasis_attn.")
        assert "Apache License" in text
    entry = tmp_path / "modeling_oasis.py"  # transformers copies what it finds from here
    copied = {os.path.basename(path) for path in get_relative_import_files(entry)}
    assert copied | {entry.name} == set(files)


def test_without_compiled_kernels():
    """Every function of `compiled` says that there is none."""
    tree = ast.parse(model_code()["oasis_ops_compiled.py"])
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions
    for function in functions:
        assert hasattr(compiled, function.name)
        assert ast.unparse(function.body[-1]) == "return None"


def test_this_library_prefers_its_own_classes(tmp_path, monkeypatch):
    """It runs none of the code, and saves it again."""
    model = with_code(tiny_model())
    word_tokenizer().save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "a")
    assert "path_or_name, trust_remote_code=True" in (tmp_path / "a" / "README.md").read_text()
    (tmp_path / "a" / "modeling_oasis.py").write_text("raise SystemExit('it was run')")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks"))
    for trust in (None, True):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=trust)
        assert type(loaded) is OasisForCausalLM
    loaded, _ = load_model(tmp_path / "a")
    before = fingerprint(loaded)
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "modeling_oasis.py").read_text() == model_code()["modeling_oasis.py"]
    quantize(loaded, "w8a8-dynamic").save_pretrained(tmp_path / "c")  # only this library loads it
    assert not [*(tmp_path / "c").glob("*.py")]
    assert "auto_map" not in (tmp_path / "c" / "config.json").read_text()
    del loaded.config.auto_map
    assert fingerprint(loaded) == before


@pytest.mark.usefixtures("own_extensions")
def test_what_has_no_code_is_refused():
    quantized = quantize(tiny_model(), "w8a8-dynamic").config
    register_null_signal("largest", lambda null_BHT, _layer: null_BHT.amax(1))
    for config, message in (
        (tiny_config("qwen3"), "family 'qwen3' is one of transformers, which needs no code"),
        (quantized, "quantized or has a prefix"),
        (tiny_model(null_signal="largest").config, "null_signal 'largest' is from an extension"),
    ):
        with pytest.raises(UserError, match=message):
            check_code(config)
