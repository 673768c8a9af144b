"""Run in vLLM's environment: decode prompts greedily with a draft head and print what vLLM counted, as JSON.

    python vllm_counts.py REQUEST.json

The request: {"verifier", "head", "num_draft_tokens", "max_tokens", "prompts": [[token id, ...], ...]}, and "engine",
further options of vLLM's LLM.
"""

import json

from offline_vllm import greedy, open_vllm, read_request


def main() -> None:
    request = read_request()
    llm = open_vllm(
        request["verifier"],
        disable_log_stats=False,
        speculative_config={
            "method": "eagle3",
            "model": request["head"],
            "num_speculative_tokens": request["num_draft_tokens"],
        },
        **{"max_model_len": 1024, **request.get("engine", {})},
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    outputs = llm.generate(prompts, greedy(request["max_tokens"]), use_tqdm=False)
    counts = {"architecture": llm.llm_engine.model_config.architecture}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_"):
            value = getattr(metric, "value", None)
            counts[metric.name.removeprefix("vllm:spec_decode_")] = metric.values if value is None else value
    print("ANSWER " + json.dumps({**counts, "texts": [output.outputs[0].text for output in outputs]}))


if __name__ == "__main__":
    main()
