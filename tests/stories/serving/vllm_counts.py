"""Run in vLLM's environment: decode prompts greedily with a draft head and print what vLLM counted, as JSON.

    python vllm_counts.py REQUEST.json

The request: {"verifier", "head", "num_draft_tokens", "max_tokens", "prompts": [[token id, ...], ...]}, and "engine",
further options of vLLM's LLM.
"""

import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)


def main() -> None:
    from vllm import LLM, SamplingParams

    with open(sys.argv[1]) as file:
        request = json.load(file)
    llm = LLM(
        model=request["verifier"],
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=1,
        disable_log_stats=False,
        speculative_config={
            "method": "eagle3",
            "model": request["head"],
            "num_speculative_tokens": request["num_draft_tokens"],
        },
        **{"max_model_len": 1024, **request.get("engine", {})},
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=request["max_tokens"]), use_tqdm=False)
    counts = {"architecture": llm.llm_engine.model_config.architecture}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_"):
            value = getattr(metric, "value", None)
            counts[metric.name.removeprefix("vllm:spec_decode_")] = metric.values if value is None else value
    print("ANSWER " + json.dumps({**counts, "texts": [output.outputs[0].text for output in outputs]}))


if __name__ == "__main__":
    main()
