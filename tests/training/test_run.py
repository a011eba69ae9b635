from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback

import oasis_attn
from oasis_attn import SinkCallback, diagnose
from oasis_attn.errors import UserError
from oasis_attn.hub.model_card import variant_of
from oasis_attn.modeling.null_logit import LOG_CONTEXT_MARGIN
from oasis_attn.records import TrainingRecord
from oasis_attn.training import TrainingConfig, train
from oasis_attn.training import run as run_module
from oasis_attn.training.prepare import prepare
from oasis_attn.training.trainer import OasisTrainer
from tiny_models import tiny_config

# Loss at steps 1, 5, 9, 13, 17.
GOLDEN = {
    "vanilla": [5.59584, 4.33559, 3.14531, 2.72354, 2.75563],
    "oasis": [5.59528, 4.31518, 3.12638, 2.71619, 2.75187],
}


def losses(record: TrainingRecord) -> list[float]:
    return [row["loss"] for row in record.tables["loss"]]


def quiet(config) -> TrainingRecord:
    return train(config, progress=False)


def fail_at(monkeypatch, step: int, error: BaseException) -> None:
    """Let a run stop in its step after `step`."""
    original = OasisTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(OasisTrainer, "training_step", training_step)


@pytest.fixture(scope="module")
def reference():
    """The losses of runs never interrupted, by variant, each run once."""
    found: dict[str, list[float]] = {}

    def of(config: TrainingConfig) -> list[float]:
        if config.variant not in found:
            found[config.variant] = losses(quiet(config))
        return found[config.variant]

    return of


@pytest.mark.parametrize("variant", ["vanilla", "oasis"])
def test_golden_losses(configure, reference, variant):
    found = reference(configure(variant=variant))
    assert len(found) == 20
    assert found[::4] == pytest.approx(GOLDEN[variant], abs=2e-3)


@pytest.mark.parametrize("variant", ["oasis", "oasis_signal_shuffled"])
def test_same_seed_same_losses_bit_for_bit(configure, reference, variant):
    expected = reference(configure(variant=variant))
    torch.manual_seed(77)
    again = quiet(configure("again", variant=variant))
    assert losses(again) == expected
    assert losses(quiet(configure("other", variant=variant, seed=1, steps=2))) != expected[:2]


@pytest.mark.parametrize("variant", ["oasis", "oasis_signal_shuffled"])
def test_resumed_losses_are_the_uninterrupted_ones(configure, reference, variant, monkeypatch):
    config = configure("stopped", variant=variant)
    with monkeypatch.context() as patch:
        fail_at(patch, 14, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quiet(config)
    names = sorted(path.name for path in (config.out / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-12", "checkpoint-8"]
    assert not (config.out / "config.json").exists()
    with pytest.raises(UserError, match=r"out: .* exists"):
        quiet(config)
    resumed = quiet(configure("stopped", variant=variant, resume=True))
    assert losses(resumed) == reference(configure(variant=variant))
    again = quiet(configure("stopped", variant=variant, resume=True))
    assert again.created == resumed.created


def test_resume_across_epochs_and_accumulation(configure, monkeypatch):
    many = {"batch_size": 64, "gradient_accumulation": 3, "steps": 6, "save_every": 2}
    whole = quiet(configure("whole", **many))
    with monkeypatch.context() as patch:
        fail_at(patch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quiet(configure("stopped", **many))
    resumed = quiet(configure("stopped", **many, resume=True))
    assert losses(resumed) == losses(whole)
    assert whole.data.train.blocks < 64 * 3 * 6


def test_stopped_while_saving(configure, reference, monkeypatch):
    config = configure("stopped")
    original = OasisTrainer._save_optimizer_and_scheduler

    def stop(self, output_dir):
        if self.state.global_step == 12:
            raise KeyboardInterrupt
        original(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(OasisTrainer, "_save_optimizer_and_scheduler", stop)
        with pytest.raises(KeyboardInterrupt):
            quiet(config)
    assert (config.out / "checkpoints" / ".staged" / "checkpoint-12").is_dir()
    names = sorted(path.name for path in (config.out / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-4", "checkpoint-8"]
    assert losses(quiet(configure("stopped", resume=True))) == reference(configure())


def test_watched_losses_are_the_same_and_reach_the_service(configure, reference, monkeypatch):
    logged, folders = {}, []

    class Service(TensorBoardCallback):
        def __init__(self):
            self.logging_dir = None

        def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
            folders.append(self.logging_dir)
            assert args.run_name == "watched"

        def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
            if "sink.mass" in logs:
                logged[state.global_step] = logs

        def on_train_end(self, args, state, control, **kwargs):
            pass

    monkeypatch.setattr("oasis_attn.training.config.distribution", lambda name: name)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Service)
    config = configure("watched", report_to="tensorboard")
    record = train(config, progress=False, callbacks=[partial(SinkCallback, every=5)])
    assert losses(record) == reference(configure())
    assert "report_to" not in record.training
    assert list(logged) == [0, 5, 10, 15, 20]
    assert folders == [str(config.out / "tensorboard")]
    blocks = prepare(configure("again"), 1).blocks
    expected = diagnose(AutoModelForCausalLM.from_pretrained(config.out), blocks[0][None])
    for name in ("sink.mass", "null.mass", "outlier.avg_kurtosis", "loss.windowed"):
        assert logged[20][name] == pytest.approx(expected[name], rel=1e-6)


def test_stopped_before_the_first_checkpoint(configure, reference, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quiet(configure("stopped"))
    assert losses(quiet(configure("stopped", resume=True))) == reference(configure())


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    configure, reference, monkeypatch
):
    original = OasisTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 9 else loss

    with monkeypatch.context() as patch:
        patch.setattr(OasisTrainer, "compute_loss", broken)
        with pytest.raises(UserError, match="not finite at step 10"):
            quiet(configure("stopped"))
    assert losses(quiet(configure("stopped", resume=True))) == reference(configure())


def test_variants_see_the_same_batches(configure, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    for variant in ("vanilla", "oasis_signal_shuffled", "gated_attention"):
        batches = seen.setdefault(variant, [])

        def spy(blocks, batches=batches, original=run_module.collate):
            batches.append(original(blocks)["input_ids"])
            return original(blocks)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "collate", spy)
            quiet(configure(variant, variant=variant, steps=4))
    first, *others = seen.values()
    assert len(first) >= 4
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_the_length_of_clipped_softmax_is_by_default_the_block_length(configure):
    model = prepare(configure(variant="clipped_softmax")).model
    expected = {"name": "clipped_softmax", "alpha": 3, "length": 32}
    assert model.config.token_normalizer == expected
    assert variant_of(model.config) == "clipped_softmax"


@pytest.mark.parametrize(("length", "expected"), [({}, 32), ({"length": 9}, 9)])
def test_the_length_of_log_context_is_by_default_the_block_length(length, expected, configure):
    settings = {"null_logit": {"name": "log_context"} | length}
    model = prepare(configure(variant="softmax1", settings=settings)).model
    assert model.config.null_logit == math.log(expected) + LOG_CONTEXT_MARGIN


def test_folder_and_record(configure):
    config = configure(settings={"depth_block_size": 2}, steps=5, log_every=2, seed=3)
    record = quiet(config)
    loaded = TrainingRecord.load(config.out / "record.json")
    assert loaded.metrics == record.metrics
    assert record.kind == "training"
    assert record.seed == 3
    assert record.model.config["depth_block_size"] == 2
    assert record["perplexity.windowed"] == pytest.approx(math.exp(record["loss.windowed"]))
    assert record["training.tokens_per_second"] > 0
    assert [row["step"] for row in record.tables["loss"]] == [2, 4, 5]
    assert record.tables["loss"][-1]["learning_rate"] < record.tables["loss"][0]["learning_rate"]
    assert record.tables["loss"][-1]["null_logit"] == 0

    model = AutoModelForCausalLM.from_pretrained(config.out)
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    assert isinstance(model, oasis_attn.OasisForCausalLM)
    assert model.config.settings == record.model.config
    assert model.num_parameters() == record.model.parameters
    assert tokenizer.bos_token_id == 0
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.use_cache
    assert not (config.out / ".staged").exists()


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_final_loss_is_that_of_the_saved_model(family, configure, corpus, tmp_path):
    from oasis_attn.data import load_corpus, read_windows

    tiny_config(family, pad_token_id=None).save_pretrained(tmp_path / "size")
    normalizer = {"token_normalizer": "learned_sink"} if family == "gpt_oss" else {}
    config = configure(steps=3, size=str(tmp_path / "size"), settings=normalizer)
    record = quiet(config)
    model = AutoModelForCausalLM.from_pretrained(config.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    windows = read_windows(load_corpus(corpus, "validation"), tokenizer, window=32, windows=4)
    assert record.data.eval == windows.info
    tokens_NT = windows.ids_NT
    with torch.inference_mode():
        logits_NTV = model(tokens_NT).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits_NTV.flatten(0, 1), tokens_NT[:, 1:].flatten()
    )
    assert record["loss.windowed"] == pytest.approx(expected.item(), rel=1e-5)


def test_bos_row_is_drawn_and_trained(configure):
    config = configure(steps=3)
    quiet(config)
    model = AutoModelForCausalLM.from_pretrained(config.out)
    assert model.model.embed_tokens.padding_idx is None
    assert model.model.embed_tokens.weight[0].abs().max() > 0


def test_only_matrices_decay_and_no_depth_router(configure, monkeypatch):
    groups: dict[float, set[str]] = {}
    original = OasisTrainer.create_optimizer

    def spy(self, *args, **kwargs):
        optimizer = original(self, *args, **kwargs)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            groups[group["weight_decay"]] = {names[id(p)] for p in group["params"]}
        return optimizer

    monkeypatch.setattr(OasisTrainer, "create_optimizer", spy)
    quiet(configure(steps=1, settings={"output_gate": "head"}))
    assert all(
        name.endswith(("embed_tokens.weight", "proj.weight", "gate.weight")) for name in groups[0.1]
    )
    assert all("norm" in name or "depth" in name or "bias" in name for name in groups[0.0])
    assert any("depth" in name for name in groups[0.0])


def test_bf16_and_accumulation_learn(configure):
    record = quiet(configure(bf16=True, gradient_accumulation=2, batch_size=2))
    assert losses(record)[-1] < losses(record)[0] - 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": "stdlb"}, "did you mean 'stdlib'"),
        ({"eval_split": "test"}, "is not one of train, validation"),
        ({"block_length": 257}, "block_length: 257 tokens are more than the model's 256 positions"),
        ({"batch_size": 100_000}, "batch_size: a step needs 100000 sequences"),
        ({"vocab_size": 100}, "vocab_size: 100"),
        ({"corpus": "majority-64"}, "block_length: 32 is not 64, the number of tokens"),
        ({"corpus": "majority-32"}, "vocab_size: 270 is not 140, the number of words"),
        ({"resume": True}, "contains no run to resume"),
        ({"variant": "vanilla", "learning_rates": {"beta": 0.1}}, "of the group 'beta'"),
    ],
)
def test_bad_input_writes_nothing(configure, change, message):
    config = configure(**change)
    with pytest.raises(UserError, match=message) as caught:
        quiet(config)
    assert "\n" not in str(caught.value)
    assert not config.out.exists()


def test_resuming_something_else(configure):
    quiet(configure(steps=2))
    for change, message in [
        ({"variant": "vanilla"}, "has variant 'oasis', but this run has 'vanilla'"),
        ({"steps": 3}, "has steps 2, but this run has 3"),
        ({"settings": {"depth_block_size": 2}}, "has settings {}"),
    ]:
        with pytest.raises(UserError, match=message):
            quiet(configure(**{"steps": 2} | change, resume=True))


def test_progress_is_told_line_by_line_where_there_is_no_terminal(configure, capsys):
    train(configure(steps=10))
    *lines, end = capsys.readouterr().err.splitlines()
    assert end.startswith("train oasis: measuring the loss")
    assert len(lines) == 10
    assert lines[-1].startswith("train oasis: step 10 of 10  loss ")
    assert lines[-1].endswith("tokens/s")
    assert not capsys.readouterr().out
