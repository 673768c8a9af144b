"""Run in vLLM's environment: answer one chat greedily and print the tokens that were read and written, as JSON.

    python vllm_chat.py REQUEST.json

The request: {"verifier", "messages", "max_tokens"}.
"""

import json

from offline_vllm import greedy, open_vllm, read_request


def main() -> None:
    request = read_request()
    llm = open_vllm(request["verifier"], max_model_len=512, limit_mm_per_prompt={"image": 5})
    (output,) = llm.chat(request["messages"], greedy(request["max_tokens"]), use_tqdm=False)
    answer = output.outputs[0]
    told = {"prompt": output.prompt_token_ids, "answer": list(answer.token_ids), "text": answer.text}
    print("ANSWER " + json.dumps({**told, "finish_reason": answer.finish_reason}))


if __name__ == "__main__":
    main()
