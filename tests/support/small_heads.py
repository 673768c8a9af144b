"""Small random heads and batches; needs torch and transformers alone."""

from __future__ import annotations

import torch
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead, initialise
from fledge.models.head.vocabulary import build_vocabulary
from fledge.train.loss.rows import PackedBatch

_PARTIAL = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_SPECULATORS = {"norm_before_fc": True, "fc_norm": False, "norm_output": True, "norm_before_residual": True}
# Forms of heads next to the default one and EAGLE-3: what each changes of `make_head`'s.
FORMS: dict[str, dict[str, object]] = {
    "norm_before_fc": {"norm_before_fc": True, "fc_norm": False},
    "norm_before_fc_and_fc_norm": {"norm_before_fc": True},
    "attention_bias": {"attention_bias": True},
    "qk_norm": {"qk_norm": True},
    "partial_rotation": {"rope_parameters": {"rope_type": "default", **_PARTIAL}},
    "partial_rotation_yarn": {"rope_parameters": {**_YARN, **_PARTIAL}},
    "speculators": _SPECULATORS,
    "three_layers": {"num_layers": 3},
    "five_layers_full_vocabulary": {"num_layers": 5, "draft_vocab_size": None},
    "window": {"num_layers": 2, "sliding_window": 6, "window_layers": (1,)},
    "four_aux_states": {"aux_layers": (0, 1, 3, 4)},
    "deep_with_all": {
        **{"num_layers": 3, "attention_bias": True, "qk_norm": True, "aux_layers": (0, 1, 3, 4)},
        **{"rope_parameters": {"rope_type": "default", **_PARTIAL}, **_SPECULATORS},
    },
}


def make_batch(
    lengths: list[int],
    seed: int = 0,
    vocab: int = 120,
    hidden: int = 32,
    aux: int = 3,
    dtype: torch.dtype = torch.float32,
) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return PackedBatch(
        input_ids=torch.randint(0, vocab, (total,), generator=generator),
        loss_mask=torch.rand(total, generator=generator) < 0.8,
        document=document,
        position=torch.cat([torch.arange(n) for n in lengths]),
        aux_hidden_states=torch.randn(total, aux * hidden, generator=generator).to(dtype),
        last_hidden_state=torch.randn(total, hidden, generator=generator).to(dtype),
        lengths=lengths,
        sample_ids=[str(i) for i in range(len(lengths))],
    )


def matrices(vocab: int = 120, hidden: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(vocab, hidden, generator=generator), torch.randn(vocab, hidden, generator=generator)


def make_head(
    seed: int = 0, draft_vocab_size: int | None = 100, noise: float = 0.3, vocab_size: int = 120, **changes: object
) -> DraftHead:
    """A small random head whose norms are not all ones, so that a forgotten norm shows."""
    values: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_vocab_size or vocab_size,
        "verifier_hidden_size": 32,
        "aux_layers": (1, 3, 4),
        "max_position_embeddings": 256,
        **changes,
    }
    config = DraftHeadConfig(**values)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 50, (vocab_size,), generator=generator)
    head = DraftHead(config, build_vocabulary(counts, config.draft_vocab_size))
    matrix = torch.randn(vocab_size, config.verifier_hidden_size, generator=generator)
    initialise(head, matrix.flip(0), matrix, seed)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() == 1:
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    return head


def leave_out_first_tokens(head: DraftHead, batch: PackedBatch, lm_head: torch.Tensor) -> None:
    """Let the draft vocabulary begin behind token 0, and the verifier find that likeliest at every other position."""
    num_outside = len(head.t2d) - len(head.d2t)
    head.d2t.fill_(num_outside)
    head.t2d.copy_(torch.arange(len(head.t2d)) >= num_outside)
    assert batch.last_hidden_state is not None
    batch.last_hidden_state[::2] = lm_head[0]


def assert_same_with_gradients(
    found: list[torch.Tensor],
    expected: list[torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    generator: torch.Generator,
) -> None:
    """Compare outputs in float64, and the gradients of `inputs` under drawn weights, to 1e-9."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in found]
    gradients = [
        torch.autograd.grad(sum((out * w).sum() for out, w in zip(outs, weights, strict=True)), inputs)
        for outs in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
