"""Measurement of acceptance length, by `evaluate`, `doctor` and `compare`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from .limits import BaseUrl, Kernels, Limit, NonNegativeInt, PositiveInt, PositiveShare, Temperature, at_least

# What answers the questions: the verifier in this process, or a vLLM or SGLang that serves verifier and head.
EvaluateEngine = Enum("EvaluateEngine", {"transformers": "transformers", "server": "server"})
# How a head chooses its tokens if the verifier samples: the likeliest, as SGLang, TensorRT-LLM and vLLM by default do,
# or drawn at the same temperature (chains only), as vLLM's draft_sample_method=probabilistic does.
DraftSampling = Enum("DraftSampling", {"greedy": "greedy", "sampled": "sampled"})


_LENGTHS = Limit(
    "be different numbers of tokens, at least one",
    lambda lengths: lengths and len(set(lengths)) == len(lengths) and min(lengths) > 0,
    cure="; null asks the questions as they are",
)


@dataclass
class EvaluateConfig:
    """Measurement of acceptance length by decoding."""

    questions: str | None = None  # hub id, file or folder of questions, or `embedded`
    questions_subset: str | None = None  # configuration of a hub dataset that has several, such as main of gsm8k
    questions_split: str = "train"  # split to read
    # what answers: the verifier in this process, or a vLLM or SGLang server with verifier and head
    engine: EvaluateEngine = EvaluateEngine.transformers
    endpoint: BaseUrl | None = None  # base URL of the server, such as http://localhost:8000/v1, with engine=server
    # tokens proposed in a round; nodes of the tree with tree_depth; 0, with engine=server: a verifier without a head
    num_draft_tokens: NonNegativeInt = 3
    tree_depth: PositiveInt | None = None  # depth of an EAGLE-2 dynamic tree; null: a chain
    tree_top_k: PositiveInt = 8  # children of a node, and nodes expanded at each depth
    max_tokens: PositiveInt = 1024  # most tokens of an answer
    # 0 is greedy; above 0 tokens are sampled, and drafts do not change their distribution
    temperature: Temperature = 0.0
    top_p: PositiveShare = 1.0  # sample among the likeliest tokens that together have this probability
    top_k: PositiveInt | None = None  # sample among this many of the likeliest tokens; null: all
    # greedy: the head proposes its likeliest token; sampled: it draws one (chains only)
    draft_sampling: DraftSampling = DraftSampling.greedy
    seed: int = 0  # seed of sampled answers, together with question and turn
    batch_size: PositiveInt = 1  # questions answered at a time
    kernels: Kernels = "auto"  # fused Triton kernels on a GPU; auto: each that agrees there with plain PyTorch
    cuda_graphs: bool = True  # capture a round once and replay it, on a GPU
    questions_per_category: PositiveInt | None = None  # most questions of each category; null: all
    # ask the first turn of each question behind documents, once for each of these tokens of prompt and answer together;
    # null: the questions as they are
    context_lengths: Annotated[list[int], _LENGTHS] | None = None
    # those documents: a text file, or rows with `text` in a file, a folder or on the hub; null: the run's conversations
    context_documents: str | None = None
    # JSON Lines file: the evaluation adds its figures, and is compared with the first like it
    history: str | None = None
    heldout_prompts: NonNegativeInt = 64  # held-out conversations decoded too, to compare with training; 0: none
    baselines: bool = True  # measure an untrained head and prompt lookup too
    checkpoint: str | None = None  # `best`, `latest` or the folder of a head; null: the best checkpoint of the run

    @property
    def lacks_server(self) -> bool:
        """Whether a server is to answer, and none is named."""
        return self.engine is EvaluateEngine.server and self.endpoint is None

    @property
    def draft_depth(self) -> int:
        """Draft tokens that a round can accept."""
        return self.tree_depth or self.num_draft_tokens


Measurable = Annotated[int, at_least(4, " to measure anything")]


@dataclass
class DoctorConfig:
    """How `fledge doctor` measures what the head at head_import.source was trained for."""

    measure: bool = True  # run the verifier and measure the head; false: read the files only
    num_prompts: Measurable = 16  # prompts the verifier answers, from evaluate.questions or the embedded ones
    max_tokens: Measurable = 64  # most tokens of an answer


@dataclass
class TuneConfig:
    """What `fledge tune RUN...` reads, and what it writes."""

    runs: list[str] = field(default_factory=list)  # runs with an evaluation, their names in runs_dir, or evaluations
    head: str = "HEAD"  # folder of the exported head, as the engine is to read it
    folder: str | None = None  # folder for vllm.json, sglang.json and tensorrt_llm.yaml; null: print only


@dataclass
class CompareConfig:
    """What `fledge compare RUN...` lays side by side."""

    runs: list[str] = field(default_factory=list)  # run folders, run names in runs_dir, or evaluation folders
    published: bool = True  # show the published figures of NVIDIA's Maverick head
    folder: str | None = None  # folder for compare.md and compare.png; null: print only
