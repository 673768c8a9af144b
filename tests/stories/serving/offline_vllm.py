"""vLLM on the CPU, in this process and without a hub, for scripts that vLLM's environment runs."""

import json
import os
import sys
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)


def read_request() -> dict[str, Any]:
    """Read the JSON file that the script is given."""
    with open(sys.argv[1]) as file:
        request: dict[str, Any] = json.load(file)
    return request


def open_vllm(verifier: str, **options: Any) -> Any:
    """Load a verifier that answers one prompt at a time."""
    from vllm import LLM

    return LLM(model=verifier, dtype="float32", enforce_eager=True, max_num_seqs=1, **options)


def greedy(max_tokens: int) -> Any:
    """Return the sampling parameters of greedy answers."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens)
