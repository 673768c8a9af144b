"""How the embedded verifier was made: `python tests/tools/make_embedded.py FOLDER`, ten minutes on two cores.

A small Llama and its tokenizer are trained on the conversations of models/embedded. Tests make smaller ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from filelock import FileLock
from fledge.conf.runtime.progress import Progress
from fledge.models.embedded.verifier import conversations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, PAD, START, MESSAGE, END = "<|begin|>", "<|pad|>", "<|start|>", "<|message|>", "<|end|>"
SPECIAL_TOKENS = (BOS, PAD, START, MESSAGE, END)

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    f"{{{{- '{START}' + message['role'] + '{MESSAGE}' -}}}}"
    "{%- if message['role'] == 'assistant' -%}"
    f"{{%- generation -%}}{{{{- message['content'] + '{END}' -}}}}{{%- endgeneration -%}}"
    "{%- else -%}"
    f"{{{{- message['content'] + '{END}' -}}}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{START}assistant{MESSAGE}' -}}}}{{%- endif -%}}"
)

_TOKENIZER_CONVERSATIONS = 4000
_LOSS_WINDOW = 100


@dataclass(frozen=True)
class EmbeddedSettings:
    """Sizes and training of the embedded verifier; equal settings give equal weights on one machine.

    `batch_tokens` is the number of padded tokens of a step at most, `max_length` cuts a conversation off (tokens),
    `other_weight` is the loss weight of the tokens that are not part of an assistant's answer. `init` and
    `embedding_init` are the standard deviations of the initial weights and of the initial token embeddings.
    """

    hidden_size: int = 192
    num_layers: int = 8
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    max_positions: int = 2048
    vocab_size: int = 1600
    num_conversations: int = 12000
    steps: int = 2600
    batch_tokens: int = 640
    max_length: int = 512
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    other_weight: float = 0.2
    init: float = 0.06
    embedding_init: float = 0.5
    seed: int = 0


TINY = EmbeddedSettings(
    hidden_size=64,
    num_layers=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=128,
    vocab_size=600,
    num_conversations=400,
    steps=240,
    lr=4e-3,
)  # of tests


# tokenizer ----------------------------------------------------------------------------------------------------------


def make_tokenizer(settings: EmbeddedSettings) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with the chat template on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    first = conversations()[: min(settings.num_conversations, _TOKENIZER_CONVERSATIONS)]
    texts = (text for messages in first for message in messages for text in (message["role"], message["content"]))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, MESSAGE],
        chat_template=CHAT_TEMPLATE,
        model_max_length=settings.max_positions,
        clean_up_tokenization_spaces=False,
    )


# data ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One tokenized conversation: token ids and the loss weight of each."""

    ids: list[int]
    weights: list[float]


def make_document(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], settings: EmbeddedSettings
) -> Document:
    """Render `messages` as the chat template does, with weight 1 on answers and their end-of-turn token."""
    bos, start, message_id, end = (tokenizer.get_vocab()[token] for token in (BOS, START, MESSAGE, END))
    ids: list[int] = [bos]
    weights = [settings.other_weight]
    for message in messages:
        header = [start, *tokenizer.encode(message["role"], add_special_tokens=False), message_id]
        body = [*tokenizer.encode(message["content"], add_special_tokens=False), end]
        ids += header + body
        body_weight = 1.0 if message["role"] == "assistant" else settings.other_weight
        weights += [settings.other_weight] * len(header) + [body_weight] * len(body)
    return Document(ids[: settings.max_length], weights[: settings.max_length])


def _grouped(documents: list[Document], batch_tokens: int) -> list[list[Document]]:
    """Group `documents` by length into batches of at most `batch_tokens` padded tokens (one document at least)."""
    batches: list[list[Document]] = [[]]
    for document in sorted(documents, key=lambda item: len(item.ids)):
        if batches[-1] and (len(batches[-1]) + 1) * len(document.ids) > batch_tokens:
            batches.append([])
        batches[-1].append(document)
    return batches


def _batches(documents: list[Document], settings: EmbeddedSettings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches without end: token ids (B, T) and loss weights (B, T), right-padded with weight 0."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        batches = _grouped([documents[index] for index in order], settings.batch_tokens)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield _padded(batches[index])


def _padded(batch: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the ids (B, T) and weights (B, T) of `batch`, T its longest document."""
    length = max(len(document.ids) for document in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    weights = torch.zeros(len(batch), length)
    for row, document in enumerate(batch):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        weights[row, : len(document.ids)] = torch.tensor(document.weights)
    return ids, weights


# training -----------------------------------------------------------------------------------------------------------


def make_model(settings: EmbeddedSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained Llama with the tokenizer's special ids, initialized by `_initialize`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _initialize(model, settings)
    return model


def _initialize(model: LlamaForCausalLM, settings: EmbeddedSettings) -> None:
    """Draw the weights such that attending to a token names it from the first step on.

    The head starts as the scaled embeddings (untied), and every attention head writes what it reads: its output matrix
    starts as half its value matrix, transposed. So few steps teach the model to copy names and numbers of the prompt.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            deep = settings.init / math.sqrt(2 * settings.num_layers)
            parameter.normal_(0.0, deep if name.endswith("down_proj.weight") else settings.init)
    model.model.embed_tokens.weight.normal_(0.0, settings.embedding_init)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight * (settings.init / settings.embedding_init))
    group = settings.num_heads // settings.num_kv_heads
    for layer in model.model.layers:
        values = layer.self_attn.v_proj.weight.unflatten(0, (settings.num_kv_heads, settings.head_dim))
        layer.self_attn.o_proj.weight.copy_(values.repeat_interleave(group, 0).flatten(0, 1).T / 2)


def _rate(step: int, settings: EmbeddedSettings) -> float:
    """Give the learning rate of `step`: linear warm-up, then a cosine down to a twentieth."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def weighted_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the weighted mean loss and, detached, the mean loss over answer tokens alone (nats a token)."""
    logits = model(ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    answer = weights == 1.0
    return (losses * weights).sum() / weights.sum(), losses.detach()[answer].mean()


def train(model: LlamaForCausalLM, documents: list[Document], settings: EmbeddedSettings) -> list[float]:
    """Train `model` in place for `settings.steps` steps; return the answer loss of each (nats)."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
    progress = Progress("embedded verifier", settings.steps, "step")
    losses: list[float] = []
    model.train()
    for step, (ids, weights) in enumerate(islice(_batches(documents, settings), settings.steps)):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, settings)
        loss, answer_loss = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(answer_loss))
        progress.update()
    progress.close()
    model.eval()
    return losses


def make_embedded(settings: EmbeddedSettings, folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Write a checkpoint into `folder`; return the mean answer loss of its last steps (nats)."""
    tokenizer = make_tokenizer(settings)
    documents = [
        make_document(tokenizer, messages, settings) for messages in conversations()[: settings.num_conversations]
    ]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(settings.seed)
        model = make_model(settings, tokenizer)
        losses = train(model, documents, settings)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(losses[-_LOSS_WINDOW:]) / len(losses[-_LOSS_WINDOW:])


def shared_embedded(settings: EmbeddedSettings) -> Path:
    """Return the folder of a checkpoint that the first process of this machine to ask makes for all."""
    parts = [asdict(settings), Path(__file__).read_text(), torch.__version__]
    name = f"fledge-embedded-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=name))
            make_embedded(settings, unfinished)
            unfinished.rename(folder)
    return folder


if __name__ == "__main__":
    print(f"answer loss {make_embedded(EmbeddedSettings(), Path(sys.argv[1]), torch.bfloat16):.4f}")
