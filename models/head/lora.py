"""LoRA of a draft head (arXiv:2106.09685): low-rank changes of its matrices, the only weights that are trained.

A head is saved with its changes added, so that checkpoints and exports are heads like any other.
"""

import torch
from torch import Tensor, nn

from .draft_head import DraftHead, OutputHead

_SCALE = 2.0  # of a change: LoRA's alpha is twice its rank
_NAME = "lora"


class _Change(nn.Module):
    """What is added to a product with a matrix [out, in]: scale * up @ down, nothing at first."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        width = weight.shape[1]
        self.down = nn.Parameter((torch.randn(rank, width, generator=generator, device="cpu") / width**0.5).to(weight))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down[:, columns]), self.up * _SCALE)


def choose_trained(head: DraftHead, lm_head: bool, lora_rank: int | None, seed: int) -> None:
    """Freeze what is not trained: `lm_head` unless it is; with a rank all but the changes, which are added here."""
    head.lm_head.requires_grad_(lm_head)
    if lora_rank:
        _add_changes(head, lora_rank, seed)


def num_parameters(head: DraftHead) -> tuple[int, int]:
    """Return how many parameters a head has, and how many of them are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in head.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _add_changes(head: DraftHead, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head.requires_grad_(False)
    for module in list(head.modules()):
        if isinstance(module, nn.Linear) and not isinstance(module, OutputHead):
            module.add_module(_NAME, _Change(module.weight, rank, generator))
            module.register_forward_hook(lambda module, inputs, output: output + module.lora(*inputs))


@torch.no_grad()
def merged_weights(head: DraftHead) -> dict[str, Tensor]:
    """Return a head's state dict with its changes, if it has any, added to their matrices in float32."""
    weights = {name: weight for name, weight in head.state_dict().items() if f".{_NAME}." not in name}
    for name, module in head.named_modules():
        if isinstance(module, _Change):
            weight = f"{name.removesuffix(_NAME)}weight"
            weights[weight] = weights[weight].float() + _SCALE * module.up.float() @ module.down.float()
    return weights
