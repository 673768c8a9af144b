"""vLLM as the engine of a dump: its extraction of hidden states, in processes of the environment that has vLLM.

The worker (in_vllm/worker.py) gets token ids and answers with the path of a file, in memory if there is room, that
holds the states of these tokens; it is read here and deleted at once. What is in flight is bounded.

| fledge                  | vLLM                                                                     |
|-------------------------|--------------------------------------------------------------------------|
| aux layer k, its output | id k + 1                                                                 |
| last hidden state       | id L, of L layers, is the state before the final norm: it is normed here |
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...conf.runtime.rank_info import own_gpus, read_rank_info
from ...conf.schema import Config
from ...models.verifier.config import load_config, logit_transform, verifier_location
from ...models.verifier.model import load_final_norm
from ...models.verifier.weights import VerifierWeights
from ..store.shard import Sample
from .transformers_engine import never

_WORKER = Path(__file__).parent / "in_vllm" / "worker.py"
_BATCHES = 4  # of vLLM's, in flight at most
_CHECKS = 4  # samples of every reading whose last state must give vLLM's own probabilities
_MEMORY = Path("/dev/shm")
_SAME_SIGNAL_S = 1.0  # Slurm tells every process of a step: vLLM may end by a signal that is yet to come here


class VllmEngine:
    """The verifier in vLLM; a ValueError says that it does not start or has ended, with its last errors."""

    def __init__(self, config: Config, aux_layers: list[int]) -> None:
        text = load_config(config.verifier)
        self._dtype = getattr(torch, config.verifier.dtype.value)
        self._norm, self._transform = load_final_norm(config.verifier), logit_transform(text)
        self._lm_head = VerifierWeights(config.verifier).lm_head().to(self._dtype)
        self._ids = sorted({*(layer + 1 for layer in aux_layers), text.num_hidden_layers})  # vLLM takes each once
        self._aux = [self._ids.index(layer + 1) for layer in aux_layers]
        self._hidden_size = text.hidden_size
        options = llm_options(config, text, self._ids)
        self._max_tokens: int = _BATCHES * options["max_num_batched_tokens"]
        self._python = config.dump.vllm_python or sys.executable
        self._requests = itertools.count()
        self.unlike = [torch.tensor(False)]  # `read` checks by itself
        place = read_rank_info(os.environ)
        self._log = config.run_folder / f"vllm-{config.dump.writer * place.world + place.rank:05d}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        in_flight = self._max_tokens * len(self._ids) * text.hidden_size * self._dtype.itemsize
        self._folder = _exchange_folder(config.hidden_states_folder, in_flight)
        try:
            self._process = self._start()
            self._send(options)
            print(f"vLLM starts; its log is {self._log}", flush=True)
            version = self._receive()["version"]
        except BaseException:
            self.close()
            raise
        print(f"vLLM {version} reads for the dump", flush=True)

    def _start(self) -> Popen[str]:
        command = [self._python, str(_WORKER), str(os.getpid()), str(self._folder)]
        environment = worker_environment(os.environ, torch.cuda.device_count())
        try:
            # A new session: a terminal's interrupt goes to this process, which ends the other.
            with open(self._log, "w") as log:
                return Popen(
                    command, stdin=PIPE, stdout=PIPE, stderr=log, text=True, env=environment, start_new_session=True
                )
        except OSError as error:
            problem = f"got {self._python} ({error.strerror})"
            raise ValueError(f"dump.vllm_python must be the Python of an environment with vLLM, {problem}") from None

    def read(self, samples: Sequence[Sample], stop: Callable[[], bool] = never) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield what TransformersEngine.read does, as vLLM gets it done."""
        waiting, flying, tokens, checks = deque(range(len(samples))), dict[int, int](), 0, _CHECKS
        while (waiting or flying) and not stop():
            while waiting and tokens + len(samples[waiting[0]].input_ids) <= self._max_tokens:
                number, request = waiting.popleft(), next(self._requests)
                self._send({"request": request, "token_ids": samples[number].input_ids.tolist()})
                flying[request] = number
                tokens += len(samples[number].input_ids)
            answer = self._receive()
            states, token_ids = self._take(Path(answer["path"]))
            if answer["request"] not in flying:
                continue  # of an earlier reading that was given up
            number = flying.pop(answer["request"])
            tokens -= len(samples[number].input_ids)
            aux, last = self._convert(samples[number], states, token_ids)
            if checks:
                self._check_probabilities(samples[number], last[-1], answer)
                checks -= 1
            yield number, aux, last

    def close(self) -> None:
        """End vLLM's processes, and delete what they have left in the folder of exchange."""
        if process := getattr(self, "_process", None):
            process.terminate()  # the guard, which ends the others
            with contextlib.suppress(BrokenPipeError):
                process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _convert(self, sample: Sample, states: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return vLLM's states [T, ids, H] of a sample as aux and last hidden states."""
        expected = (len(sample.input_ids), len(self._ids), self._hidden_size)
        as_expected = states.shape == expected and states.dtype == self._dtype
        if not as_expected or not torch.equal(token_ids, sample.input_ids.long()):
            raise ValueError(
                f"dump.engine=vllm gave states of {tuple(states.shape)}, {states.dtype}, for {sample.id}, where its "
                f"tokens have {expected}, {self._dtype}: set dump.engine=transformers, or install another vLLM"
            )
        return states[:, self._aux].flatten(1), self._norm(states[:, -1])

    def _check_probabilities(self, sample: Sample, last: Tensor, answer: dict[str, Any]) -> None:
        """Check that lm_head on the last state [H] gives the probabilities that vLLM has for the next token."""
        logits = self._transform.apply_((self._lm_head @ last).float())
        ours, vllms = logits.log_softmax(0)[answer["tokens"]], torch.tensor(answer["logprobs"])
        if not last.isfinite().all() or (ours - vllms).abs().amax() > 2e-2 * logits.abs().amax():
            raise ValueError(
                f"dump.engine=vllm: lm_head times the last state of {sample.id}, normed, does not give the "
                "probabilities of vLLM itself, so training could not build its targets: set dump.engine=transformers"
            )

    def _take(self, path: Path) -> tuple[Tensor, Tensor]:
        """Read a file of states as soon as it is written, and delete it: states [T, ids, H], token ids [T]."""
        lock = path.with_name(path.name + ".lock")
        try:
            with open(lock) as held:
                fcntl.flock(held, fcntl.LOCK_SH)
                tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"dump.engine=vllm: vLLM has not written the states that it answered with ({error}): see {self._log}, "
                f"and how much room {self._folder.parent} has"
            ) from None
        path.unlink()
        lock.unlink()
        return tensors["hidden_states"], tensors["token_ids"]

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise ValueError(
                "dump.vllm_python must be the Python of an environment with vLLM (0.32 is known to work), got "
                f"{self._python}: {answer['refused']}"
            )
        return answer

    def _death(self) -> ValueError:
        code = self._process.wait()
        time.sleep(_SAME_SIGNAL_S)
        return ValueError(
            f"dump.engine=vllm: vLLM ended (exit code {code}), having said: {last_words(self._log.read_text())} (whole "
            f"log: {self._log}; its options are dump.vllm_options)"
        )


def llm_options(config: Config, text: Any, ids: list[int]) -> dict[str, Any]:
    """Return the options of vLLM's LLM for a text configuration and vLLM's ids of the states to record.

    Raises ValueError if `dump.vllm_options` has one of those that fledge sets.
    """
    options = config.dump.vllm_options
    extraction = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}},
    }
    fixed = {
        "model": verifier_location(config.verifier),
        "revision": config.verifier.revision,
        "tokenizer_revision": config.verifier.revision,
        "dtype": config.verifier.dtype.value,
        "speculative_config": extraction,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
    }
    if taken := [name for name in (*fixed, "kv_transfer_config") if name in options]:  # the worker sets the last
        raise ValueError(
            f"dump.vllm_options must leave {', '.join(taken)} to fledge, which sets them by the verifier and for the "
            "extraction of hidden states"
        )
    longest = max(config.dump.max_length, config.dump.join_length or 0) + 1
    positions = getattr(text, "max_position_embeddings", None) or longest
    max_model_len = options.get("max_model_len", min(longest, positions))
    max_tokens = max(config.dump.batch_tokens, max_model_len)
    sizes = {"max_model_len": max_model_len, "max_num_batched_tokens": max_tokens, "language_model_only": True}
    return {**sizes, **options, **fixed}


def check_readable(config: Config, ids: Sequence[str], lengths: Sequence[int], num_images: Sequence[int]) -> None:
    """Refuse samples that vLLM cannot read for a dump, before it starts: with images, or too long.

    If the longest sequence of a batch has no room for another token, vLLM records the states of none of them.
    """
    max_model_len = llm_options(config, load_config(config.verifier), [])["max_model_len"]
    for name, length, images in zip(ids, lengths, num_images, strict=True):
        if images:
            raise ValueError(
                f"dump.engine must be transformers for samples with images, got vllm: {name} has {images}; "
                "dump.max_images=0 leaves such conversations out"
            )
        if length >= max_model_len:
            raise ValueError(
                f"dump.vllm_options.max_model_len must be above the length of every sample, got {max_model_len}, and "
                f"{name} has {length} tokens: raise it, or lower dump.max_length (dump.join_length)"
            )


def worker_environment(environment: Mapping[str, str], num_gpus: int) -> dict[str, str]:
    """Return the environment of this rank's worker: its own GPUs, and nothing of the ranks, which are not vLLM's."""
    place = read_rank_info(environment)
    own = {name: value for name, value in environment.items() if name not in (*place.environment(), "LOCAL_SIZE")}
    if place.world > 1 and num_gpus:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
        own["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[gpu] for gpu in own_gpus(place, num_gpus))
    return own


def last_words(log: str) -> str:
    """Return the lines of a log that say why a program ended: the last errors, or else the last lines."""
    prefix = re.compile(r"^(\([^)]*\) )*((ERROR|WARNING|INFO) \S+ \S+ \[[^\]]*\] )?")
    lines = [line for line in (prefix.sub("", line).strip() for line in log.splitlines()) if line]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return " / ".join(list(dict.fromkeys(errors or lines or ["nothing"]))[-3:])


def _exchange_folder(store: Path, num_bytes: int) -> Path:
    """Make the folder of vLLM's files: in memory if that has room for several times as much, or next to the store."""
    in_memory = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4 * num_bytes
    if not in_memory:
        store.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="fledge-vllm-", dir=_MEMORY if in_memory else store))
