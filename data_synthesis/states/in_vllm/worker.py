"""Run in vLLM's environment by ../vllm_engine.py: vLLM reads token sequences and leaves the states in files.

    python worker.py PID FOLDER < requests > answers 2> log

PID is the process that asks, FOLDER takes vLLM's files and is deleted at the end, however that comes. Requests and
answers are lines of JSON:

| request                          | answer, when it is done, in any order                                             |
|----------------------------------|-----------------------------------------------------------------------------------|
| the first: options of vLLM's LLM | {"version": vLLM's}, or {"refused": why} and the end                              |
| {"request", "token_ids"}         | {"request", "path", "tokens", "logprobs"}: file, and vLLM's likeliest next tokens |
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import resource_tracker
from typing import IO, Any, NoReturn

_GRACE_S = 10.0  # for vLLM's processes, from the wish to end to the kill
_NUM_LOGPROBS = 8  # of the tokens that vLLM finds likeliest after a sequence


def main() -> None:
    """Split in two: vLLM, and a guard that outlives it."""
    parent, folder = int(sys.argv[1]), sys.argv[2]
    # Slurm sends it to all processes before the time limit: the dump keeps what it has, and then ends vLLM.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes to the log
    sockets = os.environ["VLLM_RPC_BASE_PATH"] = tempfile.mkdtemp(prefix="fledge-vllm-")
    resource_tracker.ensure_running()  # outside vLLM's group: it unlinks the shared memory of those that were killed
    worker = os.fork()
    if worker:
        answers.close()
        os.close(0)
        _guard(worker, parent, folder, sockets)
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # vLLM ends what it has started
    _work(folder, answers)


def _guard(worker: int, parent: int, *folders: str) -> NoReturn:
    """Wait for the end of the worker or of its parent, and let no process of vLLM and no file outlive it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while os.getppid() == parent:
            ended, status = os.waitpid(worker, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                sys.exit(code if code >= 0 else 128 - code)
            time.sleep(0.2)
        sys.exit(0)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end(worker)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _end(worker: int) -> None:
    """End the worker, and after a while kill what is left of all that vLLM has started for it."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended
        os.kill(worker, signal.SIGTERM)
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until and not os.waitpid(worker, os.WNOHANG)[0]:
            time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(worker, signal.SIGKILL)


def _work(folder: str, answers: IO[str]) -> None:
    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    if (options := requests.get()) is None:
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # an engine in this process would not write the last states
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        import vllm
        from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            answer(refused="no vllm is installed there")
        elif error.name is not None and error.name.startswith("vllm."):
            answer(refused=f"its vLLM {vllm.__version__} is too old to extract hidden states")
        else:
            raise
        return
    engine = vllm.LLM(**_complete(options, folder)).llm_engine
    answer(version=vllm.__version__)
    params = vllm.SamplingParams(temperature=0.0, max_tokens=1, logprobs=_NUM_LOGPROBS, detokenize=False)
    while True:
        while not requests.empty() or not engine.has_unfinished_requests():
            if (request := requests.get()) is None:
                return
            engine.add_request(str(request["request"]), {"prompt_token_ids": request["token_ids"]}, params)
        for output in engine.step():
            if output.finished:
                likeliest = output.outputs[0].logprobs[0]
                answer(
                    request=int(output.request_id),
                    path=output.kv_transfer_params["hidden_states_path"],
                    tokens=list(likeliest),
                    logprobs=[likely.logprob for likely in likeliest.values()],
                )


def _receive(requests: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)


def _complete(options: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the options with the connector that writes the states, and what the CPU needs without a GPU."""
    from vllm.platforms import current_platform

    connector: dict[str, Any] = {"kv_connector": "ExampleHiddenStatesConnector"}
    if current_platform.is_cpu():
        connector = {"kv_connector": "CPUHiddenStatesConnector", "kv_connector_module_path": "fledge_connector"}
        options = {"enforce_eager": True, "kv_cache_memory_bytes": 2 << 30, **options}
    connector.update(kv_role="kv_producer", kv_connector_extra_config={"shared_storage_path": folder})
    return {**options, "kv_transfer_config": connector}


if __name__ == "__main__":
    main()
