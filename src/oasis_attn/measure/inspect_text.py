"""What a page shows about one text: attention maps, activations and depth weights of a model.

`diagnose` reduces every tensor at once, for any amount of text.  `inspect_text` stores the maps of
one text of a few hundred tokens.

Axes: L layers, H heads, T tokens, P prefix tokens, S = P + T keys, d head width, D width, R depth
routers, N sources of a router.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.hub.model_info import check_lengths, describe_model, eval_mode
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.measure.hooks import HookPoint, attention_layers, check_output, find_hook_points
from oasis_attn.measure.outliers import massive
from oasis_attn.measure.sinks import check_calls, value_images
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.depth_cache import RouterCall, null_signal_off, observe_depth
from oasis_attn.records import ModelInfo

_POSITIONS = 32  # value_images computes [positions, H, D] at once


@dataclass(frozen=True, kw_only=True)
class Massive:
    """A massive activation of a layer's output: see `outliers.massive`."""

    layer: int
    position: int
    channel: int
    value: float


@dataclass(frozen=True, kw_only=True, eq=False)
class DepthWeights:
    """The depth routing of one forward pass.

    Attributes:
        routers: index of each router; it reads the outputs of sublayers 0 (the embedding) to r.
        weights: alpha of each router, [T, N] float32; N grows with the routers.
        null_RT: the depth null probability, float32; 0 without a null.
    """

    routers: tuple[int, ...]
    weights: tuple[np.ndarray, ...]
    null_RT: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """The results of one text of T tokens.  Arrays are float32 unless stated.

    Attributes:
        model: the description of the model.
        ids: the T token ids.
        prefix: the P token ids of the model's stored prefix, which every token attends to.
        attention_LHTS: probability of each key; the keys of the prefix come first.  A row sums to
            1 - null.
        null_LHT: the null probability; 0 without a null option.
        image_norms_LHS: ||f_h(x_j)||, the norm of the value of key j times the output projection
            (`value_images`).  Times p_j, it is the norm of what head h reads from key j.
        null_norms_LHT: the norm of what head h reads from the null; 0 if the null has no value.
        largest_LT: the entry of each layer's output with the largest absolute value.
        channels_LT: its channel, int64.
        medians_L: the median absolute value of each layer's output.
        massive: the massive activations, by layer, position and channel.
        depth: the depth routing; None for a model without routers.
        depth_off: the same, of a second forward pass with the null signal off; None for a model
            without a null signal.
    """

    model: ModelInfo
    ids: tuple[int, ...]
    prefix: tuple[int, ...]
    attention_LHTS: np.ndarray
    null_LHT: np.ndarray
    image_norms_LHS: np.ndarray
    null_norms_LHT: np.ndarray
    largest_LT: np.ndarray
    channels_LT: np.ndarray
    medians_L: np.ndarray
    massive: tuple[Massive, ...]
    depth: DepthWeights | None
    depth_off: DepthWeights | None

    @property
    def has_null(self) -> bool:
        """Whether attention has a null option that is used."""
        return bool(self.null_LHT.any())

    def received_LHS(self, *, weighted: bool = False) -> np.ndarray:
        """The received attention of each key in each head: its probability, mean over the queries.

        Args:
            weighted: the share of p_j ||f(x_j)|| in the sum over all keys and the null instead.
        """
        received_LHS = self.attention_LHTS.mean(2)
        if weighted:
            received_LHS *= self.image_norms_LHS
            total_LH = received_LHS.sum(-1) + self.null_norms_LHT.mean(-1)
            received_LHS /= np.maximum(total_LH, np.finfo(np.float32).tiny)[..., None]
        return received_LHS


def inspect_text(model: PreTrainedModel, ids: Sequence[int]) -> Inspection:
    """Run `model` on one text and return what its page shows.

    Args:
        model: as for `diagnose`; it runs in eval mode and is not changed.
        ids: at least 2 token ids.

    Raises:
        UserError: fewer than 2 tokens, more than the model has positions, or one outside its
            vocabulary; a model whose layers, attention, MLPs or norms were not found, or a layer
            whose output is not finite.
    """
    recorder = _Recorder(model, find_hook_points(model), _checked(model, ids))
    prefix, config = prefix_of(model), model.config
    with eval_mode(model), torch.no_grad():
        depth, depth_off = recorder.run(), None
        if isinstance(config, OasisConfig) and config.null_signal != "off":
            with null_signal_off(model):
                depth_off = recorder.run_depth()
    return Inspection(
        model=describe_model(model),
        ids=tuple(int(token) for token in ids),
        prefix=() if prefix is None else prefix.tokens,
        attention_LHTS=recorder.stacked("attention"),
        null_LHT=recorder.stacked("null"),
        image_norms_LHS=recorder.stacked("image_norms"),
        null_norms_LHT=recorder.stacked("null_norms"),
        largest_LT=recorder.stacked("largest"),
        channels_LT=recorder.stacked("channels"),
        medians_L=recorder.stacked("medians"),
        massive=tuple(recorder.massive),
        depth=depth,
        depth_off=depth_off,
    )


class _Recorder:
    """Records forward passes of one text."""

    def __init__(self, model: PreTrainedModel, points: list[HookPoint], ids_1T: Tensor) -> None:
        self._model, self._ids_1T = model, ids_1T
        self._layers = [point for point in points if point.kind == "layer"]
        attention = attention_layers(points)
        for layer, point in enumerate(self._layers):
            if layer not in attention or not attention[layer].projects_heads:
                raise UserError(
                    f"model: family {model.config.model_type!r} cannot be inspected: {point.name}"
                    " has no softmax attention with an output projection that was found"
                )
        self._projections = [attention[layer].module for layer in range(len(self._layers))]
        self._found: dict[str, dict[int, Tensor]] = {}
        self.massive: list[Massive] = []

    def run(self) -> DepthWeights | None:
        """Record everything in one forward pass."""
        calls: Counter[int] = Counter()

        def on_attention(call: AttentionCall) -> None:
            calls[call.layer] += 1
            if call.layer < len(self._projections):  # otherwise `check_calls` raises an error
                self._on_attention(call)

        with ExitStack() as stack:
            stack.enter_context(observe_attention(self._model, on_attention))
            for point in self._layers:
                handle = point.module.register_forward_hook(
                    lambda _module, _inputs, output, point=point: self._on_layer(point, output)
                )
                stack.callback(handle.remove)
            # The output of a null with a value is computed only together with the attention map.
            depth = (
                self.run_depth(output_attentions=True) if self._null_values else self.run_depth()
            )
        check_calls(self._model, calls, range(len(self._projections)))
        return depth

    def run_depth(self, **arguments: Any) -> DepthWeights | None:
        """Run a forward pass, and return its depth routing."""
        routers: list[RouterCall] = []
        with observe_depth(self._model, routers.append):
            self._model(input_ids=self._ids_1T, use_cache=False, **arguments)
        if not routers:
            return None
        return DepthWeights(
            routers=tuple(call.router for call in routers),
            weights=tuple(_array(call.weights_BTS[0]) for call in routers),
            null_RT=np.stack([_array(call.null_BT[0]) for call in routers]),
        )

    def stacked(self, name: str) -> np.ndarray:
        """The arrays of all layers; the first axis is L."""
        return np.stack([_array(x) for _, x in sorted(self._found[name].items())])

    @property
    def _null_values(self) -> bool:
        return any(getattr(x.module, "null_value", None) is not None for x in self._layers)

    def _record(self, layer: int, **values: Tensor) -> None:
        for name, value in values.items():
            self._found.setdefault(name, {})[layer] = value

    def _on_attention(self, call: AttentionCall) -> None:
        if call.value_BGSd.shape[2] < call.rows(0, 1).shape[-1]:
            raise UserError(
                f"model: family {self._model.config.model_type!r} cannot be inspected: its"
                " attention does not use the interface of transformers, so that its values are not"
                " known"
            )
        heads, length = call.query_BHTd.shape[1:3]
        value_SGd = call.value_BGSd[0].transpose(0, 1)
        value_SHd = value_SGd.repeat_interleave(heads // value_SGd.shape[1], dim=1)
        null_norms_HT = torch.zeros_like(call.null_BHT[0])
        if call.null_output_BHTd is not None:
            null_THd = call.null_output_BHTd[0].transpose(0, 1).to(value_SHd.dtype)
            null_norms_HT = self._norms(call.layer, null_THd)
        self._record(
            call.layer,
            attention=call.rows(0, length)[0],
            null=call.null_BHT[0],
            image_norms=self._norms(call.layer, value_SHd),
            null_norms=null_norms_HT,
        )

    def _norms(self, layer: int, value_NHd: Tensor) -> Tensor:
        """Norms of the images of values, [H, N]."""
        projection = self._projections[layer]
        images = (value_images(part, projection) for part in value_NHd.split(_POSITIONS))
        return torch.cat([x_NHD.norm(dim=-1) for x_NHD in images]).T

    def _on_layer(self, point: HookPoint, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        assert point.layer is not None
        x_TD = check_output(self._model, point, x, self._ids_1T)[0].detach()
        if not x_TD.isfinite().all():
            broken = int(x_TD.isfinite().all(-1).logical_not().nonzero()[0])
            raise UserError(
                f"model: the output of layer {point.layer} is not finite at token {broken}, in"
                f" {x_TD.dtype}".replace("torch.", "")
            )
        sizes_TD = x_TD.abs()
        channels_T = sizes_TD.argmax(-1)
        self._record(
            point.layer,
            largest=x_TD.gather(1, channels_T[:, None])[:, 0],
            channels=channels_T,
            medians=sizes_TD.median(),
        )
        self.massive += [
            Massive(layer=point.layer, position=t, channel=d, value=float(x_TD[t, d]))
            for t, d in massive(x_TD).nonzero().tolist()
        ]


def _checked(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The token ids as a batch of one row."""
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    if len(ids) < 2:
        raise UserError(f"text: {len(ids)} tokens; at least 2 are needed")
    for token in ids:
        if not 0 <= int(token) < vocabulary:
            raise UserError(
                f"text: token {token} is outside the model's vocabulary of {vocabulary}"
            )
    check_lengths(model, [len(ids)], "text")
    return torch.tensor([[int(token) for token in ids]], device=model.device)


def _array(x: Tensor) -> np.ndarray:
    """`x` as float32, or as int64 if it has integers."""
    return (x.float() if x.is_floating_point() else x).cpu().numpy()
