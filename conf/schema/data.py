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
    PositiveShare,
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

SELF = "self"  # the path of a source whose prompts the verifier writes
NumPrompts = Annotated[int, at_least(1, ", or null for all")]


@dataclass
class SourceConfig:
    """One source of prompts."""

    # hub id, local JSON, JSONL or Parquet file, folder, `embedded`, or `self`: the verifier writes the prompts
    path: str = MISSING
    name: str | None = None  # first part of each prompt's id; null: the last part of path
    subset: str | None = None  # configuration of a hub dataset that has several
    split: str = "train"  # split to read
    revision: str | None = None  # branch, tag or commit on the hub
    streaming: bool = False  # read rows as they arrive instead of downloading first; a limit then takes the first ones
    # MODULE.FUNCTION that is given each row; the row that it returns is read instead, and None leaves the row out
    row_function: str | None = None
    limit: NumPrompts | None = None  # most prompts taken from this source, chosen by data.seed; null: all
    weight: PositiveFloat = 1.0  # share of data.limit, relative to the other sources
    # of `self`: sampling temperature of a user turn
    temperature: Annotated[float, Limit("be above 0 and at most 10", lambda value: 0 < value <= 10)] = 1.0
    top_p: PositiveShare = 1.0  # of `self`: sample a user turn among the likeliest tokens of this probability together
    max_tokens: PositiveInt = 256  # of `self`: most tokens of a user turn; longer ones are left out
    turns: PositiveInt = 1  # of `self`: user turns of a conversation; later ones are written after the answers
    min_ascii: Share = 0.0  # of `self`: least share of ASCII characters in a user turn; 0.9 leaves mostly English


@dataclass
class DataConfig:
    """Prompts the verifier answers."""

    sources: list[SourceConfig] = field(default_factory=list)  # datasets that prompts are taken from
    limit: NumPrompts | None = None  # most prompts of all sources together, shared out by their weights; null: all
    # share of conversations that are held out: chosen by id, answered greedily, never trained on
    heldout_share: Annotated[float, between(0.0, 0.9)] = 0.02
    # take answers of rows that bring their tokens as they were logged; false: the verifier answers these prompts, too
    logged_answers: bool = True
    seed: int = 0  # decides which prompts a limit takes, and their order
    # evaluation sets, as files or hub ids (id:subset); prompts like their questions are left out
    exclude: list[str] = field(default_factory=list)
    deduplicate: bool = True  # take only one of the prompts that say the same
    # likeness (Jaccard, of runs of 5 characters) from which only one of two prompts is taken; null: any; 0.8 is usual
    near_duplicates: Annotated[float, between(0.5, 1.0)] | None = None
    min_chars: NonNegativeInt = 1  # fewest characters of the user's side, all turns together
    max_chars: int | None = None  # most characters of the user's side; null: no bound
    min_turns: NonNegativeInt = 1  # fewest user turns
    max_turns: int | None = None  # most user turns; null: no bound
    # what happens to a row that is no usable prompt: stop and name it, or skip and count it
    malformed_rows: MalformedRows = MalformedRows.stop
    local_images: bool = False  # let rows from the hub name files here as images, and any row hosts of this network


@dataclass
class SynthesizeConfig:
    """How the verifier answers."""

    max_tokens: PositiveInt = 1024  # most tokens of an answer
    # sampling temperature, and that of logged answers; 0 is greedy, and held-out conversations are always greedy
    temperature: Temperature = 0.7
    top_p: PositiveShare = 1.0  # sample among the likeliest tokens that together have this probability
    batch_size: PositiveInt = 64  # conversations generated together when the verifier runs in this process
    seed: int = 0  # seed of answers sampled in this process; servers have their own
    endpoints: Annotated[list[BaseUrl], Limit("name each server once", lambda urls: len(set(urls)) == len(urls))] = (
        field(default_factory=list)
    )  # base URLs of servers of the verifier, http://HOST:PORT/v1; empty: it runs in this process
    servers: str | None = None  # folder in which servers announce themselves as NAME.healthy; `fledge submit` sets it
    model: str | None = None  # the servers' name for the verifier, in evaluate.engine=server too; null: verifier.path
    # further fields of every request, in the server's words, such as {top_k: 20}
    request: dict[str, Any] = field(default_factory=dict)
    concurrency: PositiveInt = 256  # most requests in flight at one endpoint; fewer are sent if the server pushes back
    request_timeout_s: PositiveFloat = 600.0  # seconds until a request counts as failed
    retries: NonNegativeInt = 8  # further tries of a request whose failure may pass, with growing pauses
    max_attempts: PositiveInt = 3  # starts in which a failed conversation is tried
    # seconds without any working endpoint before the stage stops with exit code 75
    server_wait_s: NonNegativeFloat = 600.0
    grace_s: NonNegativeFloat = 60.0  # seconds for requests in flight after a signal asks to stop
    shard: int = 0  # answer only prompts shard, shard + num_shards, ...: one task of a job array
    num_shards: PositiveInt = 1  # tasks that the prompts are divided among

    @property
    def by_servers(self) -> bool:
        """Whether servers answer, and not the verifier in this process."""
        return bool(self.endpoints or self.servers)


@dataclass
class DumpConfig:
    """How hidden states are recorded."""

    folder: str | None = None  # folder of the store; null: hidden_states in the run folder
    # what runs the verifier: transformers in this process, or vLLM in a process of its own
    engine: DumpEngine = DumpEngine.transformers
    # type that states are stored in; float8 has a scale per token and layer; null: verifier.dtype
    dtype: StateDtype | None = None
    # positions whose last state is stored: all, or counted, which are those the loss reads
    last_states: LastStates = LastStates.all
    # most conversations that are recorded to train on, and of those held out; a higher limit has these, too
    limit: PositiveInt | None = None
    max_length: PositiveInt = 4096  # most tokens of a sample; answers that end beyond are left out and counted
    # lay conversations of the training split end to end up to so many tokens, for long contexts; null: each alone
    join_length: PositiveInt | None = None
    # most images of a conversation; others are left out and counted; 0 leaves out all with images
    max_images: NonNegativeInt = 5
    keep_truncated: bool = True  # train on answers that synthesize.max_tokens cut, too: words of the verifier as others
    batch_tokens: PositiveInt = 8192  # tokens of one verifier forward, padding included; online training uses it too
    shard_tokens: PositiveInt = 100_000  # tokens at which a shard is closed; memory holds three shards
    writer: int = 0  # write only shards writer, writer + num_writers, ...: one task of a job array
    num_writers: PositiveInt = 1  # tasks that write the store together
    token_workers: NonNegativeInt | None = None  # processes that tokenise; 0: this one; null: one per core if that pays
    vllm_python: str | None = None  # Python of the environment that has vLLM; null: this one
    # arguments of vLLM's LLM, such as {tensor_parallel_size: 8}
    vllm_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PreviewConfig:
    """What `fledge preview` shows."""

    id: str | None = None  # id of the conversation to print; null: the first


@dataclass
class InspectConfig:
    """What `fledge inspect STORE` shows of a hidden-state store."""

    store: str | None = None  # folder of the store; null: the run's own
    verify: bool = False  # read everything: compare all checksums and look for states that are not finite
    sample: str | None = None  # id of the sample to print as text; null: the first
