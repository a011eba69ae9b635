"""The page of one text: what it says, how large it is, and how it works in a browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from chromium import EXECUTABLE, chromium
from measure.models import native, ours, tokens
from oasis_attn import view
from oasis_attn.errors import UserError
from oasis_attn.measure.inspect_text import Inspection, Massive
from oasis_attn.records import ModelInfo
from oasis_attn.report.text_findings import massive_table, token_names
from oasis_attn.report.text_page import maps_bytes, text_page
from tiny_models import word_tokenizer

from .test_html import Balance

IDS = tokens(1, 24)[0].tolist()
needs_chromium = pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium")


def planted():
    """A model with a massive activation, and a null, routers and a null signal."""
    model = ours("oasis").float()
    model.model.embed_tokens.weight.data[IDS[0], 5] = 4e4
    return model


@pytest.fixture(scope="module")
def pages():
    """Pages of a model with all parts, and of one without null and routers."""
    vanilla = native("llama").float()
    return {"oasis": view(planted(), None, IDS), "vanilla": view(vanilla, None, IDS)}


def random_inspection(layers: int, heads: int, length: int) -> Inspection:
    """Attention maps that are hard to pack."""
    generator = np.random.default_rng(0)
    attention = np.tril(generator.random((layers, heads, length, length), np.float32))
    attention /= attention.sum(-1, keepdims=True)
    return Inspection(
        model=ModelInfo(name="m", family="f", architecture="M", parameters=1, dtype="float32"),
        ids=tuple(range(length)),
        prefix=(),
        attention_LHTS=attention,
        null_LHT=np.zeros((layers, heads, length), np.float32),
        image_norms_LHS=generator.random((layers, heads, length), np.float32),
        null_norms_LHT=np.zeros((layers, heads, length), np.float32),
        largest_LT=1e4 * generator.standard_normal((layers, length)).astype(np.float32),
        channels_LT=generator.integers(0, 576, (layers, length)),
        medians_L=np.ones(layers, np.float32),
        massive=(Massive(layer=0, position=0, channel=1, value=-2000.0),),
        depth=None,
        depth_off=None,
    )


# --- The page ------------------------------------------------------------------------------------


def test_a_page_is_one_file_without_links(pages, tmp_path):
    for page in pages.values():
        html = page.save(tmp_path / "view.html").read_text(encoding="utf-8")
        assert html == page.html
        assert not re.search(r"(?:src|href)=[\"']?http|@import|url\(|\bimport\b|fetch\(", html)
        balance = Balance()
        balance.feed(html.replace("<link", "<meta").replace("<input", "<meta"))
        assert balance.open == []
        assert balance.wrong == []


def test_the_findings_are_those_of_the_arrays(pages):
    page = pages["oasis"]
    found = page.inspection
    received_LHS = found.received_LHS()
    heads = int((received_LHS[..., 0] > 0.3).sum())
    share = received_LHS[..., 0].mean()
    heading, *rest = page.findings
    assert f"{heads} of 12 heads" in heading
    assert f"{100 * share:.0f} %" in heading or f"{100 * share:.1f} %" in heading
    (activations,) = (sentence for sentence in rest if "massive activations" in sentence)
    assert "in channel 5 of" in activations
    assert any("on the null option" in sentence for sentence in rest)
    assert any("null signal" in sentence for sentence in rest)
    assert f"<h1>{heading}</h1>" in page.html.replace("&nbsp;", " ")
    assert not any("null" in sentence for sentence in pages["vanilla"].findings)


def test_a_model_without_sinks_has_none():
    found = random_inspection(2, 3, 30)
    texts = [f" t{i}" for i in range(30)]
    heading, second, _ = text_page(found, texts, total=40).findings
    assert heading == "No token is an attention sink."
    layer, head, key = np.unravel_index(found.received_LHS().argmax(), (2, 3, 30))
    assert f"“t{key}” (token {key}) in layer {layer}, head {head}" in second


def test_a_median_of_zero_divides_nothing():
    found = replace(random_inspection(2, 3, 30), medians_L=np.zeros(2, np.float32))
    texts = [f" t{i}" for i in range(30)]
    page = text_page(found, texts, total=40)
    assert re.search(r"The largest is .*: the median is 0\.", page.findings[-1])
    assert massive_table(found, texts).rows[0][-1] == "-"
    assert "e+" not in page.html.split("<script")[0]


def test_causality_makes_the_first_tokens_of_a_short_text_sinks():
    found = random_inspection(2, 3, 4)
    found.attention_LHTS[:] = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    said = text_page(found, [f" t{i}" for i in range(4)], total=4).findings
    sink = "“t0” (token 0) is an attention sink in 6 of 6 heads"
    assert said[0] == f"{sink} and receives 52 % of all attention."
    assert said[2] == "The text is short: uniform attention would give it 52 %."


def test_the_size_of_a_page_has_a_bound():
    """5 MB for 256 tokens of 30 layers x 9 heads; other parts than maps grow with L (H + 1) T."""
    page = text_page(random_inspection(6, 4, 64), ["word"] * 64, total=64)
    beside = len(page.html.encode()) - 24 * len(json_of(page)["maps"][0])
    empty = 60_000
    assert beside <= empty + 6 * 4 * 64 * 5 + 6 * 64 * 16
    largest = max(len(text) for text in json_of(page)["maps"])
    assert 24 * largest <= maps_bytes(6, 4, json_of(page)["levels"], tokens=64)
    for passes in (0, 2):
        levels = 100 if passes else 200
        maps = maps_bytes(30, 9, levels, tokens=256, passes=passes)
        assert maps + empty + 30 * 9 * 256 * 5 + 30 * 256 * 16 < 5e6


def json_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html)
    return json.loads(text)


def test_a_page_that_would_be_too_large_is_refused_before_the_model_runs(monkeypatch):
    model = native("llama")
    monkeypatch.setattr(model.config, "num_hidden_layers", 99)
    monkeypatch.setattr(model.config, "num_attention_heads", 99)
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(UserError, match="tokens: 256 tokens of 99 layers x 99 heads could make"):
        view(model, None, [3] * 256)


def test_text_that_looks_like_html_is_text():
    word = "</script><b>&amp;"
    html = text_page(random_inspection(1, 1, 30), [word] * 30, total=30).html
    assert word not in html
    assert "<h1>No token" in html


def test_a_notebook_shows_the_page(pages):
    html = pages["oasis"]._repr_html_()
    assert html.startswith("<iframe title=")
    assert html.count("<") == 2
    assert "srcdoc=" in html


def test_tokens_have_names():
    assert token_names(["<s>", " a", "\n", "", " "], 2) == [
        "“<s>” (prefix 0)",
        "“a” (prefix 1)",
        "a line break (token 0)",
        "part of a character (token 1)",
        "a blank (token 2)",
    ]


def test_text_chat_and_ids():
    model, tokenizer = native("llama"), word_tokenizer()
    text = "w5 w6 w7 w8"
    assert view(model, tokenizer, text).inspection.ids == (5, 6, 7, 8)
    assert view(model, tokenizer, torch.tensor([5, 6])).inspection.ids == (5, 6)
    page = view(model, tokenizer, text, tokens=3)
    assert page.inspection.ids == (5, 6, 7)
    assert "the first 3 of 4 tokens" in page.html
    assert "“w5” (token 0)" in page.html
    chat = [{"role": "user", "content": text}]
    with pytest.raises(UserError, match="chat: the chat template failed"):
        view(model, tokenizer, chat)
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m.content }} w4{% endfor %}"
    assert view(model, tokenizer, chat).inspection.ids == (3, 5, 6, 7, 8, 4)
    for bad in (text, chat):
        with pytest.raises(UserError, match="tokenizer: None cannot read text"):
            view(model, None, bad)


def test_what_is_no_text_is_refused():
    model, tokenizer = native("llama"), word_tokenizer()
    for none in ("", []):
        with pytest.raises(UserError, match="text: 0 tokens; at least 2 are needed"):
            view(model, tokenizer, none)
    message = {"role": "user", "content": "w5 w6"}
    half = "w5 \ud800"
    for argument, bad in (("text", half), ("chat", [message | {"content": half}])):
        tokenizer.chat_template = "{{ messages[0].content }}"
        with pytest.raises(UserError, match=f"{argument}: character 3 is not Unicode"):
            view(model, tokenizer, bad)
    for bad in (None, ["w5", "w6"], [5, 6.5], message, [message, "w5"], torch.ones(2, 5).long()):
        with pytest.raises(UserError, match=r"text: this .* has neither token ids nor") as raised:
            view(model, tokenizer, bad)
        assert "\n" not in str(raised.value)


# --- In a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as page:
        yield page
        assert page.errors == []
        assert all(url.startswith("file:") for url in page.requests)


@pytest.fixture
def opened(browser, pages, tmp_path):
    """`opened(name, **how)`: the page in the browser."""

    def open_page(name="oasis", **how):
        browser.open(pages[name].save(tmp_path / f"{name}.html"), **how)
        return browser

    return open_page


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["oasis", "vanilla"])
def test_text_has_contrast_and_nothing_overflows_a_phone(opened, name, dark):
    page = opened(name, width=375, height=700, dark=dark)
    assert page.run("document.documentElement.scrollWidth") == 375
    kinds = ("received", "null", "read") if name == "oasis" else ("received", "read")
    for kind in kinds:
        page.run(f"document.querySelector('[name=text-color][value={kind}]').click()")
        count, failed = page.contrast()
        assert count > 60
        assert failed == []


@needs_chromium
def test_the_parts_of_a_model_without_null_and_routers_are_hidden(opened):
    shown = "document.querySelector('{}').checkVisibility()"
    for name in ("oasis", "vanilla"):
        page = opened(name)
        for part in ("#depth", "[name=signal] + span", "[value=null] + span"):
            assert page.run(shown.format(part)) == (name == "oasis")
        assert page.run(shown.format("#attention"))


@needs_chromium
def test_every_map_and_control_has_a_name(opened):
    page = opened()
    assert page.unnamed() == []
    assert page.run("document.querySelectorAll('canvas').length") == 3


@needs_chromium
def test_the_page_shows_the_numbers_of_the_arrays(opened, pages):
    page, found = opened(), pages["oasis"].inspection
    levels = page.run("data.levels")
    for layer, head in ((0, 0), (2, 3)):
        page.run(f"selectHead({layer}, {head})")
        rows = page.run("attention().map((row) => [...row])")
        for t, row in enumerate(rows):
            want = [found.null_LHT[layer, head, t], *found.attention_LHTS[layer, head, t, : t + 1]]
            np.testing.assert_allclose(row, want, atol=0.5 / levels + 1e-6)
        page.run("document.getElementById('weighted').click()")
        rows = page.run("attention().map((row) => [...row])")
        norms_S = found.image_norms_LHS[layer, head]
        for t, row in enumerate(rows):
            want = found.attention_LHTS[layer, head, t, : t + 1] * norms_S[: t + 1]
            assert row[0] == 0
            np.testing.assert_allclose(row[1:], want, atol=norms_S.max() / levels)
        page.run("document.getElementById('weighted').click()")
    for signal, depth in (("on", found.depth), ("off", found.depth_off)):
        rows = page.run(f"depthWeights('{signal}', 7).map((row) => [...row])")
        means = page.run(f"depthWeights('{signal}', 'mean').map((row) => [...row])")
        for row, mean, weights_TN in zip(rows, means, depth.weights, strict=True):
            np.testing.assert_allclose(row, weights_TN[7], atol=0.5 / levels + 1e-6)
            np.testing.assert_allclose(mean, weights_TN.mean(0), atol=0.5 / levels + 1e-6)


@needs_chromium
def test_the_mouse_selects_heads_tokens_and_cells(opened, pages):
    page, found = opened(), pages["oasis"].inspection
    page.click("#grid [role=row]:nth-child(3) button:nth-of-type(2)")
    assert page.text("#head-title") == "Layer 1, head 1"
    page.click("#tokens [role=option]:nth-child(5)")
    assert page.text("#reads-title").endswith("(token 4) reads")
    page.click("#attention", 0.01, 0.999)
    assert page.text("#reads-title").endswith("(token 23) reads")
    null = found.null_LHT[1, 1, 23]
    assert "(token 23) reads the null option: " in page.text("#attention-readout")
    assert abs(float(page.text("#attention-readout").split()[-2]) - 100 * null) < 1
    layer = found.massive[0].layer
    page.click("#activations", 0.03, (layer + 0.5) / 3)
    assert f"Layer {layer}, " in page.text("#activations-readout")
    assert "in channel 5 (massive: " in page.text("#activations-readout")
    page.click("label:has([name=signal][value=change])")
    assert "\N{MINUS SIGN}" in page.text("#depth-scale")
    page.click("label:has([name=head-color][value=null])")
    label = page.run("cells[0].getAttribute('aria-label')")
    assert label.startswith("layer 0, head 0: null probability ")


@needs_chromium
def test_the_keyboard_reaches_everything(opened):
    page = opened()
    page.run("document.body.focus()")
    reached = []
    for _ in range(40):
        page.press("Tab")
        reached.append(
            page.run(
                "(({ activeElement: e }) => e.id || e.name || e.getAttribute('role'))(document)"
            )
        )
    order = list(dict.fromkeys(reached))
    assert order[:4] == ["text-color", "option", "head-color", "weighted"]
    assert set(order) >= {"gridcell", "attention", "activations", "depth-token", "signal", "depth"}

    page.run("cells.find((cell) => cell.tabIndex === 0).focus()")
    page.press("Home", "ArrowDown", "ArrowRight")
    assert page.text("#head-title") == "Layer 1, head 1"
    page.press("End")
    assert page.text("#head-title") == "Layer 2, head 3"
    page.run("options.find((option) => option.tabIndex === 0).focus()")
    page.press("Home", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert page.text("#reads-title").endswith("(token 1) reads")
    page.run("document.getElementById('attention').focus()")
    page.press("End", "ArrowUp", "ArrowLeft")
    assert "(token 22) reads" in page.text("#attention-readout")
    assert "(token 21): " in page.text("#attention-readout")
    page.press("Enter")
    assert page.text("#reads-title").endswith("(token 22) reads")
    page.run("document.getElementById('weighted').focus()")
    page.press(" ")
    assert page.run("state.weighted") is True
