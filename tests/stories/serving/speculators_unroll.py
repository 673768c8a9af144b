"""Run in vLLM's environment: make a random EAGLE-3 head by the speculators library's own training code, save it as the
library saves its heads, and unroll it as the library trains.

    python speculators_unroll.py REQUEST.json

The request: {"verifier", "folder", "vocab_size", "draft_vocab_size", "lengths": [tokens of a document, ...],
"ttt_steps"}, and "options", fields of the library's TrainConfig. The answer: {"unroll": FILE}, safetensors of the
token ids and states drawn for the documents, laid end to end, and `logits.K` of step K, without a document's last row.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import torch
from offline_vllm import read_request
from safetensors.torch import save_file
from speculators import SpeculatorModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.cli import build_draft_model
from speculators.train.config import TrainConfig
from torch import Tensor

TRAINED = ("layers.", "fc", "input_norm", "norm.")  # else the verifier's


def make_head(request: dict[str, Any], draw: torch.Generator) -> Any:
    """Build the library's head, its defaults for whatever is not asked, and draw the weights that it would train."""
    vocab, size = request["vocab_size"], request["draft_vocab_size"]
    options = {"verifier_name_or_path": request["verifier"], "draft_attn_impl": "sdpa", **request["options"]}
    arguments = argparse.Namespace(**TrainConfig.from_flat(options).flatten())
    kept = torch.randperm(vocab, generator=draw)[:size].sort().values
    t2d = torch.zeros(vocab, dtype=torch.bool).index_fill(0, kept, True)
    d2t = kept - torch.arange(size)
    head = build_draft_model(arguments, SpeculatorModel.registry["eagle3"], t2d, d2t, size)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if name.startswith(TRAINED):
                values = torch.randn(weight.shape, generator=draw)
                weight.copy_(1 + 0.3 * values if weight.dim() == 1 else values * weight.shape[-1] ** -0.5)
    return head


def draw_documents(request: dict[str, Any], head: Any, draw: torch.Generator) -> list[dict[str, Tensor]]:
    """Draw what the library's data loader reads of each document."""
    hidden, num_aux = head.hidden_size, len(head.target_layer_ids)
    return [
        {
            "input_ids": torch.randint(request["vocab_size"], (length,), generator=draw),
            "hidden_states": torch.randn(length, num_aux * hidden, generator=draw),
            "verifier_last_hidden_states": torch.randn(length, hidden, generator=draw),
            "loss_mask": torch.ones(length, dtype=torch.bool),
            "lengths": torch.tensor([length]),
            "position_ids": torch.arange(length),
        }
        for length in request["lengths"]
    ]


def main() -> None:
    request, draw = read_request(), torch.Generator().manual_seed(0)
    head = make_head(request, draw)
    head.save_pretrained(request["folder"])
    documents = draw_documents(request, head, draw)
    shifted = [shift_batch(document) for document in documents]
    batch = {name: torch.cat([part[name] for part in shifted])[None] for name in shifted[0] if name != "lengths"}
    lengths = torch.cat([part["lengths"] for part in shifted])
    logits: list[Tensor] = []
    head.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    del batch["verifier_last_hidden_states"], batch["loss_mask"]  # no loss: the logits alone
    with torch.no_grad():
        document_ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
        head(**batch, document_ids=document_ids, ttt_steps=request["ttt_steps"])
    drawn = {name: torch.cat([document[name] for document in documents]) for name in ("input_ids", "hidden_states")}
    steps = {f"logits.{step}": values.contiguous() for step, values in enumerate(logits)}
    path = Path(request["folder"]).with_suffix(".safetensors")
    save_file({**drawn, **steps}, path)
    print("ANSWER " + json.dumps({"unroll": str(path)}))


if __name__ == "__main__":
    main()
