"""Measurement of acceptance length, by `evaluate`, `doctor` and `compare`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from .limits import BaseUrl, Kernels, PositiveInt, PositiveShare, Temperature, at_least

# What answers the questions: the verifier in this process, or a vLLM or SGLang that serves verifier and head.
EvaluateEngine = Enum("EvaluateEngine", {"transformers": "transformers", "server": "server"})
# How a head chooses its tokens if the verifier samples: the likeliest, as SGLang, TensorRT-LLM and vLLM by default do,
# or drawn at the same temperature (chains only), as vLLM's draft_sample_method=probabilistic does.
DraftSampling = Enum("DraftSampling", {"greedy": "greedy", "sampled": "sampled"})


@dataclass
class EvaluateConfig:
    """Measurement of acceptance length by decoding."""

    questions: str | None = None  # hub id, file or folder in a form of eval/questions.py, or "embedded"
    questions_subset: str | None = None  # of a hub dataset that has several: main (gsm8k), 3.0.0 (cnn_dailymail)
    questions_split: str = "train"
    engine: EvaluateEngine = EvaluateEngine.transformers
    endpoint: BaseUrl | None = None  # base URL of the server, as http://localhost:8000/v1, with engine=server
    num_draft_tokens: PositiveInt = 3  # tokens proposed a round
    tree_depth: PositiveInt | None = None  # None: a chain; else an EAGLE-2 dynamic tree of num_draft_tokens, this deep
    tree_top_k: PositiveInt = 8  # branches: children a node may have, and nodes that grow at each depth
    max_tokens: PositiveInt = 1024  # tokens an answer
    temperature: Temperature = 0.0  # 0 is greedy; above, tokens are sampled, and drafts leave their distribution
    top_p: PositiveShare = 1.0  # sample among the likeliest tokens that together have this probability
    top_k: PositiveInt | None = None  # sample among this many of the likeliest tokens; None: all
    draft_sampling: DraftSampling = DraftSampling.greedy
    seed: int = 0  # of the samples, with the question and the turn
    batch_size: PositiveInt = 1  # questions answered at a time
    kernels: Kernels = "auto"  # fused Triton kernels, on a GPU; auto: each that agrees there with plain PyTorch
    cuda_graphs: bool = True  # on a GPU: a round is captured once and replayed
    questions_per_category: int | None = None  # None: all
    heldout_prompts: int = 64  # held-out conversations decoded too, to compare with what training walked; 0: none
    baselines: bool = True  # measure an untrained head and prompt-lookup drafting too
    checkpoint: str | None = None  # "best", "latest" or the folder of a head; None: the best checkpoint of the run

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

    measure: bool = True  # run the verifier; false reads the files only
    num_prompts: Measurable = 16  # answered by the verifier, of evaluate.questions or the embedded ones
    max_tokens: Measurable = 64  # tokens an answer


@dataclass
class CompareConfig:
    """What `fledge compare RUN...` lays side by side."""

    runs: list[str] = field(default_factory=list)  # a run's folder, its name in runs_dir, or an evaluation's folder
    published: bool = True  # rows of the published figures of NVIDIA's Maverick head
    folder: str | None = None  # where compare.md and compare.png go; None: the tables are printed only
