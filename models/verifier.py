"""The verifier: loading it, capturing its hidden states, and reading the two matrices that training needs."""

from __future__ import annotations

import hashlib
import json
import keyword
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..conf.artifact import differences, digest
from ..conf.schema import Device, VerifierConfig
from .embedded.verifier import embedded_verifier

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "true", "false", "none")  # in chat templates


def verifier_location(config: VerifierConfig) -> str:
    """Give the folder or hub id to load from; makes the embedded verifier if it is asked for and not there yet."""
    return str(embedded_verifier()) if config.path == "embedded" else config.path


def torch_device(device: Device) -> torch.device:
    """Resolve `auto` to the current GPU or the CPU."""
    if device is Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError(
            "verifier.device is cuda, and this machine has no GPU that torch can use: set it to auto or cpu"
        )
    return torch.device(device.value)


def _load_whole_config(config: VerifierConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(verifier_location(config), revision=config.revision)
    except (OSError, KeyError) as error:
        raise _not_loadable(config, error) from None


def load_config(config: VerifierConfig) -> Any:
    """Load the verifier's language-model configuration (the nested `text_config` where there is one)."""
    return _load_whole_config(config).get_text_config()


def verifier_architectures(config: VerifierConfig) -> list[str]:
    """Give the architectures that the verifier's config.json names."""
    return list(_load_whole_config(config).architectures or [])


def _auto_class(whole: Any) -> Any:
    """Give the class of transformers that loads a checkpoint: one that takes images where the checkpoint's own does."""
    takes_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(whole.model_type) in (whole.architectures or [])
    return AutoModelForImageTextToText if takes_images else AutoModelForCausalLM


def load_tokenizer(config: VerifierConfig) -> PreTrainedTokenizerBase:
    """Load the verifier's tokenizer, which must carry a chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(verifier_location(config), revision=config.revision)
    except (OSError, KeyError) as error:
        raise _not_loadable(config, error) from None
    tokenizer.chat_template = _chat_template(config, tokenizer.chat_template)
    return tokenizer


def _chat_template(config: VerifierConfig, given: str | dict[str, str] | None) -> str:
    """Give the one template that every user of the tokenizer sees, `verifier.chat_template_kwargs` set in it."""
    if not given:
        raise ValueError(
            f"verifier.path {config.path} has a tokenizer without a chat template: fledge needs a chat model"
        )
    if isinstance(given, dict) and "default" not in given:
        raise ValueError(
            f"verifier.path {config.path} has the chat templates {', '.join(sorted(given))} and none named default: "
            "save its tokenizer with the one that it is served with"
        )
    template = given["default"] if isinstance(given, dict) else given
    return "".join(_assignment(name, value) for name, value in config.chat_template_kwargs.items()) + template


def _assignment(name: Any, value: Any) -> str:
    """Write a template's variable in its own language; the line adds nothing to what is rendered.

    (Transformers render with `trim_blocks`, so the line break goes with the block, and the template still begins a
    line. Python's literals of what JSON can say are Jinja's too.)
    """
    option = "verifier.chat_template_kwargs"
    if not str(name).isidentifier() or keyword.iskeyword(str(name)) or str(name) in _RESERVED:
        raise ValueError(f"{option} must name variables of the chat template, got {name!r}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}.{name} must be what JSON can say, got {value!r} ({error})") from None
    return f"{{% set {name} = {value!r} %}}\n"


def _not_loadable(config: VerifierConfig, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"verifier.path {config.path!r} is neither a model folder nor a reachable hub id: {reason}")


def end_token_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the ids of the tokens that end an answer: the generation config's and the tokenizer's."""
    eos = generation.eos_token_id
    ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    return sorted(int(token) for token in ids)


def load_end_token_ids(config: VerifierConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the `end_token_ids` of a verifier without loading its weights."""
    location, revision = verifier_location(config), config.revision or "main"
    try:
        generation = GenerationConfig.from_pretrained(location, revision=revision)
    except OSError:  # a verifier without a generation_config.json
        generation = GenerationConfig.from_pretrained(location, "config.json", revision=revision)
    return end_token_ids(generation, tokenizer)


def special_token_ids(config: VerifierConfig) -> list[int]:
    """Give the ids of the tokenizer's special tokens and of those that end an answer, ascending."""
    tokenizer = load_tokenizer(config)
    return sorted({*tokenizer.all_special_ids, *load_end_token_ids(config, tokenizer)})


def default_aux_layers(num_layers: int) -> list[int]:
    """Give the decoder layers whose outputs are fed to a head by default: 1, L/2-1, L-4 (0-based)."""
    layers = [1, num_layers // 2 - 1, num_layers - 4]
    if len(set(layers)) < 3 or min(layers) < 0:
        raise ValueError(
            f"draft.aux_layers must be given for a verifier of {num_layers} layers: the defaults {layers} collide"
        )
    return layers


@dataclass(frozen=True)
class LogitTransform:
    """What a verifier does to the product of its states and `lm_head` before that is its logits."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Scale and cap in place, and give the same tensor."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def logit_transform(config: Any) -> LogitTransform:
    """Read it from a language model's configuration: Cohere and Falcon-H1 multiply, Granite divides, Gemma caps."""
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))


def _decoder(model: PreTrainedModel) -> Any:
    """Give the module that holds the decoder layers and the final norm."""
    decoder: Any = model.get_decoder()
    while not hasattr(decoder, "layers") and hasattr(decoder, "model"):
        decoder = decoder.model
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise ValueError(
            f"verifier.path: {type(model).__name__} has no decoder layers and final norm that fledge knows"
        )
    return decoder


@dataclass
class VerifierOutput:
    """What one forward pass yields, for B sequences of T tokens."""

    logits: Tensor  # [B, T or logits_to_keep, V]
    aux_hidden_states: Tensor  # [B, T, A*H], ascending layers
    last_hidden_state: Tensor  # [B, T, H], after the final norm: what lm_head multiplies


class Verifier:
    """A language model with its tokenizer, whose forward also gives aux and last hidden states.

    Of a model that takes images too, it is the text decoder that is watched.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, aux_layers: list[int]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.aux_layers = sorted(aux_layers)
        self.end_token_ids = end_token_ids(model.generation_config, tokenizer)
        self._captured: dict[str, Tensor] = {}
        decoder = _decoder(model)
        if not 0 <= self.aux_layers[0] <= self.aux_layers[-1] < len(decoder.layers):
            raise ValueError(
                f"draft.aux_layers must be layers of the verifier, 0 to {len(decoder.layers) - 1}, got {aux_layers}"
            )
        for layer in self.aux_layers:
            decoder.layers[layer].register_forward_hook(self._capture(str(layer)))
        decoder.norm.register_forward_hook(self._capture("last"))

    def _capture(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._captured[name] = output[0] if isinstance(output, tuple) else output

        return hook

    @classmethod
    def load(
        cls, config: VerifierConfig, aux_layers: list[int] | None = None, gpus: Sequence[int] | None = None
    ) -> Verifier:
        """Load model and tokenizer.

        Args:
            aux_layers: None takes the default ones.
            gpus: those that verifier.device=auto may use; None: all, and the host's memory beyond. Accelerate spreads
                the layers over several; a single one must be the current one.
        """
        tokenizer = load_tokenizer(config)
        device = torch_device(config.device)
        num_gpus = torch.cuda.device_count() if gpus is None else len(gpus)
        spread = config.device is Device.auto and num_gpus > 1
        model: Any
        try:
            model = _auto_class(_load_whole_config(config)).from_pretrained(
                verifier_location(config),
                revision=config.revision,
                dtype=getattr(torch, config.dtype.value),
                device_map="auto" if spread else None,
                max_memory={gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus} if spread and gpus else None,
            )
        except OSError as error:
            raise _not_loadable(config, error) from None
        if not spread:
            model = model.to(device)
        elif gpus and "disk" in getattr(model, "hf_device_map", {}).values():
            raise ValueError(
                f"verifier.path {config.path!r} does not fit into the free memory of {num_gpus} GPUs: "
                "start fewer ranks a node, each then has more of them"
            )
        layers = (
            aux_layers
            if aux_layers is not None
            else default_aux_layers(model.config.get_text_config().num_hidden_layers)
        )
        return cls(model, tokenizer, layers)

    @property
    def device(self) -> torch.device:
        """Device of the verifier's embedding, where tokens go in and states come out."""
        return self.model.device

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **arguments: Any) -> VerifierOutput:
        """Run the model on `input_ids` [B, T]; further arguments (cache, mask, logits_to_keep) go to it as they are."""
        logits = self.model(input_ids=input_ids, **arguments).logits
        captured, self._captured = self._captured, {}
        aux = torch.cat([captured[str(layer)].to(self.device) for layer in self.aux_layers], dim=-1)
        return VerifierOutput(logits.to(self.device), aux, captured["last"].to(self.device))


class VerifierWeights:
    """Single tensors of a verifier's checkpoint, read through its safetensors index without loading the model."""

    EMBEDDING = "embed_tokens.weight"
    LM_HEAD = "lm_head.weight"
    FINAL_NORM = "norm.weight"
    TOWERS = ("vision", "visual", "audio")  # in the names of what is no part of the text decoder

    def __init__(self, config: VerifierConfig) -> None:
        self._location = verifier_location(config)
        self._revision = config.revision
        self._config = config
        index = self._file("model.safetensors.index.json")
        if index is not None:
            self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            single = self._file("model.safetensors")
            if single is None:
                raise ValueError(
                    f"verifier.path {config.path!r} holds no safetensors weights (model.safetensors or its index)"
                )
            with self._open(single) as weights:
                self._files = dict.fromkeys(weights.keys(), "model.safetensors")

    def _file(self, name: str) -> Path | None:
        if Path(self._location).is_dir():
            path = Path(self._location) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self._location, name, revision=self._revision))
        except LocalEntryNotFoundError as error:
            raise _not_loadable(self._config, error) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise _not_loadable(self._config, error) from None

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except Exception as error:  # safetensors raises its own bare Exception type
            raise ValueError(f"{path} cannot be read as safetensors ({error}): fetch the verifier again") from None

    def _name(self, suffix: str) -> str | None:
        """Give the text decoder's tensor whose name ends with `suffix`."""
        ends = [name for name in self._files if ("." + name).endswith("." + suffix)]
        names = [name for name in ends if not any(tower in name for tower in self.TOWERS)]
        return min(names, key=len) if names else None

    def _missing(self, file: str) -> ValueError:
        return ValueError(f"verifier.path {self._config.path!r}: {file} is named by the index and missing")

    def read(self, suffix: str) -> Tensor | None:
        """Read the one tensor whose name ends with `suffix`; None if there is none."""
        name = self._name(suffix)
        if name is None:
            return None
        path = self._file(self._files[name])
        if path is None:
            raise self._missing(self._files[name])
        with self._open(path) as weights:
            return weights.get_tensor(name)

    def embedding(self) -> Tensor:
        """Read the token embedding [V, H]."""
        weight = self.read(self.EMBEDDING)
        if weight is None:
            raise ValueError(f"verifier.path {self._config.path!r} has no tensor *.{self.EMBEDDING}")
        return weight

    def lm_head(self) -> Tensor:
        """Read the output matrix [V, H]; the embedding where the two are tied."""
        weight = self.read(self.LM_HEAD)
        return weight if weight is not None else self.embedding()

    def fingerprint(self) -> str:
        """Hash tensor names, and the first row of every tensor in the files that training needs (16 hex digits).

        In a single-file checkpoint those are all tensors, in a sharded one the last layers are among them.
        """
        state = hashlib.sha256(json.dumps(sorted(self._files)).encode())
        ends = (self.EMBEDDING, self.LM_HEAD, self.FINAL_NORM)
        needed = {self._files[name] for name in map(self._name, ends) if name is not None}
        for file in sorted(needed):
            path = self._file(file)
            if path is None:
                raise self._missing(file)
            with self._open(path) as weights:
                for name in sorted(weights.keys()):
                    part = weights.get_slice(name)
                    row = part[0:1] if part.get_shape() else weights.get_tensor(name)
                    state.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return state.hexdigest()[:16]


def verifier_identity(config: VerifierConfig) -> dict[str, Any]:
    """Describe a verifier for a manifest, by content and not by where it lies.

    Artifacts made with one identity are refused with another.
    """
    text, tokenizer = load_config(config), load_tokenizer(config)
    return {
        "fingerprint": VerifierWeights(config).fingerprint(),
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        **tokenizer_identity(tokenizer),
    }


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Describe the part of a verifier's identity that its tokenizer is."""
    return {
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "chat_template": digest(tokenizer.chat_template),
    }


def check_identity(recorded: dict[str, Any], config: VerifierConfig, what: str, cure: str) -> None:
    """Refuse an artifact that was made with another verifier than the configured one.

    Args:
        recorded: the identity in the artifact's manifest.
        what: the artifact, as the message begins.
        cure: what to do about it.
    """
    changes = differences(recorded, verifier_identity(config))
    if changes:
        raise ValueError(
            f"{what} belongs to another verifier than verifier.path={config.path} ({'; '.join(changes)}): {cure}"
        )
