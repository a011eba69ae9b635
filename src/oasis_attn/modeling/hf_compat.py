"""All private and unstable names that we use of the Hugging Face and optional libraries.

A release of these libraries may change such a name without notice, which is why `pyproject.toml`
admits only the minor versions that were tested.  Each name stands here once, with the reason why it
is needed and, after a semicolon, what happens without it:

- `_NAMES`: objects that are used as they are.  `from ...hf_compat import sdpa_mask` imports the
  library's module at that moment and binds the original, so that a call costs nothing more.  They
  cannot be imported earlier: parts of this package are imported while transformers itself still is
  (see `oasis_attn._registration`), and compressed-tensors, torchao and lm-eval are optional.
- functions: wrappers around private attributes and arguments.
- `OVERRIDDEN`: methods and attributes of the libraries' classes that our classes define anew.

Of peft only public names are used.  The private names of torch are in `ops/torch_compat.py`.
`tests/modeling/test_hf_compat.py` checks every name, and `tests/modeling/test_private_names.py`
checks that no other file uses such names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` imports, for type checkers
    from accelerate.utils import parse_flag_from_env as parse_flag_from_env
    from compressed_tensors.modeling import QuantizedKVCache as QuantizedKVCache
    from lm_eval.api.task import ConfigurableTask as ConfigurableTask
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig as Int8DynamicActivationInt8WeightConfig,
    )
    from torchao.quantization import Int8Tensor as Int8Tensor
    from torchao.quantization import PerRow as PerRow
    from torchao.quantization import PerTensor as PerTensor
    from torchao.quantization.quant_primitives import MappingType as MappingType
    from torchao.quantization.quantize_.workflows import (
        QuantizeTensorToInt8Kwargs as QuantizeTensorToInt8Kwargs,
    )
    from torchao.utils import should_reduce_range as should_reduce_range
    from transformers import PreTrainedModel
    from transformers import initialization as initialization
    from transformers.configuration_utils import SubConfigSpec as SubConfigSpec
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping as get_checkpoint_conversion_mapping,
    )
    from transformers.conversion_mapping import (
        register_checkpoint_conversion_mapping as register_checkpoint_conversion_mapping,
    )
    from transformers.integrations import TensorBoardCallback as TensorBoardCallback
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING as GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import (
        GGUF_CONFIG_ARCHS as GGUF_CONFIG_ARCHS,
    )
    from transformers.integrations.gguf.gguf_config_mapping import (
        get_gguf_config as get_gguf_config,
    )
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS as GGUF_PRE_TOKENIZER_SPLITS,
    )
    from transformers.integrations.gguf.reader import read_gguf_metadata as read_gguf_metadata
    from transformers.integrations.sdpa_attention import (
        create_position_bias_mask as create_position_bias_mask,
    )
    from transformers.integrations.sdpa_attention import (
        sdpa_attention_forward as sdpa_attention_forward,
    )
    from transformers.masking_utils import create_masks_for_generate as create_masks_for_generate
    from transformers.masking_utils import eager_mask as eager_mask
    from transformers.masking_utils import sdpa_mask as sdpa_mask
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS as TENSOR_PROCESSORS
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor as TensorProcessor
    from transformers.modeling_gguf_pytorch_utils import (
        get_gguf_hf_weights_map as get_gguf_hf_weights_map,
    )
    from transformers.modeling_layers import (
        GenericForQuestionAnswering as GenericForQuestionAnswering,
    )
    from transformers.modeling_layers import (
        GenericForSequenceClassification as GenericForSequenceClassification,
    )
    from transformers.modeling_layers import (
        GenericForTokenClassification as GenericForTokenClassification,
    )
    from transformers.quantizers.auto import AutoHfQuantizer as AutoHfQuantizer
    from transformers.quantizers.auto import (
        register_quantization_config as register_quantization_config,
    )
    from transformers.quantizers.auto import register_quantizer as register_quantizer
    from transformers.quantizers.base import HfQuantizer as HfQuantizer
    from transformers.utils import SAFE_WEIGHTS_NAME as SAFE_WEIGHTS_NAME
    from transformers.utils.generic import can_return_tuple as can_return_tuple
    from transformers.utils.import_utils import is_tracing as is_tracing
    from transformers.utils.output_capturing import OutputRecorder as OutputRecorder
    from transformers.utils.quantization_config import (
        QuantizationConfigMixin as QuantizationConfigMixin,
    )

_NAMES = {  # module: {name: why we need it; what breaks without it}
    # --- transformers: the forward pass
    "transformers.integrations": {
        "TensorBoardCallback": "writes event files; they are not in the folder of the run",
    },
    "transformers.integrations.sdpa_attention": {
        "create_position_bias_mask": "adds a position bias; families with such a bias fail",
        "sdpa_attention_forward": "computes plain softmax; logits differ from the stock model's",
    },
    "transformers.masking_utils": {
        "create_masks_for_generate": "masks packed sequences; they attend to each other",
        "eager_mask": "makes masks that families without SDPA expect; such masks are misread",
        "sdpa_mask": "makes our attention's masks; padding and sliding windows are ignored",
    },
    "transformers.utils.import_utils": {
        "is_tracing": "detects compilation and export; checks branch on traced values",
    },
    "transformers.utils.generic": {
        "can_return_tuple": "implements `return_dict=False`; callers who ask for tuples fail",
    },
    "transformers.utils.output_capturing": {
        "OutputRecorder": "describes an output to collect; outputs have no `null_probability`",
    },
    "transformers.initialization": {
        "initialization": "(the module) sets what no checkpoint fills; loading overwrites weights",
    },
    "transformers.modeling_layers": {
        "GenericForQuestionAnswering": "is the head of our class; question answering goes",
        "GenericForSequenceClassification": "is the head of our class; classification goes",
        "GenericForTokenClassification": "is the head of our class; token classification goes",
    },
    # --- transformers: configurations and checkpoints
    "transformers.configuration_utils": {
        "SubConfigSpec": "declares `OasisConfig.text_config`; the family's config stays a dict",
    },
    "transformers.conversion_mapping": {
        "get_checkpoint_conversion_mapping": "gives conversions of weights; experts do not load",
        "register_checkpoint_conversion_mapping": "gives our classes the same; experts do not load",
    },
    "transformers.utils": {
        "SAFE_WEIGHTS_NAME": "names the weight file; a run with adapters cannot resume",
    },
    # --- transformers: quantized models
    "transformers.quantizers.auto": {
        "AutoHfQuantizer": "knows all methods; an unknown one is found out only while loading",
        "register_quantization_config": "registers our configs; quantized models do not load",
        "register_quantizer": "registers our quantizers; quantized models do not load",
    },
    "transformers.quantizers.base": {
        "HfQuantizer": "takes part in saving and loading; quantized models cannot be saved",
    },
    "transformers.utils.quantization_config": {
        "QuantizationConfigMixin": "is our configs' base; quantized models cannot be saved",
    },
    # --- transformers: GGUF files
    "transformers.integrations.ggml": {
        "GGUF_CONFIG_MAPPING": "lists the keys of the older reader; dropped keys are not noticed",
    },
    "transformers.integrations.gguf.gguf_config_mapping": {
        "GGUF_CONFIG_ARCHS": "lists who has the newer reader; dropped keys are not noticed",
        "get_gguf_config": "shows the keys of the newer reader; dropped keys are not noticed",
    },
    "transformers.integrations.gguf.gguf_tokenizer_mapping": {
        "GGUF_PRE_TOKENIZER_SPLITS": "names splitting patterns; Llama 3's and Qwen's are refused",
    },
    "transformers.integrations.gguf.reader": {
        "read_gguf_metadata": "reads keys for the newer reader; dropped keys are not noticed",
    },
    "transformers.modeling_gguf_pytorch_utils": {
        "TENSOR_PROCESSORS": "holds special architectures' names; dropped tensors pass",
        "TensorProcessor": "holds the other architectures' names; dropped tensors pass",
        "get_gguf_hf_weights_map": "lists the tensors that are read; dropped tensors pass",
    },
    # --- accelerate
    "accelerate.utils": {
        "parse_flag_from_env": "reads ACCELERATE_USE_FSDP; FSDP on CPUs is ignored",
    },
    # --- compressed-tensors
    "compressed_tensors.modeling": {
        "QuantizedKVCache": "is the cache that it rounds; scales of the cache cannot be measured",
    },
    # --- torchao
    "torchao.quantization": {
        "Int8DynamicActivationInt8WeightConfig": "describes int8 folders; --format torchao goes",
        "Int8Tensor": "multiplies int8 by int8; integer arithmetic is unavailable",
        "PerRow": "asks for one input range per token; dynamic int8 is unavailable",
        "PerTensor": "asks for one input range per tensor; static int8 is unavailable",
    },
    "torchao.quantization.quant_primitives": {
        "MappingType": "asks for asymmetric ranges; integers differ from the simulation",
    },
    "torchao.quantization.quantize_.workflows": {
        "QuantizeTensorToInt8Kwargs": "tells how to quantize inputs; they stay in floating point",
    },
    "torchao.utils": {
        "should_reduce_range": "says where 8-bit sums overflow; CPUs without VNNI compute nonsense",
    },
    # --- lm-eval
    "lm_eval.api.task": {
        "ConfigurableTask": "builds lm-eval's prompts and scores; GSM8K is not comparable",
    },
}

OVERRIDDEN = {  # class: {what a subclass of ours defines anew: why; what breaks without it}
    "transformers.PreTrainedModel": {
        "_activation_checkpointing_enable": "refuses the reentrant form; it drops gradients",
        "_can_compile_fullgraph": "lets `generate` compile the model; static caches run eagerly",
        "_can_record_outputs": "collects outputs of modules; outputs have no `null_probability`",
        "_can_set_experts_implementation": "accepts the family's experts; loading refuses them",
        "_check_and_adjust_attn_implementation": "refuses other functions; they have no null",
        "_from_config": "initializes our parameters; `from_config` leaves them uninitialized",
        "_grouped_mm_can_dispatch": "asks the family; experts that cannot be grouped fail",
        "_init_weights": "initializes our parameters; they are left uninitialized",
        "_keep_in_fp32_modules_strict": "keeps routers in float32; a bfloat16 load rounds them",
        "_no_split_modules": "keeps a layer on one device; `device_map` splits residual branches",
        "_skip_keys_device_placement": "leaves our arguments in place; caches are copied",
        "_supports_attention_backend": "says that the registry is used; engines refuse the model",
        "_tied_weights_keys": "ties the head to the embedding; a tied head is loaded untrained",
        "_upload_modified_files": "writes our model card; `push_to_hub` uploads a template",
    },
    "transformers.PreTrainedConfig": {
        "_output_attentions": "is where attention maps are asked for; our function cannot be asked",
        "validate_output_attentions": "permits maps with our function; saving such a config fails",
    },
    "transformers.Trainer": {
        "_get_grad_norm": "stops at a gradient that is not finite; training goes on with NaN",
        "_load_from_checkpoint": "loads as `from_pretrained` does; experts are not restored",
        "_save": "saves adapters under the names in memory; adapters cannot resume",
        "_save_checkpoint": "publishes whole checkpoints; a killed run leaves half of one",
        "create_accelerator_and_postprocess": "asks for FSDP on CPUs; it is silently off",
        "get_decay_parameter_names": "exempts depth routers; decay pulls queries to zero",
    },
    "transformers.quantizers.base.HfQuantizer": {
        "_process_model_before_weight_loading": "makes room for codes; they are not loaded",
        "_process_model_after_weight_loading": "decodes the weights; models compute with codes",
        "get_new_dtype": "keeps scales in their precision; a bfloat16 load rounds them",
        "get_state_dict_and_metadata": "writes codes and prefix; neither is saved",
        "is_serializable": "permits saving; `save_pretrained` refuses",
    },
    "transformers.core_model_loading.WeightTransform": {
        "rename_source_key": "leaves our parameters alone; mixtral's renames `attn_res_mlp`",
        "reverse_transform": "does the same on saving; our parameters are saved misnamed",
    },
    "torch.nn.Module": {
        "_apply": "keeps the buffers of quantization in their precision; casts round them",
    },
}

_HOMES = {name: home for home, names in _NAMES.items() for name in names}

IMPLEMENTATION_KEYS = (
    *("attn_implementation", "_attn_implementation"),
    *("experts_implementation", "_experts_implementation"),
)
"""Keys of `config.json` that may name code on the Hub; without them, loading a file may run it."""

PROVENANCE_KEYS = ("_name_or_path", "transformers_version")
"""What `config.to_dict()` says of a model's origin; left in, equal models would look different."""

if not TYPE_CHECKING:  # to type checkers it would say that every name exists

    def __getattr__(name: str) -> Any:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = import_module(home)
            return module if home.endswith(f".{name}") else getattr(module, name)
        except AttributeError as error:
            library = home.split(".")[0]
            raise ImportError(
                f"{library} {metadata.version(library)} has no {home}.{name};"
                " install the version that oasis_attn requires"
            ) from error


def attention_implementation(config: Any) -> str:
    """The name of the attention function; without it, a native model cannot be switched back."""
    name: str = config._attn_implementation
    return name


def set_attention_implementation(config: Any, name: str) -> None:
    """Choose the function, unchecked; without it, a config of ours does not choose our function."""
    config._attn_implementation = name


def supports_boolean_masks(model: PreTrainedModel) -> bool:
    """Whether a family accepts SDPA's masks; without it, families with other masks misread ours."""
    return bool(model._supports_sdpa)


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether a family's attention calls the registered function; without it, ours is not called.

    transformers only warns if it does not.
    """
    return bool(model._can_set_attn_implementation())


def experts_implementation(config: Any) -> str | None:
    """The name of the function of experts; without it, conversion changes it to the default."""
    name: str | None = config._experts_implementation
    return name


def set_experts_implementation(config: Any, name: str | None) -> None:
    """Choose the function of experts, which `to_dict` drops; without it, `to_vanilla` loses it."""
    config._experts_implementation = name


def can_set_experts_implementation(model_class: Any) -> bool:
    """Whether a family has experts of several kinds; without it, `grouped_mm` fails in forward."""
    return bool(model_class._can_set_experts_implementation())


def experts_gate(experts: Any) -> Callable[[Any, Any], Any]:
    """The activation of packed experts, unbound; without it, they cannot become linear layers."""
    gate: Callable[[Any, Any], Any] = type(experts)._apply_gate
    return gate


def no_split_modules(model: Any) -> Any:
    """Classes that `device_map` keeps whole; without it, a model with a head may split layers."""
    return model._no_split_modules


def recorded_outputs(model_class: Any) -> dict[str, Any]:
    """A copy of what a family's hooks collect; without it, `output_hidden_states` gives nothing."""
    return dict(model_class._can_record_outputs or {})


def register_recorded_outputs(model_class: type, recorded: dict[str, Any]) -> None:
    """Register what hooks collect, as `__init__` does; unpickled models collect nothing without it.

    transformers keys its registry by the name of the class.
    """
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    _CAN_RECORD_REGISTRY.update({str(model_class): recorded})


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether the model has a PEFT adapter; without it, saving it writes the whole model, too."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def before_upload(
    model: PreTrainedModel, write: Callable[[PreTrainedModel, str | os.PathLike[str]], None]
) -> None:
    """Let `push_to_hub` of this one model call `write(model, folder)` before it uploads.

    Without it, a quantized model of another library's class is uploaded with an empty model card.
    """
    vars(model)["_upload_modified_files"] = partial(_write_and_upload, model, write)


def not_before_upload(model: PreTrainedModel) -> None:
    """Undo `before_upload`; without it, a copy without prefix is uploaded with our model card."""
    vars(model).pop("_upload_modified_files", None)


def _write_and_upload(
    model: PreTrainedModel,
    write: Callable[[PreTrainedModel, str | os.PathLike[str]], None],
    working_dir: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    write(model, working_dir)
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)


def find_file(
    source: str | os.PathLike[str],
    name: str,
    *,
    subfolder: str = "",
    absent_ok: bool = False,
    offline_ok: bool = False,
) -> str | None:
    """The path of a file in a folder, or in a Hub repository, from which it is downloaded.

    Without it, files that a checkpoint may lack cannot be told from errors of the network.

    Args:
        absent_ok: return None if there is no such file.
        offline_ok: return None if the Hub cannot be reached.

    Raises:
        OSError: there is no such file, or no connection, and that is not allowed.
    """
    from transformers.utils.hub import cached_file

    return cached_file(
        source,
        name,
        subfolder=subfolder,
        _raise_exceptions_for_missing_entries=not absent_ok,
        _raise_exceptions_for_connection_errors=not offline_ok,
    )


def lm_eval_task_file(task: str) -> Path:
    """The definition of one of lm-eval's tasks; without it, prompts would not be lm-eval's."""
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).parent / task / f"{task}.yaml"
