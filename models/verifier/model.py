"""A verifier of any architecture, size and placement, whose hidden states are captured."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from ...conf.runtime.rank_info import read_rank_info
from ...conf.schema import Device, Dtype, VerifierConfig
from .config import (
    auto_class,
    default_aux_layers,
    empty_model,
    end_token_ids,
    from_checkpoint,
    load_tokenizer,
    load_whole_config,
    torch_device,
    warn_if_emulated,
)
from .quantised import prepare_quantised, quantisation
from .weights import VerifierWeights

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")  # model inputs that say of each token whether it is an image's
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "ln_f", "norm_f")


class Decoder(NamedTuple):
    layers: nn.ModuleList
    norm: nn.Module  # after the last layer
    norm_name: str  # in the module that has both


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find a model's decoder layers and final norm."""
    count = model.config.get_text_config().num_hidden_layers
    module: Any = model.get_decoder()
    while module is not None:
        children = dict(module.named_children())
        layers = [m for m in children.values() if isinstance(m, nn.ModuleList) and len(m) == count]
        names = [name for name in _FINAL_NORMS if name in children]
        if layers and names:
            return Decoder(layers[0], children[names[0]], names[0])
        module = children.get("model")
    raise ValueError(f"verifier.path: {type(model).__name__} has no decoder layers and final norm that fledge knows")


@dataclass
class VerifierOutput:
    """The output of a forward pass, for B sequences of T tokens."""

    logits: Tensor  # [B, T or logits_to_keep, V]
    aux_hidden_states: Tensor  # [B, T, A*H], ascending layers
    last_hidden_state: Tensor  # [B, T, H], after the final norm: what lm_head multiplies
    hidden_states: tuple[Tensor, ...] | None  # the model's own, if it is asked for them and has any


def free_memory() -> None:
    """Give back the memory of verifiers that nothing refers to: their hooks refer back to them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Verifier:
    """A language model with its tokenizer, whose forward also gives the aux and last states of its text decoder."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, aux_layers: list[int]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.aux_layers = sorted(aux_layers)
        self.end_token_ids = end_token_ids(model.generation_config, tokenizer)
        self._captured: dict[str, Tensor] = {}
        decoder = find_decoder(model)
        if not 0 <= self.aux_layers[0] <= self.aux_layers[-1] < len(decoder.layers):
            raise ValueError(
                f"draft.aux_layers must be layers of the verifier, 0 to {len(decoder.layers) - 1}, got {aux_layers}"
            )
        for layer in self.aux_layers:
            if layer + 1 < len(decoder.layers):
                hook = partial(self._capture_input, str(layer))
                decoder.layers[layer + 1].register_forward_pre_hook(hook, with_kwargs=True)
            else:
                decoder.layers[layer].register_forward_hook(partial(self._capture_output, str(layer)))
        decoder.norm.register_forward_hook(partial(self._capture_output, "last"))
        self._positions: Tensor | None = None  # of the tokens of the forward now running, if they are given
        for module in model.modules():
            if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
                self._scale_by_position(module)

    def _scale_by_position(self, attention: Any) -> None:
        """Let a layer of Llama 4 without rotary embedding scale its queries by their positions, if they are given.

        The model itself counts the tokens of the forward, which is wrong for the nodes of a tree and for several texts
        next to each other in a cache.
        """

        def scale(_module: nn.Module, _inputs: Any, queries: Tensor) -> Tensor | None:
            attention.attn_temperature_tuning = self._positions is None
            if self._positions is None:
                return None
            blocks = torch.floor((self._positions.to(queries.device).float() + 1) / attention.floor_scale)
            scale = torch.log1p(blocks) * attention.attn_scale + 1
            return (queries * scale[..., None]).to(queries.dtype)  # rounded once, as the model does

        attention.q_proj.register_forward_hook(scale)

    def _capture_input(self, name: str, _module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Take the input of the next layer, as engines do: the output, and in Qwen3-VL the images' features on top."""
        self._captured[name] = inputs[0] if inputs else keywords["hidden_states"]

    def _capture_output(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._captured[name] = output[0] if isinstance(output, tuple) else output

    @classmethod
    def load(
        cls, config: VerifierConfig, aux_layers: list[int] | None = None, gpus: Sequence[int] | None = None
    ) -> Verifier:
        """Load model and tokenizer onto one device, over several, or as this rank's part of one.

        Args:
            aux_layers: None takes the default ones.
            gpus: those that verifier.device=auto may use; None: all, and the host's memory beyond. Accelerate spreads
                the layers over several; a single one must be the current one.
        """
        tokenizer, whole = load_tokenizer(config), load_whole_config(config)
        prepare_quantised(config, whole, VerifierWeights(config).files)
        model, report = from_checkpoint(
            config,
            auto_class(whole),
            config=whole,
            dtype=getattr(torch, config.dtype.value),
            output_loading_info=True,
            **_placement(config, whole, gpus),
        )
        if report["missing_keys"]:
            raise ValueError(
                f"verifier.path {config.path!r}: transformers finds no weights for {min(report['missing_keys'])} and "
                f"{len(report['missing_keys']) - 1} more: fetch it again, or set dump.engine=vllm if it is quantised"
            )
        if config.dtype is Dtype.float32 and not getattr(model, "is_quantized", False):
            model = model.float()  # some that are dequantised, are so to bfloat16 whatever is asked for
        if gpus and "disk" in getattr(model, "hf_device_map", {}).values():
            raise ValueError(
                f"verifier.path {config.path!r} does not fit into the free memory of {len(gpus)} GPUs: "
                "start fewer ranks a node, each then has more of them"
            )
        if aux_layers is None:
            aux_layers = default_aux_layers(model.config.get_text_config().num_hidden_layers)
        return cls(model, tokenizer, aux_layers)

    @property
    def device(self) -> torch.device:
        """Return the device of the embedding, where tokens go in and states come out."""
        return self.model.device

    def place(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs besides tokens (pixels) on the verifier's device, numbers in its type."""
        dtype = self.model.get_input_embeddings().weight.dtype
        return {name: x.to(self.device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **arguments: Any) -> VerifierOutput:
        """Run the model on `input_ids` [B, T]; further arguments (cache, mask) go to it as they are."""
        self._positions = arguments.get("position_ids")
        if last := arguments.get("logits_to_keep"):  # as a slice they would be a view, for which lm_head is copied
            arguments["logits_to_keep"] = torch.arange(input_ids.shape[1] - last, input_ids.shape[1])
        try:
            output = self.model(input_ids=input_ids, **arguments)
        finally:
            self._positions = None
        captured, self._captured = self._captured, {}
        aux = torch.cat([captured[str(layer)].to(self.device) for layer in self.aux_layers], dim=-1)
        last = captured["last"].to(self.device)
        return VerifierOutput(output.logits.to(self.device), aux, last, getattr(output, "hidden_states", None))


def _placement(config: VerifierConfig, whole: Any, gpus: Sequence[int] | None) -> dict[str, Any]:
    """Return the arguments by which transformers places a model."""
    device = torch_device(config.device)
    warn_if_emulated("verifier.dtype", config.dtype, device)
    if config.tensor_parallel:
        place = read_rank_info(os.environ)
        if place.world == 1:
            raise ValueError(
                "verifier.tensor_parallel needs several ranks, and this process is alone: start it with "
                "`torchrun --nproc-per-node N -m fledge ...`, or set it to false"
            )
        if config.device is Device.cpu and torch.cuda.is_available():
            raise ValueError("verifier.device must be auto with verifier.tensor_parallel: transformers takes the GPUs")
        # srun sets others than those that transformers reads, and it takes its GPU from LOCAL_RANK.
        os.environ.update(place.environment(torch.cuda.device_count()))
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    num_gpus = torch.cuda.device_count() if gpus is None else len(gpus)
    if config.device is Device.auto and num_gpus > 1 and not (gpus is None and _fits(config, whole)):
        free = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus} if gpus else None
        return {"device_map": "auto", "max_memory": free}
    return {"device_map": {"": device}}


def _fits(config: VerifierConfig, whole: Any) -> bool:
    """Return whether the current GPU holds the verifier, with a quarter of its free memory left for what it computes.

    A quantised one counts as it is stored, unless it is dequantised on loading: transformers does so by itself if it
    lacks kernels for a format, or the GPU is too old for it.
    """
    stated = quantisation(whole)
    method = (stated or {}).get("quant_method")
    by_itself = method == "mxfp4" or (method == "fp8" and torch.cuda.get_device_capability() < (8, 9))
    if stated is None or stated.get("dequantize") or by_itself:
        size = empty_model(whole).num_parameters() * getattr(torch, config.dtype.value).itemsize
    else:
        size = VerifierWeights(config).num_bytes()
    return size <= 0.75 * torch.cuda.mem_get_info()[0]


def load_final_norm(config: VerifierConfig) -> nn.Module:
    """Load the norm after the last layer alone, as the module that transformers builds for it."""
    dtype = getattr(torch, config.dtype.value)
    decoder = find_decoder(empty_model(load_whole_config(config), dtype))
    tensors = VerifierWeights(config).final_norm(decoder.norm_name)
    try:
        decoder.norm.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"verifier.path {config.path!r} has another final norm than its config: {reason}") from None
    return decoder.norm.eval().requires_grad_(False)


def check_capture(verifier: Verifier, input_ids: Tensor) -> None:
    """Check on a batch [B, T] that the states captured are, to the bit, those that the model itself gives.

    Its `hidden_states[k + 1]` is the output of layer k, but the last, which has gone through the final norm.
    """
    path = f"verifier.path {verifier.model.name_or_path!r}"
    output = verifier.forward(input_ids.to(verifier.device), output_hidden_states=True, use_cache=False)
    states = output.hidden_states
    if states is None:
        print(f"{path}: the model gives no hidden_states that the captured ones could be compared with")
        return
    aux = output.aux_hidden_states.split(output.last_hidden_state.shape[-1], dim=-1)
    pairs = [
        (f"layer {layer} is not the model's hidden_states[{layer + 1}]", state, states[layer + 1])
        for layer, state in zip(verifier.aux_layers, aux, strict=True)
        if layer + 2 < len(states)
    ]
    pairs.append(("the final norm is not the model's last hidden state", output.last_hidden_state, states[-1]))
    for what, captured, own in pairs:
        if not torch.equal(captured, own.to(captured.device)):
            raise ValueError(
                f"{path}: the output of {what}, so fledge does not know this architecture well enough to record it"
            )
