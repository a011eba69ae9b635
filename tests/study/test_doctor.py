"""The doctor on tiny models: one with nothing to cure, and one that static ranges break."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from example_records import diagnosis
from oasis_attn.cli import main
from oasis_attn.errors import UserError
from oasis_attn.quantization.remedies import REMEDIES
from oasis_attn.quantization.schemes import schemes
from oasis_attn.records import DoctorRecord, Metric, Record
from oasis_attn.report import conclusion
from oasis_attn.report.remedies import doctor_conclusion, doctor_table, increase, ranked
from oasis_attn.study import doctor as module
from oasis_attn.study.apply_remedy import steps
from oasis_attn.study.doctor import doctor
from tiny_models import tiny_config, word_tokenizer

WINDOW, WINDOWS = 32, 4
TEXT = {"calibration": "text", "window": WINDOW, "windows": WINDOWS}
NAMES = [remedy.name for remedy in REMEDIES]


def tiny() -> PreTrainedModel:
    """A model that is certain of its predictions, so that errors raise its perplexity."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", initializer_range=0.2)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    return model


def with_a_massive_token() -> PreTrainedModel:
    """BOS has a channel of its own, which one neuron of a layer turns into a huge value.

    The neuron writes only to that channel, which no other token has: static ranges must cover it,
    and nothing else depends on it.
    """
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 0
        model.model.embed_tokens.weight[1, 3] = 300
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[3] = 0
            layer.mlp.down_proj.weight[3] = 0
            layer.mlp.gate_proj.weight[0] = layer.mlp.up_proj.weight[0] = 0
            layer.mlp.gate_proj.weight[0, 3] = layer.mlp.up_proj.weight[0, 3] = 100
            layer.mlp.down_proj.weight[:, 0] = 0
            layer.mlp.down_proj.weight[3, 0] = 0.1
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model, and beside it a corpus that it has written."""
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    torch.manual_seed(1)
    begin = torch.ones(2 * WINDOWS, 1, dtype=torch.int64)
    ids = model.generate(
        begin, max_new_tokens=WINDOW - 1, min_new_tokens=WINDOW - 1, do_sample=True, top_k=0,
        bad_words_ids=[[1]],
    )  # fmt: skip
    for split, rows in (("train", ids[:WINDOWS]), ("test", ids[WINDOWS:])):
        words = " ".join(f"w{token}" for token in rows[:, 1:].flatten().tolist())
        (folder / "text" / f"{split}.txt").write_text(words)


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tiny(), tmp_path)


@pytest.fixture
def ill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(with_a_massive_token(), tmp_path)


def names(record: DoctorRecord) -> list[str]:
    return [tried.name for tried in record.tries]


@pytest.mark.usefixtures("healthy")
def test_a_model_without_outliers_has_nothing_to_cure() -> None:
    result = doctor("model", "out", **TEXT)
    assert names(result.record) == ["plain"]
    assert "sensitivity" not in result.record.tables
    assert conclusion(result.diagnosis)[0] == "No outlier breaks ranges of 8 bits."
    said = doctor_conclusion(result.diagnosis, result.record, NAMES)
    assert said[0] == "For w8a8-static-linear, there is nothing to cure."
    assert len(said) == 2
    (step,) = steps(result.record, Path("q"), TEXT)
    assert step.line == (
        "oasis quantize model --out q --scheme w8a8-static-linear"
        " --scheme-option weight.granularity=channel --calibration text --window 32 --windows 4"
        " --format oasis"
    )


@pytest.mark.usefixtures("ill")
def test_the_first_good_remedy_ends_the_visit() -> None:
    result = doctor("model", "out", **TEXT)
    record = result.record
    assert names(record) == ["plain", "dynamic"]
    plain, dynamic = (record.metric("doctor.increase", name).value for name in names(record))
    assert plain > 0.2
    assert dynamic < 0.05
    assert record["perplexity.windowed"] == result.diagnosis["perplexity.windowed"]
    table = record.tables["sensitivity"]
    assert min(table["all_but"][2:]) == table["all_but"][table["group"].index("mlp.down_proj")]

    first, second, third = conclusion(result.diagnosis)[:3]
    assert first.startswith("One token carries the outliers: 'w1' at position 0 reaches 128,")
    assert second.startswith("Static per-tensor ranges of 8 bits will break")
    assert third.startswith("Dynamic per-token ranges (")
    said = doctor_conclusion(result.diagnosis, record, NAMES)
    assert said[1].startswith("mlp.down_proj alone causes ")
    assert said[2].startswith("Within the limit: dynamic ranges (")
    assert said[-1].startswith("Not tried: a folded rotation, a rotation at run time, SmoothQuant,")
    assert [row[0] for row in doctor_table(record).rows] == ["full precision", "dynamic", "plain"]
    (step,) = steps(record, Path("q"), TEXT)
    assert "--scheme w8a8-dynamic --calibration" in step.line


@pytest.mark.usefixtures("ill")
def test_a_second_run_measures_only_what_is_missing(monkeypatch) -> None:
    first = doctor("model", "out", **TEXT)
    assert Record.load("out/record.json") == first.record
    assert Record.load("out/diagnosis.json") == first.diagnosis
    done: list[str] = []
    doctor("model", "out", **TEXT, progress=lambda step, *_: done.append(step))
    assert done == ["loading the model"]
    assert Record.load("out/record.json") == first.record

    Path("model").rename("moved")  # the commands read the model where it is now
    moved = doctor("moved", "out", **TEXT).record
    assert steps(moved, Path("q"), TEXT)[0].model == "moved"
    Path("moved").rename("model")

    Path("out/diagnosis.json").unlink()  # then only the model is diagnosed again
    again = doctor("model", "out", **TEXT)
    assert again.record == first.record
    assert again.diagnosis.metrics == first.diagnosis.metrics

    def interrupted(*_, **__) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "find_prefix", interrupted)
        with pytest.raises(KeyboardInterrupt):
            doctor("model", "out", **TEXT, try_all=True)
    assert names(DoctorRecord.load("out/record.json")) == ["plain", "dynamic"]
    result = doctor("model", "out", **TEXT, try_all=True, tolerance=0.5,
                    progress=lambda step, *_: done.append(step.partition(";")[0]))  # fmt: skip
    singles = ["dynamic", "prefix", "folded", "rotation", "smoothquant", "gptq"]
    assert names(result.record)[:7] == ["plain", *singles]
    assert result.record.metric("doctor.run_time_work", "folded").value == 0
    assert done[2:7] == [f"trying {name}" for name in singles[1:]]
    assert result.record.tries[:2] == first.record.tries
    assert result.record.tolerance == 0.5
    assert result.record.tries[2].problem.startswith("model: no prefix")
    assert "prefix" not in [tried.name for tried in ranked(result.record)]


@pytest.mark.usefixtures("healthy")
def test_results_of_another_run_are_refused() -> None:
    doctor("model", "out", **TEXT)
    before = Path("out/record.json").read_bytes()
    text = f"{WINDOWS} windows of {WINDOW} tokens of text"
    done: list[str] = []
    for changes, what in (
        ({"window": 16}, f"calibration text, {text} train"),
        ({"windows": WINDOWS - 1}, f"calibration text, {text} train"),
        ({"evaluation_split": "train"}, f"evaluation text, {text} test"),
        ({"scheme": "w4a4"}, "scheme, 'w8a8-static-linear, weight.granularity=channel'"),
        ({"seed": 1}, "seed, 0"),
    ):
        message = f"out: 'out' has results for another {what}; give a new folder"
        with pytest.raises(UserError, match=message):
            doctor("model", "out", **TEXT | changes, progress=lambda step, *_: done.append(step))
    assert done == []  # it is said before the model is loaded
    message = "out: 'out' has results for another model, 'model'; give a new folder"
    larger = tiny_config("llama", num_hidden_layers=3)
    for model in (tiny(), AutoModelForCausalLM.from_config(larger)):
        model.lm_head.weight.data.mul_(2)
        model.save_pretrained("other")
        word_tokenizer().save_pretrained("other")
        with pytest.raises(UserError, match=message):
            doctor("other", "out", **TEXT)
    Path("other/model.safetensors").unlink()  # the configuration tells another size apart
    with pytest.raises(UserError, match=message):
        doctor("other", "out", **TEXT)
    assert Path("out/record.json").read_bytes() == before


@pytest.mark.usefixtures("healthy")
def test_a_record_whose_tries_lack_numbers_is_refused() -> None:
    record = doctor("model", "out", **TEXT).record
    for metrics in ((), tuple(metric for metric in record.metrics if metric.where)):
        replace(record, metrics=metrics).save("out/record.json")
        with pytest.raises(UserError, match=r"out: 'out/record\.json' lacks numbers of its tries"):
            doctor("model", "out", **TEXT)


@pytest.mark.usefixtures("healthy")
def test_remedies_that_do_not_apply_are_not_proposed(monkeypatch, capsys) -> None:
    words = ["oasis", "doctor", "model", "--calibration", "text", "--scheme", "w4a8"]
    words += ["--window", str(WINDOW), "--windows", str(WINDOWS), "--tolerance", "0", "--json"]
    monkeypatch.setattr("oasis_attn.study.doctor.is_good", lambda _, tried: tried.name == "gptq")
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0
    said = " ".join(json.loads(capsys.readouterr().out)["conclusion"])
    assert "Not tried: " in said
    assert "dynamic ranges" not in said  # they are those of the scheme


@pytest.mark.usefixtures("healthy")
def test_a_folder_with_other_files_is_refused() -> None:
    with pytest.raises(UserError, match="out: 'model' exists"):
        doctor("model", "model", **TEXT)


def with_a_massive_position() -> PreTrainedModel:
    """As `with_a_massive_token`, for the first position, which a prefix takes over."""
    torch.manual_seed(0)
    config = tiny_config(
        "opt", ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2, init_std=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = model.get_decoder()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        decoder.embed_tokens.weight[:, 3] = 0
        decoder.embed_positions.weight.mul_(0.1)
        decoder.embed_positions.weight[:, 3] = 0
        decoder.embed_positions.weight[2, 3] = 300
        for layer in decoder.layers:
            layer.self_attn.out_proj.weight[3] = 0
            layer.fc1.weight[0] = 0
            layer.fc1.weight[0, 3], layer.fc1.bias[0] = 1000, -3000
            layer.fc2.weight[3] = layer.fc2.weight[:, 0] = 0
            layer.fc2.weight[3, 0] = 1
    return model


@pytest.mark.parametrize(
    ("model", "scheme", "best"),
    [(with_a_massive_position, "w8a8-static-linear", "prefix"), (tiny, "w4a4", "gptq")],
)
def test_the_commands_give_the_measured_perplexity(
    tmp_path, monkeypatch, model, scheme, best
) -> None:
    monkeypatch.chdir(tmp_path)
    save(model(), tmp_path)
    arguments = TEXT | {"evaluation_split": "train"}
    record = doctor("model", "out", scheme=scheme, tolerance=2.0, try_all=True, **arguments).record
    first = ranked(record)[0]
    assert best in first.name.split("+")
    found = steps(record, Path("q"), arguments)
    assert len(found) == 1 + bool(first.prefix)
    for step in found:
        words = shlex.split(step.line)
        if step.command == "quantize" and "--simulate" not in words:
            words.append("--simulate")  # the kernels round differently
        monkeypatch.setattr("sys.argv", words)
        assert main() == 0
    applied = Record.load("q/record.json")
    expected = record.metric("perplexity.windowed", first.name).value
    assert applied.metric("perplexity.windowed", "after").value == pytest.approx(expected, rel=1e-6)
    assert applied.scheme == first.scheme | {"name": applied.scheme["name"]}
    assert applied.prefix == first.prefix


@pytest.mark.usefixtures("healthy")
def test_the_commands_of_the_docs(monkeypatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("oasis doctor ")]
    assert len(commands) == 2
    words = ["--calibration", "text", "--window", str(WINDOW), "--windows", str(WINDOWS)]
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command.replace("smollm2", "model")) + words)
        assert main() == 0
    assert Record.load("quantized/record.json").kind == "quantization"


def test_what_helps_is_combined_if_nothing_is_good(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(with_a_massive_position(), tmp_path)
    record = doctor("model", "out", tolerance=0.0, try_all=True, **TEXT).record
    found = {tried.name: increase(record, tried) for tried in record.tries if not tried.problem}
    singles = {name: value for name, value in found.items() if "+" not in name}
    helped = sorted((x for x in singles if singles[x] < singles["plain"]), key=lambda x: singles[x])
    assert {"smoothquant", "rotation", "prefix"} < set(helped)
    best, *rest = helped
    combined = set()
    for name in rest:
        together = f"{best}+{name}"
        if not {"smoothquant", "rotation"} <= set(together.split("+")):  # they exclude each other
            combined.add(together)
            if found[together] < found[best]:
                best = together
    assert combined
    assert combined == found.keys() - singles.keys()
    assert found[best] == min(found.values())


@pytest.mark.usefixtures("healthy")
def test_the_command(monkeypatch, capsys) -> None:
    words = ["oasis", "doctor", "model", "--apply", "q", "--calibration", "text"]
    words += ["--window", str(WINDOW), "--windows", str(WINDOWS)]
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0
    out = capsys.readouterr().out
    assert "No outlier breaks ranges of 8 bits." in out
    assert out.count("there is nothing to cure.") == 1
    command = out.splitlines()[-1]
    assert command.startswith("oasis quantize model --out q --scheme w8a8-static-linear")
    assert Record.load("q/record.json").kind == "quantization"
    monkeypatch.setattr("sys.argv", words)
    assert main() == 2
    assert capsys.readouterr().err.startswith("oasis: --apply: 'q' exists")
    monkeypatch.setattr("sys.argv", [*words[:4], "./new", "--out", "new", *words[5:]])
    assert main() == 2
    assert capsys.readouterr().err.startswith("oasis: --apply: 'new' is the folder of the records")
    assert not Path("new").exists()
    monkeypatch.setattr("sys.argv", [*words[:3], *words[5:], "--json"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["diagnosis", "conclusion", "commands", "record"]
    assert found["commands"] == [command.replace("--out q", "--out doctor-model/quantized")]
    assert found["record"] == json.loads(Path("doctor-model/record.json").read_text())


@pytest.mark.parametrize(
    ("static", "dynamic", "rest", "expected"),
    [
        (0.0, 0.0, 0.0, "dynamic folded rotation smoothquant prefix gptq"),
        (2.0, 0.0, 0.0, "dynamic prefix folded rotation smoothquant gptq"),
        (2.0, 0.0, 2.0, "dynamic folded rotation smoothquant prefix gptq"),
        (2.0, 2.0, 0.0, "prefix dynamic folded rotation smoothquant gptq"),
        (2.0, 2.0, 2.0, "folded rotation smoothquant dynamic prefix gptq"),
    ],
)
def test_what_the_diagnosis_promises_is_tried_first(static, dynamic, rest, expected) -> None:
    noise = {"static": static, "dynamic": dynamic, "static_rest": rest}
    found = diagnosis(metrics=[Metric(name=f"range.noise_{k}", value=v) for k, v in noise.items()])
    ordered = module._ordered(schemes()["w8a8-static-linear"], found)
    assert [remedy.name for remedy in ordered] == expected.split()
