"""What is known of a verifier without its weights: configuration, tokenizer, layers, what becomes of its logits."""

from __future__ import annotations

import json
import keyword
import logging
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)

from ...conf.runtime.artifact import digest
from ...conf.schema import Device, Dtype, VerifierConfig
from ..embedded.verifier import CHECKPOINT

if TYPE_CHECKING:  # torch and transformers' Auto classes take seconds to import, and a tokenizer may do without them
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

MERGED = "fledge_merged.json"  # in a folder that an adapter was merged into: what it is made of
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "true", "false", "none")  # in chat templates


def verifier_location(config: VerifierConfig, make: bool = True) -> str:
    """Return the folder or hub id to load from; with an adapter the merged folder, which is made if need be."""
    path = str(CHECKPOINT) if config.path == "embedded" else config.path
    if config.adapter is None:
        return path
    from .adapter import merged_folder

    return str(merged_folder(path, config.revision, config.adapter, config.merged_dir, make))


def torch_device(device: Device) -> torch.device:
    """Resolve `auto` to the current GPU or the CPU."""
    import torch

    if device is Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("verifier.device is cuda, and torch can use no GPU of this machine: set it to auto or cpu")
    return torch.device(device.value)


def warn_if_emulated(option: str, dtype: Dtype, device: torch.device) -> None:
    """Warn of bfloat16 on a CPU without instructions for it: matrix products take ten times as long as in float32."""
    import torch

    if dtype is not Dtype.bfloat16 or device.type != "cpu":
        return
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        logging.getLogger(__name__).warning(
            "%s=bfloat16 is about ten times as slow as float32 on this CPU, which has no instructions for it", option
        )


def checkpoint_file(config: VerifierConfig, name: str) -> Path | None:
    """Return the path of a file of the checkpoint, fetched from the hub if need be; None: it has none of that name."""
    location = verifier_location(config)
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(location, name, revision=config.revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        missing = isinstance(error, EntryNotFoundError)
        if isinstance(error, LocalEntryNotFoundError):  # without network: it lacks the file, or was never fetched
            missing = isinstance(try_to_load_from_cache(location, "config.json", revision=config.revision), str)
        if missing:
            return None
        raise not_loadable(config, error) from None


def from_checkpoint(verifier: VerifierConfig, kind: Any, **more: Any) -> Any:
    """Load a part of the checkpoint by a class of transformers, which neither runs the repository's code nor asks to.

    Raises ValueError if it is not there, transformers cannot load it, it needs that code, or is an adapter alone.
    """
    more |= {"revision": verifier.revision, "trust_remote_code": False}
    try:
        return kind.from_pretrained(verifier_location(verifier), **more)
    except (OSError, KeyError, ValueError, TypeError, ImportError, RuntimeError, StrictDataclassError) as error:
        refuse_adapter(verifier)
        raise not_loadable(verifier, error) from error


def refuse_adapter(config: VerifierConfig) -> None:
    """Raise ValueError if a checkpoint that lacks something is a PEFT adapter alone."""
    found = None
    with suppress(ValueError):  # not even there: whoever calls says so
        found = checkpoint_file(config, "adapter_config.json")
    if found:
        raise ValueError(
            f"verifier.path {config.path!r} is a PEFT adapter, not a model: give it as verifier.adapter, and its base "
            "model as verifier.path"
        )


def load_whole_config(config: VerifierConfig) -> Any:
    """Load the checkpoint's configuration, that of its text decoder and of its other parts."""
    return from_checkpoint(config, transformers.AutoConfig)


def auto_class(whole: Any) -> Any:
    """Return the class of transformers that loads a checkpoint: one that takes images if the checkpoint's own does."""
    return transformers.AutoModelForImageTextToText if takes_images(whole) else transformers.AutoModelForCausalLM


def empty_model(whole: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a configuration's model without memory; raise ValueError if transformers has none or lacks a package."""
    import torch

    try:
        with torch.device("meta"):
            copy, dtype = deepcopy(whole), dtype or torch.bfloat16
            model: PreTrainedModel = auto_class(whole).from_config(copy, dtype=dtype, trust_remote_code=False)
    except (ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"verifier.path: transformers cannot build a {whole.model_type}: {reason}") from None
    return model


def takes_images(whole: Any) -> bool:
    """Return whether the class that a checkpoint's configuration names reads images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(whole.model_type) in (whole.architectures or [])


def load_config(config: VerifierConfig) -> Any:
    """Load the configuration of the verifier's text decoder."""
    return load_whole_config(config).get_text_config()


def longest_text(config: Any) -> int:
    """Return how many tokens a text may have that is decoded here.

    With some rotary embeddings a longer one changes the angles of all tokens, those in the cache too.
    """
    context = int(config.max_position_embeddings)
    kinds = getattr(config, "rope_parameters", None) or {}
    for rope in [kinds, *(kind for kind in kinds.values() if isinstance(kind, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            context = min(context, int(rope.get("original_max_position_embeddings") or context))
    return context


def load_tokenizer(config: VerifierConfig, kind: Any = None) -> PreTrainedTokenizerBase:
    """Load the verifier's tokenizer, which must carry a chat template, by AutoTokenizer or another class."""
    tokenizer: PreTrainedTokenizerBase = from_checkpoint(config, kind or transformers.AutoTokenizer)
    tokenizer.chat_template = _chat_template(config, tokenizer.chat_template)
    return tokenizer


def _chat_template(config: VerifierConfig, templates: str | dict[str, str] | None) -> str:
    """Return the one template that every user of the tokenizer sees, `verifier.chat_template_kwargs` set in it."""
    if not templates:
        raise ValueError(
            f"verifier.path {config.path} has a tokenizer without a chat template, which fledge needs: take the chat "
            "(instruct) model, or save the template it is served with beside the tokenizer as chat_template.jinja"
        )
    by_name = templates if isinstance(templates, dict) else {"default": templates}
    if "default" not in by_name:
        raise ValueError(
            f"verifier.path {config.path} has the chat templates {', '.join(sorted(by_name))} and none named default: "
            "save its tokenizer with the one that it is served with"
        )
    return "".join(_assignment(name, value) for name, value in config.chat_template_kwargs.items()) + by_name["default"]


def _assignment(name: Any, value: Any) -> str:
    """Return a line that sets a variable in a template, whose literals are Python's for what JSON can say.

    Nothing is rendered of it: transformers' `trim_blocks` takes its line break, and the template still begins a line.
    """
    option = "verifier.chat_template_kwargs"
    if not str(name).isidentifier() or keyword.iskeyword(str(name)) or str(name) in _RESERVED:
        raise ValueError(f"{option} must name variables of the chat template, got {name!r}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}.{name} must be what JSON can say, got {value!r} ({error})") from None
    return f"{{% set {name} = {value!r} %}}\n"


def not_loadable(config: VerifierConfig, error: Exception) -> ValueError:
    """Return the error of a verifier that cannot be found or read."""
    reason, version = " ".join(str(error).split()), f"transformers {transformers.__version__}"
    if "trust_remote_code" in reason:
        return ValueError(
            f"verifier.path {config.path!r} needs code of its own repository (auto_map in config.json or "
            f"tokenizer_config.json), and fledge runs no such code: give a copy that {version} reads without it (a "
            "conversion to a class that it has, the tokenizer as tokenizer.json), or install a newer transformers"
        )
    if not isinstance(error, OSError | KeyError | HFValidationError):
        return ValueError(f"verifier.path {config.path!r} cannot be loaded by {version}: {reason[:400]}")
    return ValueError(f"verifier.path {config.path!r} is neither a model folder nor a reachable hub id: {reason[:200]}")


def end_token_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens that end an answer: the generation config's and the tokenizer's."""
    eos = generation.eos_token_id
    ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    return sorted(int(token) for token in ids)


def load_end_token_ids(config: VerifierConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the `end_token_ids` of a verifier without loading its weights."""
    location, revision = verifier_location(config), config.revision or "main"
    try:
        generation = transformers.GenerationConfig.from_pretrained(location, revision=revision)
    except OSError:  # a verifier without a generation_config.json
        generation = transformers.GenerationConfig.from_pretrained(location, "config.json", revision=revision)
    return end_token_ids(generation, tokenizer)


def special_token_ids(config: VerifierConfig) -> list[int]:
    """Return the ids of the tokenizer's special tokens and of those that end an answer, ascending."""
    tokenizer = load_tokenizer(config)
    return sorted({*tokenizer.all_special_ids, *load_end_token_ids(config, tokenizer)})


def default_aux_layers(num_layers: int) -> list[int]:
    """Return the decoder layers whose outputs are fed to a head by default: 1, L/2-1, L-4 (0-based)."""
    layers = [1, num_layers // 2 - 1, num_layers - 4]
    if len(set(layers)) < 3 or min(layers) < 0:
        raise ValueError(
            f"draft.aux_layers must be given for a verifier of {num_layers} layers: the defaults {layers} collide"
        )
    return layers


@dataclass(frozen=True)
class LogitTransform:
    """What makes a verifier's logits of the product of its states and `lm_head`."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Return the tensor, scaled and capped in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def logit_transform(config: Any) -> LogitTransform:
    """Read it from a text decoder's configuration: Cohere and Falcon-H1 multiply, Granite divides, Gemma caps."""
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the part of a verifier's identity that its tokenizer is."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {"tokenizer": digest(vocabulary), "chat_template": digest(tokenizer.chat_template)}
