"""Run in vLLM's environment: answer one chat greedily and print the tokens that were read and written, as JSON.

    python vllm_chat.py REQUEST.json

The request: {"verifier", "messages", "max_tokens"}.
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
        max_model_len=512,
        limit_mm_per_prompt={"image": 5},
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"])
    (output,) = llm.chat(request["messages"], sampling, use_tqdm=False)
    answer = output.outputs[0]
    told = {"prompt": output.prompt_token_ids, "answer": list(answer.token_ids), "text": answer.text}
    print("ANSWER " + json.dumps({**told, "finish_reason": answer.finish_reason}))


if __name__ == "__main__":
    main()
