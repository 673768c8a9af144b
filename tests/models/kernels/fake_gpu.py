"""The code for GPUs run on tensors that have a device and a shape and no memory, and so no values.

Such a run shows tensors of two devices in one operation, results whose shape does not fit, every wait for the device
(a value read is an error), how often kernels are launched and with what, and the memory at every moment, for shapes
that fit no machine at hand. It shows nothing of values. A process of its own, with fake_gpu.cpp loaded: one command,
`step "OPTION=VALUE ..." ...` (a training step each), `fit ...` (a new head each), `decode` or `dump`, prints one JSON
line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import training_step
from fledge.conf.schema import DraftSampling
from fledge.data_synthesis.states.transformers_engine import TransformersEngine
from fledge.data_synthesis.store.host_copies import on_host
from fledge.data_synthesis.store.shard import Sample, Shard
from fledge.data_synthesis.store.state_format import FLOAT8, StateFormat
from fledge.eval.decoding.acceptance import AcceptanceRule
from fledge.eval.decoding.prompt_lookup import NoDraft
from fledge.models.head.draft_head import DraftHead
from fledge.models.head.vocabulary import VocabularyMap
from fledge.models.verifier.model import Verifier
from fledge.train import regression
from fledge.train.loss.losses import LOSSES
from fledge.train.loss.rows import PackedBatch
from fledge.train.loss.unroll import TTTModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton.runtime.jit import JITFunction

FAKE = FakeTensorMode()
LAUNCHED: Counter[str] = Counter()


class Memory(TorchDispatchMode):
    """Adds up the bytes of the storages that live on the GPU."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._now = self.peak = 0
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "cuda" or key in self._live:
            return
        self._live[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._now -= self._live.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result


def launch(kernel: Any, *args: Any, grid: Any, **named: Any) -> None:
    """Stand for the launch of a Triton kernel: every argument is there, its tensors on the GPU, its grid possible."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
    assert set(kernel.arg_names) <= set(values), (kernel.__name__, set(kernel.arg_names) - set(values))
    for name in kernel.arg_names:
        assert not isinstance(values[name], Tensor) or values[name].is_cuda, (kernel.__name__, name)
    sizes = grid(values) if callable(grid) else grid
    assert all(0 <= size < 2**16 for size in sizes[1:]), (kernel.__name__, sizes)
    assert 0 <= sizes[0] < 2**31, (kernel.__name__, sizes)
    LAUNCHED[kernel.__name__] += 1


def stand_in(shared_kib: int = 227) -> None:
    """Replace what a driver would answer."""
    JITFunction.run = launch
    torch.cuda.device_of = lambda _: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(shared_memory_per_block_optin=shared_kib << 10)


def run_step(arguments: str) -> dict[str, Any]:
    """Run forward and backward of a training step; options as those of `python tests/benchmarks/training_step.py`."""
    LAUNCHED.clear()
    options = training_step.parse(["device=cuda", "dtype=bfloat16", *arguments.split()])
    dtype, ttt_steps = getattr(torch, options.dtype), options.ttt_steps
    tokens = training_step.draw_batch(options)
    tokens = dataclasses.replace(tokens, useful=tokens.useful_rows(ttt_steps))
    with FAKE:
        head, embedding, lm_head = _models(options, dtype)
        batch = _moved(tokens, options, dtype)
        module = TTTModule(
            head,
            ttt_steps,
            0.8,
            LOSSES[options.loss],
            recompute=options.recompute,
            kernels=options.triton,
            kl_rows=training_step.loss_kernel(options),
        )
        memory = Memory(*head.parameters(), *batch.states, embedding, lm_head)
        with memory:
            loss, sums = module(batch, embedding, lm_head)
            loss.backward()
    without = [name for name, parameter in head.named_parameters() if parameter.grad is None]
    return {"peak": memory.peak, "without_gradient": without, "sums": list(sums.shape), "launched": dict(LAUNCHED)}


def run_fit(arguments: str) -> dict[str, Any]:
    """Fit a new head to two packs, as `train.init=regression` does; options as those of a step."""
    options = training_step.parse(["device=cuda", *arguments.split(), "ttt_steps=1"])
    regression._STEPS = 3
    regression.sum_over_ranks = lambda values: values
    tokens = training_step.draw_batch(options)
    tokens = dataclasses.replace(tokens, useful=tokens.useful_rows(1))
    with FAKE:
        head, embedding, _ = _models(options, torch.float32)
        batch = _moved(tokens, options, torch.float32)
        memory = Memory(*head.parameters(), *batch.states, embedding)
        with memory:
            regression.fit_head(head, lambda: [batch, batch], embedding)
    return {"peak": memory.peak}


def _models(options: training_step.Options, dtype: torch.dtype) -> tuple[DraftHead, Tensor, Tensor]:
    width, vocab_size, draft_vocab_size = options.hidden_size, options.vocab_size, options.draft_vocab_size
    # The ids of the draft vocabulary are found among the values of t2d: here there are as many.
    VocabularyMap.target_ids = property(lambda self: torch.empty_like(self.d2t))  # type: ignore[assignment]
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        d2t, t2d = torch.empty(draft_vocab_size, dtype=torch.int64), torch.empty(vocab_size, dtype=torch.bool)
        head = DraftHead(training_step.head_config(options), VocabularyMap(d2t, t2d))
        matrices = torch.empty(vocab_size, width), torch.empty(vocab_size, width)
    torch.set_default_dtype(torch.float32)
    head.lm_head.weight.requires_grad_(options.train_lm_head)
    return head, *matrices


def _moved(tokens: PackedBatch, options: training_step.Options, dtype: torch.dtype) -> PackedBatch:
    aux = torch.empty(options.seq_len, options.num_aux * options.hidden_size, dtype=dtype)
    last = torch.empty(options.seq_len, options.hidden_size, dtype=dtype)
    batch = dataclasses.replace(tokens.mapped(FAKE.from_tensor), aux_hidden_states=aux, last_hidden_state=last)
    return batch.to(torch.device("cuda"), dtype, options.ttt_steps)


WAYS = [
    ("chain", AcceptanceRule(), False),
    ("chain", AcceptanceRule(0.8), True),
    ("chain", AcceptanceRule(0.8, draft_sampling=DraftSampling.sampled), True),
    ("tree", AcceptanceRule(0.8, top_p=0.9, top_k=20), False),
    ("tree", AcceptanceRule(), True),
]


def run_decoding() -> list[dict[str, Any]]:
    """Answer three prompts with a draft head and without; give rounds, values read back and launches of each way."""
    from decoding_twins import Loop

    reads = [0]

    def nothing(tensor: FakeTensor) -> Any:
        """Give zeros for the values that are read back: no draft token is accepted, every round brings one."""
        reads[0] += 1
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype).tolist()

    FakeTensor.tolist = nothing
    loop = Loop(max_tokens=4)
    results = []
    with FAKE:
        for module in (loop.verifier.model, loop.head, loop.head._rotary[0]):
            _to_gpu(module)
        loop.embedding = loop.verifier.model.get_input_embeddings().weight
        for shape, rule, kernels in WAYS:
            LAUNCHED.clear()
            speculator, drafter = loop.speculator(shape, rule, kernels=kernels, cuda_graphs=False)
            reads[0] = 0
            rounds = [len(answers[0].drafted) for answers in map(speculator.decode, (drafter, NoDraft()))]
            results.append({"rounds": sum(rounds), "reads": reads[0], "kernels": kernels, "launched": dict(LAUNCHED)})
    return results


class Copies(TorchDispatchMode):
    """Notes what goes between host and GPU, and whatever the host waits for: values, and memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned, self.waits = 0, list[str]()
        self._of_host: list[Tensor] = []  # in pinned memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, source = func.overloadpacket.__name__, args[0] if args else None
        if name == "_to_copy" and torch.device(kwargs.get("device") or source.device).type != source.device.type:
            # Into the host's memory `to` copies as it should if it does not block; out of it, only if that is pinned.
            pinned = bool(kwargs.get("non_blocking")) and (source.is_cuda or any(source is t for t in self._of_host))
            self.pinned += pinned
            self.waits += ["copy"] * (not pinned)
        if name in ("_local_scalar_dense", "nonzero", "masked_select") and source.is_cuda:
            self.waits.append(name)
        return func(*args, **kwargs)

    def stand_in(self) -> None:
        """Replace what pins memory, waits, or reads a truth value: nothing is wrong."""

        def pin(tensor: Tensor) -> Tensor:
            self._of_host.append(FAKE.from_tensor(tensor))
            return self._of_host[-1]

        def read(tensor: Tensor) -> bool:
            self.waits += ["value"] * tensor.is_cuda
            return False

        event = SimpleNamespace(synchronize=lambda: self.waits.append("synchronize"))
        stream = SimpleNamespace(synchronize=event.synchronize, record_event=lambda: event)
        torch.cuda.current_stream = lambda _: stream
        torch.cuda._lazy_init = lambda: None
        Tensor.pin_memory, FakeTensor.__bool__ = pin, read


def run_dump() -> list[dict[str, Any]]:
    """Record samples in every form; give forwards, copies that are pinned, and how often the host waited for what."""
    from decoding_twins import Loop

    verifier, forward, encode = Loop().verifier, Verifier.forward, StateFormat.encode
    copies, forwards = Copies(), Counter[str]()

    def fake_forward(*args: Any, **kwargs: Any) -> Any:
        forwards["forwards"] += 1
        with FAKE:
            return forward(*args, **kwargs)

    def fake_encode(*args: Any) -> Any:
        with FAKE, copies:
            return encode(*args)

    Verifier.forward, StateFormat.encode = fake_forward, fake_encode  # type: ignore[method-assign]
    with FAKE:
        _to_gpu(verifier.model)
    samples = [Sample(str(n), torch.zeros(n % 9 + 3, dtype=torch.int32), torch.ones(n % 9 + 3)) for n in range(40)]
    results = []
    for form in (StateFormat(dtype, counted) for dtype in (torch.bfloat16, FLOAT8) for counted in (False, True)):
        shard, copies = Shard.of(samples), Copies()
        forwards.clear()
        copies.stand_in()
        with copies:
            read = TransformersEngine(verifier, 32).read(samples)
            encoded = ((number, shard.encode(number, *states, form)) for number, *states in read)
            arrived = [number for number, _ in on_host(encoded, 32)]
        assert sorted(arrived) == list(range(40))
        results.append({**forwards, "pinned": copies.pinned, "waits": Counter(copies.waits)})
    return results


def _to_gpu(module: nn.Module) -> None:
    """Replace what a module holds by tensors without memory: `Module.to` cannot."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    moved = FAKE.from_tensor(tensor).detach().to("cuda")
                    held[name] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved


if __name__ == "__main__":
    stand_in()
    command, *steps = sys.argv[1:]
    alone, of_options = {"decode": run_decoding, "dump": run_dump}, {"step": run_step, "fit": run_fit}
    results = alone[command]() if command in alone else [of_options[command](step) for step in steps]
    print(json.dumps(results), flush=True)
    os._exit(0)  # the autograd threads of a GPU that is not there now and then abort a process that ends by itself
