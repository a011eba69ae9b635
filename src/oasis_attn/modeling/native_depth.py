"""The depth weights of families of transformers that route over depth themselves.

Sublayers read a weighted sum of the sources: source 0 is the embedding, and source i the output of
sublayer i (attention, MLP, attention, ...) or a block of such outputs.  As in `depth_cache`, router
r comes before sublayer r + 1, and the last router before the final norm.

- Block attention residuals (Inkling 2): softmax weights over normalized blocks, of which the last
  one is unfinished.  The mean over the query, key and value inputs, where they have own weights.
  Layer 0 reads the embedding, so that there is no router 0.
- Hyper-connections (arXiv 2409.19606; DeepSeek V4, HY V4): n streams x_n, of which a sublayer reads
  sum_n pre_n x_n, and to which its output is added with weights post_n.  Each stream is a sum of
  sources, x_n = sum_i c_ni v_i, so that the weight of source i is sum_n pre_n c_ni.  These weights
  do not sum to 1.

The gated residuals of Qwen4-Exp and the streams of Gemma 3n weight each channel or predict the
streams from each other; they have no such weights.

Axes: B batch, T tokens, N streams, S sources, D width, Q queries of one router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.decoder_map import find_decoder, find_layers
from oasis_attn.modeling.depth_cache import RouterCall

_BLOCKS = ("attention_input", "mlp_input", "final_input")  # Inkling 2's names
_STREAMS = ("attn_hc", "ffn_hc", "hc_head")


@contextmanager
def observe_native_depth(
    model: PreTrainedModel, callback: Callable[[RouterCall], None]
) -> Iterator[None]:
    """Context in which `callback` receives the weights of every depth router of the family.

    It receives nothing from a family without depth routing.

    Raises:
        UserError: by a forward pass whose hyper-connections compute something else than expected.
    """
    streams = _Streams(model.config.model_type, callback)

    def block_residual(module: Any, args: tuple[Tensor, Tensor], _output: Any) -> None:
        blocks_BTSD, partial_BTD = args
        callback(_call(routers[module], _block_weights(module, blocks_BTSD, partial_BTD)))

    def hyper_connection(module: Any, args: tuple[Tensor], output: Any) -> None:
        streams.update(routers[module], module, args[0], output)

    with ExitStack() as stack:
        for names, hook in ((_BLOCKS, block_residual), (_STREAMS, hyper_connection)):
            routers = _routers(model, names)
            if routers:
                for module in routers:
                    stack.callback(module.register_forward_hook(hook).remove)
                break
        yield


def _routers(model: PreTrainedModel, names: tuple[str, str, str]) -> dict[nn.Module, int]:
    """The index of each router of a decoder whose routers have these names."""
    _, layers = find_layers(model)
    found: dict[nn.Module, int] = {}
    for index, layer in enumerate(layers):
        for router, name in enumerate(names[:2], 2 * index):
            module = getattr(layer, name, None)
            if isinstance(module, nn.Module):
                found[module] = router
    last = getattr(find_decoder(model).module, names[2], None)
    return found | {last: 2 * len(layers)} if found and isinstance(last, nn.Module) else {}


def _call(router: int, weights_BTS: Tensor) -> RouterCall:
    return RouterCall(router, weights_BTS, torch.zeros_like(weights_BTS[..., 0]), None)


def _block_weights(module: Any, blocks_BTSD: Tensor, partial_BTD: Tensor) -> Tensor:
    sources_BTSD = torch.cat([blocks_BTSD, partial_BTD.unsqueeze(-2)], dim=-2).float()
    width = sources_BTSD.shape[-1]
    query_QD = module.query.float().view(-1, width)
    logits_BTSQ: Tensor = module.norm(sources_BTSD) @ query_QD.T * width**-0.5
    return logits_BTSQ.softmax(-2).mean(-1)


class _Streams:
    """Follows the sources in the streams of hyper-connections through one forward pass."""

    def __init__(self, family: str, callback: Callable[[RouterCall], None]) -> None:
        self._family, self._callback = family, callback
        self._sources_BTNS = torch.empty(0)

    def update(self, router: int, module: Any, x_BTND: Tensor, output: Any) -> None:
        """Add one router: its module, the streams that it reads, and what it returns."""
        head = isinstance(output, Tensor)
        read_BTD = output if head else output[-1]
        pre_BTN = _pre(module, x_BTND)
        expected_BTD = (pre_BTN.unsqueeze(-1) * x_BTND).sum(2)
        if not torch.allclose(expected_BTD, read_BTD.float(), rtol=1e-2, atol=1e-3):
            raise UserError(
                f"model: the hyper-connections of family {self._family!r} are not the expected"
                " weighted sums, so that its depth weights cannot be measured"
            )
        if router == 0:  # all streams are the embedding
            self._sources_BTNS = torch.ones_like(pre_BTN).unsqueeze(-1)
        weights_BT1S = pre_BTN.unsqueeze(-2) @ self._sources_BTNS
        self._callback(_call(router, weights_BT1S.squeeze(-2)))
        if not head:
            post_BTN, *mixes_BTNN = output[:-1]
            for mix_BTNN in mixes_BTNN:  # from the first streams axis to the second
                self._sources_BTNS = mix_BTNN.float().mT @ self._sources_BTNS
            post_BTN1 = post_BTN.float().unsqueeze(-1)
            self._sources_BTNS = torch.cat([self._sources_BTNS, post_BTN1], dim=-1)


def _pre(module: Any, x_BTND: Tensor) -> Tensor:
    """The weights with which a sublayer reads the streams, [B, T, N]."""
    count = x_BTND.shape[2]
    head = hasattr(module, "hc_fn")
    weight, bias, scale, eps = (
        (module.hc_fn, module.hc_base, module.hc_scale, module.eps)
        if head
        else (module.fn, module.base, module.scale, module.hc_eps)
    )
    flat_BTM = x_BTND.flatten(2).float()
    inverse_BT1 = flat_BTM.square().mean(-1, keepdim=True).add(module.input_norm.eps).rsqrt()
    logits_BTN = F.linear(flat_BTM, weight[:count].float()) * inverse_BT1
    return torch.sigmoid(logits_BTN * scale[0].float() + bias[:count].float()) + float(eps)
