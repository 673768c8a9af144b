"""Train a peer's head on the data of a run: `PEER/bin/python tests/benchmarks/peers.py run=RUN out=RUN2`.

It takes the run's samples in their order, as many steps, and draft vocabulary; model, loss, optimizer, clipping and
schedule are the peer's own. The head is imported and judged by fledge's walk; RUN2 is laid out as a training, so
`fledge compare RUN RUN2` and `fledge evaluate` take it. Runs in an environment of the peer's with hydra-core, filelock
and xxhash, with fledge on PYTHONPATH.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from benchmark_options import parse_options
from fledge.conf.cli.python_api import load_config
from fledge.conf.schema import Config
from fledge.models.formats.plain import save_head
from fledge.models.formats.published import read_published_head
from fledge.models.formats.training_folder import HELDOUT_WALKS
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.vocabulary import VocabularyMap
from fledge.models.verifier.config import load_config as load_verifier_config
from fledge.models.verifier.config import logit_transform
from fledge.models.verifier.weights import VerifierWeights
from fledge.train.data.training_data import TrainingData
from fledge.train.heldout import acceptance_lengths, count_heldout
from fledge.train.loss.rows import PackedBatch
from fledge.train.loss.unroll import TTTModule
from torch import Tensor, nn


@dataclass
class Options:
    """What is trained. Zeros are the peer's defaults, which is what `fledge` is compared with."""

    run: str = ""  # a trained run of fledge
    out: str = ""  # a folder to be made
    peer: str = "speculators"
    optimizer: str = "muon"  # of Speculators; SpecForge has AdamW alone
    lr: float = 0.0
    ttt_steps: int = 0
    steps: int = 0  # 0: as the run
    seed: int = 0


@dataclass
class Peer:
    """A model of a peer, and how it is trained."""

    model: nn.Module
    loss: Callable[[PackedBatch], Tensor]
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any]
    max_grad_norm: float
    save: Callable[[Path], None]  # in the peer's format


def speculators(config: Config, options: Options, vocabulary: VocabularyMap, aux: list[int], steps: int) -> Peer:
    """Speculators 0.9.0 with its defaults: norms before fc and residual, frozen lm_head, 3 TTT steps, Muon at 1e-3."""
    from speculators.models.eagle3 import Eagle3DraftModel
    from speculators.train.config.schema import DraftArgs, OptimizerArgs
    from speculators.train.optimizers import build_optimizers
    from transformers import LlamaConfig, get_linear_schedule_with_warmup

    shape = load_verifier_config(config.verifier).to_dict() | {"num_hidden_layers": 1}
    defaults, training = DraftArgs(), OptimizerArgs(optimizer=options.optimizer)
    training.lr = options.lr or training.lr
    training.muon_lr = training.lr
    ttt_steps = options.ttt_steps or 3
    model = Eagle3DraftModel.from_training_args(
        LlamaConfig(**shape),
        t2d=vocabulary.t2d.bool(),
        d2t=vocabulary.d2t,
        verifier_name_or_path=config.verifier.path,
        target_layer_ids=aux,
        draft_vocab_size=len(vocabulary.d2t),
        norm_before_residual=defaults.norm_before_residual,
        norm_before_fc=True,
        norm_output=True,
        ttt_steps=ttt_steps,
        draft_attn_impl="sdpa",
    )
    model.verifier_norm = nn.Identity()  # stored last states are normed
    trainer_kwargs, _ = model.get_trainer_kwargs(
        loss_fn="kl_div", loss_implementation="eager", ttt_steps=ttt_steps, ttt_step_loss_decay=1.0
    )

    def loss(batch: PackedBatch) -> Tensor:
        aux_states, last = batch.states
        keep = batch.position.nonzero().squeeze(1)
        before = keep - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.dtype.value == "bfloat16"):
            _, value, _ = model(
                hidden_states=aux_states[before][None],
                input_ids=batch.input_ids[keep][None],
                document_ids=batch.document[keep][None],
                loss_mask=batch.loss_mask[keep][None],
                position_ids=batch.position[keep][None],
                verifier_last_hidden_states=last[keep][None],
                **trainer_kwargs,
            )
        return value

    optimizers = build_optimizers(model, training)
    schedulers = [get_linear_schedule_with_warmup(one, steps // 100, steps) for one in optimizers]
    return Peer(model, loss, optimizers, schedulers, 1.0, lambda folder: model.save_pretrained(folder))


def specforge(config: Config, options: Options, vocabulary: VocabularyMap, aux: list[int], steps: int) -> Peer:
    """SpecForge 0.2.0 with its defaults: AdamW, clip 0.5, cosine, 7 TTT steps, an lm_head from random numbers.

    Its loss kernel needs a GPU: its own PyTorch form of the loss takes the place. Documents are rows of a batch.
    """
    sys.modules["triton"] = sys.modules["triton.language"] = MagicMock()
    from specforge.algorithms.eagle3 import model as eagle3
    from specforge.core.loss import _compute_loss
    from specforge.lr_scheduler import CosineAnnealingWarmupLR
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from transformers import LlamaConfig

    eagle3.LogSoftmaxLoss.apply = _compute_loss
    shape = load_verifier_config(config.verifier).to_dict()
    shape |= {
        "num_hidden_layers": 1,
        "draft_vocab_size": len(vocabulary.d2t),
        "architectures": ["LlamaForCausalLMEagle3"],
    }
    draft = LlamaForCausalLMEagle3(LlamaConfig(**shape), attention_backend="sdpa")
    weights = VerifierWeights(config.verifier)
    lm_head = weights.lm_head()
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(weights.embedding())
        draft.t2d.copy_(vocabulary.t2d.bool())
        draft.d2t.copy_(vocabulary.d2t)
    draft.freeze_embedding()
    model = eagle3.OnlineEagle3Model(draft, length=options.ttt_steps or 7)

    def loss(batch: PackedBatch) -> Tensor:
        mask = batch.loss_mask.long()
        mask[torch.tensor(batch.lengths).cumsum(0) - 1] = 0  # as its reader does
        parts = (tensor.split(batch.lengths) for tensor in (batch.input_ids, mask, *batch.states))
        ids, mask, aux_states, last = (nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in parts)
        attended = nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.long) for n in batch.lengths], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.dtype.value == "bfloat16"):
            target = shifted(last) @ lm_head.T
            losses, *_ = model(shifted(ids), attended, target, mask[..., None], aux_states)
        return sum(0.8**step * value for step, value in enumerate(losses))

    def shifted(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], 1)

    def save(folder: Path) -> None:
        draft.save_pretrained(folder)
        content = json.loads((folder / "config.json").read_text())
        content["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": aux, "use_aux_hidden_state": True}
        (folder / "config.json").write_text(json.dumps(content))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr or 1e-4, weight_decay=0.0)
    scheduler = CosineAnnealingWarmupLR(optimizer, total_steps=steps, warmup_steps=int(0.015 * steps))
    return Peer(model, loss, [optimizer], [scheduler], 0.5, save)


PEERS = {"speculators": speculators, "specforge": specforge}


def batches(data: TrainingData, ttt_steps: int) -> Iterator[PackedBatch]:
    """Yield the run's packs in float32."""
    for batch in data.batches(0):
        yield batch.to(torch.device("cpu"), torch.float32, ttt_steps)


def walk(config: Config, data: TrainingData, folder: Path, target: Path, steps: int) -> dict[str, float]:
    """Judge the head in a folder by fledge's held-out walk, and write it and the walk as a checkpoint."""
    weights, verifier = VerifierWeights(config.verifier), load_verifier_config(config.verifier)
    head = read_published_head(folder, verifier, weights=weights).head
    lengths = sorted({config.evaluate.draft_depth, config.train.ttt_steps})
    module = TTTModule(head, lengths[-1], config.train.gamma, transform=logit_transform(verifier))
    heldout = (b.to(torch.device("cpu"), torch.float32, lengths[-1]) for b in data.heldout_batches(lengths[-1]))
    counts = count_heldout(module, heldout, weights.embedding(), weights.lm_head(), lengths)
    checkpoint = target / "training" / "checkpoints" / f"step-{steps}"
    checkpoint.mkdir(parents=True)
    record = {"verifier": data.stores[0].manifest["settings"]["verifier"], "step": steps}
    save_head(checkpoint, head, record, torch.float32)
    walks = {depth: {name: dataclasses.asdict(one) for name, one in of.items()} for depth, of in counts.items()}
    (checkpoint / HELDOUT_WALKS).write_text(json.dumps(walks))
    return acceptance_lengths(counts)


def main(options: Options) -> None:
    """Train, walk, and print one JSON line."""
    config = load_config("tracking.report_to=[]", file=Path(options.run) / "training" / "config.yaml")
    config.train.data_workers = 0
    shape = DraftHeadConfig.from_verifier(config.draft, load_verifier_config(config.verifier))
    torch.manual_seed(options.seed)
    with TrainingData(config.train, config.verifier, config.hidden_states_folder, shape) as data:
        packs = config.train.packs_per_step
        steps = options.steps or config.train.max_steps or config.train.epochs * data.packs_per_epoch // packs
        peer = PEERS[options.peer](config, options, data.vocabulary, list(shape.aux_layers), steps)
        trained = sum(p.numel() for p in peer.model.parameters() if p.requires_grad)
        wall, cpu = time.perf_counter(), time.process_time()
        stream = batches(data, config.train.ttt_steps)
        # torch's Muon multiplies in bfloat16, which most CPUs emulate: as train.dtype says, like fledge's own.
        products = torch.Tensor.bfloat16 if config.train.dtype.value == "bfloat16" else torch.Tensor.float
        for step in range(steps):
            values = []
            for batch in islice(stream, packs):
                loss = peer.loss(batch) / packs
                loss.backward()
                values.append(float(loss.detach()))
            nn.utils.clip_grad_norm_(peer.model.parameters(), peer.max_grad_norm)
            with patch.object(torch.Tensor, "bfloat16", products):
                for one in (*peer.optimizers, *peer.schedulers):
                    one.step()
            for one in peer.optimizers:
                one.zero_grad()
            if step % 20 == 0:
                print(f"step {step} loss {sum(values):.3f} {time.perf_counter() - wall:.0f} s", file=sys.stderr)
        seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        published = Path(options.out) / "published"
        shutil.rmtree(options.out, ignore_errors=True)
        peer.save(published)
        lengths = walk(config, data, published, Path(options.out), steps)
    rounded = {name: round(value, 4) for name, value in (seconds | lengths).items()}
    print(json.dumps({**dataclasses.asdict(options), "steps": steps, "trained_parameters": trained, **rounded}))


if __name__ == "__main__":
    main(parse_options(sys.argv[1:], Options()))
