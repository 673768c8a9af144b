"""A new head that begins as parts of its verifier."""

import torch
from torch import Tensor

from ...conf.schema import HeadInit, TrainConfig, VerifierConfig
from ..verifier.config import load_config
from ..verifier.weights import VerifierWeights
from .draft_head import DraftHead

_READ_EMBEDDINGS = [f"layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]


def parameters_of_verifier(head: DraftHead, verifier: VerifierConfig, train: TrainConfig) -> dict[str, Tensor]:
    """Return what `train.init` takes of the verifier, by the names of the head's parameters.

    `norm` is the final norm; `layers` that and the layers from `train.init_layer` on (null: the last ones), with an
    `fc` that selects the aux state nearest below them. The first layer reads [embedding, state]: what multiplies the
    state is the verifier's, and for the embedding zeros. So a head without `fc_norm` that goes on where an aux state
    ends has at step 0 the verifier's states after these layers: they foresee the token that is fed, not yet the next.

    ValueError says where the verifier's layers are of another form than the head's.
    """
    if train.init in (HeadInit.random, HeadInit.regression):
        return {}
    weights, text, config = VerifierWeights(verifier), load_config(verifier), head.config
    found = {f"norm.{name}": tensor for name, tensor in weights.final_norm().items()}
    ours = {"norm.weight": list(head.norm.weight.shape)}
    last = text.num_hidden_layers - config.num_layers
    first = last if train.init_layer is None else train.init_layer
    if train.init is HeadInit.layers:
        if not 0 <= first <= last:
            raise ValueError(
                f"train.init_layer must lie between 0 and {last}: the verifier has {text.num_hidden_layers} layers, "
                f"the head {config.num_layers}, got {first}"
            )
        ours |= {name: list(parameter.shape) for name, parameter in head.layers.named_parameters(prefix="layers")}
        ours |= {name: [ours[name][0], config.hidden_size] for name in _READ_EMBEDDINGS}
        del ours["layers.0.hidden_norm.weight"]
        for layer in range(config.num_layers):
            known = {name.rpartition(".")[0] for name in ours}
            found |= weights.layer(first + layer, f"layers.{layer}.", known)
    _check(found, ours, getattr(text, "hidden_act", "silu"), train.init)
    if train.init is HeadInit.layers:
        found |= {name: torch.cat([torch.zeros_like(found[name]), found[name]], 1) for name in _READ_EMBEDDINGS}
        found["layers.0.hidden_norm.weight"] = found.pop("layers.0.input_layernorm.weight")
        aux = max((place for place, layer in enumerate(config.aux_layers) if layer < first), default=0)
        found["fc.weight"] = torch.zeros(head.fc.weight.shape)
        found["fc.weight"][:, aux * config.hidden_size :].fill_diagonal_(1.0)
    return found


def _check(found: dict[str, Tensor], ours: dict[str, list[int]], activation: str, init: HeadInit) -> None:
    """Refuse a verifier with another activation than a Llama's (Gemma's norms are others too), or other shapes."""
    wrong = [f"hidden_act {activation}, not silu"] if activation != "silu" else []
    theirs = {name: list(tensor.shape) for name, tensor in found.items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in ours:
            wrong.append(f"a {name} that the head has not")
        elif theirs.get(name) != ours[name] and (name in theirs or not name.endswith(".bias")):
            wrong.append(f"{name} of shape {theirs[name]}, not {ours[name]}" if name in theirs else f"no {name}")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"train.init={init.name} needs a verifier of the head's form, and verifier.path has "
            f"{'; '.join(wrong[:4])}{more}: set draft.attention_bias, draft.qk_norm and the sizes of draft as the "
            "verifier has them, or train.init=random"
        )
