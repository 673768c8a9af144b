"""Prompts, the verifier's answers, and its hidden states."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from .limits import (
    MISSING,
    BaseUrl,
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    Temperature,
    at_least,
    between,
)

# What becomes of a row of a source that is no usable prompt: it is named and nothing is made, or left out and counted.
MalformedRows = Enum("MalformedRows", {"stop": "stop", "skip": "skip"})
# What runs the verifier when its states are recorded: this process, or vLLM in a process of dump.vllm_python.
DumpEngine = Enum("DumpEngine", {"transformers": "transformers", "vllm": "vllm"})
# Formats that hidden states are stored in; float8 has a float32 scale for every token and layer.
StateDtype = Enum(
    "StateDtype", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float8": "float8_e4m3fn"}
)
# Positions whose last hidden states are stored: all, or those whose distribution training can ask for, inside answers.
LastStates = Enum("LastStates", {"all": "all", "counted": "counted"})

NumPrompts = Annotated[int, at_least(1, ", or null for all")]


@dataclass
class SourceConfig:
    """One source of prompts."""

    path: str = MISSING  # hub id, local JSON/JSONL/Parquet file or folder, or "embedded"
    name: str | None = None  # first part of each id; None: the last part of path
    subset: str | None = None  # of a hub dataset that has several ("configuration" there)
    split: str = "train"
    revision: str | None = None
    streaming: bool = False  # read it as it arrives instead of storing it first; a limit then takes what comes first
    limit: NumPrompts | None = None  # prompts taken at most, chosen by data.seed; None: all
    weight: PositiveFloat = 1.0  # share of data.limit, relative to the other sources


@dataclass
class DataConfig:
    """Prompts the verifier answers."""

    sources: list[SourceConfig] = field(default_factory=list)
    limit: NumPrompts | None = None  # prompts of all sources together, shared out by their weights; None: all
    heldout_share: Annotated[float, between(0.0, 0.9)] = 0.02  # of conversations: chosen by id, greedy, not trained on
    seed: int = 0  # of what limits choose, and of the order
    exclude: list[str] = field(default_factory=list)  # evaluation questions, id:subset too: no prompts like them
    deduplicate: bool = True  # of prompts that say the same, only one is taken
    min_chars: NonNegativeInt = 1  # characters of the user's side, all turns together
    max_chars: int | None = None
    min_turns: NonNegativeInt = 1  # user turns
    max_turns: int | None = None
    malformed_rows: MalformedRows = MalformedRows.stop
    local_images: bool = False  # data of the hub may name files here as images, and any data hosts of this network


@dataclass
class SynthesizeConfig:
    """How the verifier answers."""

    max_tokens: PositiveInt = 1024  # tokens an answer
    temperature: Temperature = 0.7  # 0 is greedy; held-out conversations are always greedy
    top_p: Share = 1.0
    batch_size: PositiveInt = 64  # conversations generated together in this process
    seed: int = 0  # of answers sampled in this process; servers have their own
    # http://HOST:PORT/v1 of servers; none: the verifier runs here
    endpoints: Annotated[list[BaseUrl], Limit("name each server once", lambda urls: len(set(urls)) == len(urls))] = (
        field(default_factory=list)
    )
    servers: str | None = None  # or a folder in which servers write theirs, NAME.healthy: those of `fledge submit`
    model: str | None = None  # what the servers call the verifier, with evaluate.engine=server too; None: verifier.path
    request: dict[str, Any] = field(default_factory=dict)  # further fields of every request, in the server's words
    concurrency: PositiveInt = 256  # requests in flight at one endpoint, at most: fewer if it pushes back
    request_timeout_s: PositiveFloat = 600.0
    retries: NonNegativeInt = 8  # of one request that failed in a way that may pass, with growing pauses
    max_attempts: PositiveInt = 3  # starts in which a failed conversation is tried
    server_wait_s: NonNegativeFloat = 600.0  # how long no endpoint may answer, once one has, before the stage stops
    grace_s: NonNegativeFloat = 60.0  # for what is in flight when a signal asks to stop
    shard: int = 0  # answer prompts shard, shard + num_shards, ... only: one task of a job array
    num_shards: PositiveInt = 1

    @property
    def by_servers(self) -> bool:
        """Whether servers answer, and not the verifier in this process."""
        return bool(self.endpoints or self.servers)


@dataclass
class DumpConfig:
    """How hidden states are recorded."""

    folder: str | None = None  # where the store goes; None: hidden_states in the run folder
    engine: DumpEngine = DumpEngine.transformers
    dtype: StateDtype | None = None  # that states are stored in; None: verifier.dtype
    last_states: LastStates = LastStates.all
    max_length: PositiveInt = 4096  # tokens of a sample; answers that end beyond are left out and counted
    max_images: NonNegativeInt = 5  # conversations with more are left out and counted; 0: all that have any
    keep_truncated: bool = False  # train on answers cut by synthesize.max_tokens too
    batch_tokens: PositiveInt = 8192  # tokens (padding included) of one verifier forward, in online training too
    shard_tokens: PositiveInt = 100_000  # a shard is closed at the sample that reaches this; memory holds three shards
    writer: int = 0  # write shards writer, writer + num_writers, ... only: one task of a job array (torchrun: one rank)
    num_writers: PositiveInt = 1
    token_workers: NonNegativeInt | None = None  # processes that tokenise; 0: this one; None: one a core if it pays
    vllm_python: str | None = None  # Python of the environment that has vLLM; None: this one
    vllm_options: dict[str, Any] = field(default_factory=dict)  # of vLLM's LLM, such as {tensor_parallel_size: 8}


@dataclass
class PreviewConfig:
    """What `fledge preview` shows."""

    id: str | None = None  # of a conversation; None: the first


@dataclass
class InspectConfig:
    """What `fledge inspect STORE` shows of a hidden-state store."""

    store: str | None = None  # its folder; None: the run's own
    verify: bool = False  # read everything: compare every checksum, look for states that are not finite
    sample: str | None = None  # id of the sample that is shown as text; None: the first
