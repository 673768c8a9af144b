"""Single tensors of a verifier's checkpoint, read without loading the model, and the identity that they give it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...conf.runtime.artifact import differences
from ...conf.schema import VerifierConfig
from .config import (
    MERGED,
    checkpoint_file,
    empty_model,
    load_config,
    load_tokenizer,
    load_whole_config,
    refuse_adapter,
    tokenizer_identity,
)
from .quantised import dense_matrix, quantisation

_TOWERS = ("vision", "visual", "audio")  # in the names of what is no part of the text decoder


class VerifierWeights:
    """Tensors of the text decoder, found through the safetensors index, whatever the names of what it is inside."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        index = checkpoint_file(config, "model.safetensors.index.json")
        if index is not None:
            self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]  # by the name of a tensor
        else:
            single = checkpoint_file(config, "model.safetensors")
            if single is None:
                refuse_adapter(config)
                raise ValueError(
                    f"verifier.path {config.path!r} holds no safetensors weights (model.safetensors or its index)"
                )
            with self._open(single) as weights:
                self.files = dict.fromkeys(weights.keys(), "model.safetensors")

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except Exception as error:  # safetensors raises its own bare Exception type
            raise ValueError(f"{path} cannot be read as safetensors ({error}): fetch the verifier again") from None

    def _path(self, file: str) -> Path:
        path = checkpoint_file(self._config, file)
        if path is None:
            raise ValueError(f"verifier.path {self._config.path!r}: {file} is named by the index and missing")
        return path

    def _module(self, name: str) -> str | None:
        """Return the text decoder's module of that name: of several the least nested; prediction heads are more so."""
        modules = {tensor.rpartition(".")[0] for tensor in self.files}
        named = [m for m in modules if m.split(".")[-1] == name and not any(tower in m for tower in _TOWERS)]
        return min(named, key=lambda m: (m.count("."), len(m), m)) if named else None

    def _parameters(self, module: str | None) -> dict[str, str]:
        """Return the parameters of a module, and their names in the checkpoint."""
        return {name.rpartition(".")[2]: name for name in sorted(self.files) if name.rpartition(".")[0] == module}

    def _tensors(self, module: str | None) -> dict[str, Tensor]:
        tensors = {}
        for parameter, name in self._parameters(module).items():
            with self._open(self._path(self.files[name])) as weights:
                tensors[parameter] = weights.get_tensor(name)
        return tensors

    def _matrix(self, module: str) -> Tensor:
        stated = quantisation(load_whole_config(self._config))
        return dense_matrix(self._config, stated, module, self._tensors(module))

    def _embedding(self) -> str:
        """Return the embedding's module, by the usual name or by the one that transformers' model has for it."""
        module = self._module("embed_tokens") or self._module_of("get_input_embeddings")
        if module is None:
            raise ValueError(
                f"verifier.path {self._config.path!r} has no tensor *.embed_tokens.weight, and none that "
                "transformers loads as its embedding: fetch the verifier again, some of it is missing"
            )
        return module

    def _lm_head(self) -> str | None:
        """Return the output matrix's module; None if the configuration says that the embedding is it."""
        whole = load_whole_config(self._config)
        module = self._module("lm_head")
        if module or any(getattr(part, "tie_word_embeddings", False) for part in (whole, whole.get_text_config())):
            return module
        module = self._module_of("get_output_embeddings")
        if module is None:
            raise ValueError(
                f"verifier.path {self._config.path!r} has no tensor *.lm_head.weight, and its config.json does "
                "not tie it to the embedding (tie_word_embeddings): fetch the verifier again, some of it is missing"
            )
        return module

    def _module_of(self, getter: str) -> str | None:
        """Return the module that transformers loads into what a method of its model gives; None if there is none."""
        model = empty_model(load_whole_config(self._config))
        part, states, transforms = getattr(model, getter)(), model.state_dict(), get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        ours = {name for name, module in model.named_modules() if module is part}
        for name in self.files:
            loaded, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, states)
            if loaded.rpartition(".")[0] in ours:
                return name.rpartition(".")[0]
        return None

    def embedding(self) -> Tensor:
        """Read the token embedding [V, H]."""
        return self._matrix(self._embedding())

    def lm_head(self) -> Tensor:
        """Read the output matrix [V, H]; the embedding if the verifier's configuration says that the two are one."""
        return self._matrix(self._lm_head() or self._embedding())

    def check(self) -> None:
        """Raise ValueError by the name of a matrix that is missing or of another shape than config.json says.

        Nothing but headers is read.
        """
        text, embedding = load_config(self._config), self._embedding()
        for module in dict.fromkeys((embedding, self._lm_head() or embedding)):
            name = self._parameters(module).get("weight")
            if name is None:
                continue  # packed
            with self._open(self._path(self.files[name])) as weights:
                shape = weights.get_slice(name).get_shape()
            rows_fit = shape[0] >= text.vocab_size if module == embedding else shape[0] == text.vocab_size
            if shape[1:] != [text.hidden_size] or not rows_fit:
                raise ValueError(
                    f"verifier.path {self._config.path!r}: a head needs {name} of vocab_size={text.vocab_size} rows of "
                    f"hidden_size={text.hidden_size}, as config.json says, and it is {shape}: take another verifier, "
                    "or fetch it again if its files do not belong together"
                )

    def layer(self, number: int, prefix: str, modules: set[str]) -> dict[str, Tensor]:
        """Read a decoder layer, which lies next to the embedding, by the names of its parameters after a prefix.

        Of other modules than these nothing is read, and their weights have no elements.
        """
        above, dot, _ = self._embedding().rpartition(".")
        place, found = f"{above}{dot}layers.{number}.", dict[str, Tensor]()
        names = (name for name in self.files if name.startswith(place) and not name.endswith(".inv_freq"))
        for module in sorted({name.rpartition(".")[0] for name in names}):
            name = prefix + module.removeprefix(place)
            found[f"{name}.weight"] = self._matrix(module) if name in modules else torch.empty(0)
            if "bias" in self._parameters(module):
                found[f"{name}.bias"] = self._tensors(module)["bias"]
        return found

    def num_bytes(self) -> int:
        """Return the size of all files of weights."""
        return sum(self._path(file).stat().st_size for file in set(self.files.values()))

    def final_norm(self, name: str = "norm") -> dict[str, Tensor]:
        """Read the parameters of the norm after the last layer, which lies next to the embedding under that name."""
        return self._tensors(self._final_norm(name))

    def _final_norm(self, name: str) -> str | None:
        above, dot, _ = self._embedding().rpartition(".")
        sibling = above + dot + name
        return sibling if self._parameters(sibling) else self._module(name)

    def fingerprint(self) -> str:
        """Hash the scheme of a quantised checkpoint, its tensors' names, and some first rows (16 hex digits).

        They are those of every tensor in the files that training needs: in a single-file checkpoint of all tensors.
        """
        state = hashlib.sha256(json.dumps(sorted(self.files)).encode())
        stated = quantisation(load_whole_config(self._config))
        if stated is not None:
            state.update(json.dumps(stated, sort_keys=True, default=str).encode())
        modules = (self._embedding(), self._lm_head(), self._final_norm("norm"))
        needed = {self.files[name] for module in modules for name in self._parameters(module).values()}
        for file in sorted(needed):
            with self._open(self._path(file)) as weights:
                for name in sorted(weights.keys()):
                    part = weights.get_slice(name)
                    row = part[0:1] if part.get_shape() else weights.get_tensor(name)
                    state.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return state.hexdigest()[:16]


def verifier_identity(config: VerifierConfig) -> dict[str, Any]:
    """Return what a manifest says of a verifier: artifacts made with one identity are refused with another."""
    outline = verifier_outline(config)
    return {"fingerprint": VerifierWeights(config).fingerprint(), **outline}


def verifier_outline(config: VerifierConfig) -> dict[str, Any]:
    """Return the part of a verifier's identity that its small files tell, for use without its weights."""
    text, tokenizer, merged = load_config(config), load_tokenizer(config), checkpoint_file(config, MERGED)
    return {
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        **tokenizer_identity(tokenizer),
        **({"merged": json.loads(merged.read_text())["key"]} if merged else {}),
    }


def check_identity(recorded: dict[str, Any], config: VerifierConfig, what: str, cure: str) -> None:
    """Refuse an artifact that was made with another verifier than the configured one.

    Args:
        recorded: the identity in the artifact's manifest.
        what: the artifact, as the message begins.
        cure: what to do about it, as it ends.
    """
    if changes := differences(recorded, verifier_identity(config)):
        raise ValueError(
            f"{what} belongs to another verifier than verifier.path={config.path} ({'; '.join(changes)}): {cure}"
        )
