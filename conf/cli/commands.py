"""The commands of `fledge`, one entry each: what runs it, and what its help says."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """A command, as it is run and as its help explains it."""

    function: str  # module:function, of a configuration
    what: str
    reads: str
    writes: str
    groups: tuple[str, ...]  # whose options its help explains; "": the run's own
    examples: tuple[str, str]
    prints: bool = False  # and no more: it ends when nobody reads it
    option: str = ""  # that folders and names among its arguments are
    flags: dict[str, str] = field(default_factory=dict)  # and what they are short for


RUN = "experiment=llama31_8b name=first"
TORCHRUN = f"torchrun --nproc-per-node 8 -m fledge.train {RUN}"
_STAGES = "prompts/, conversations/, hidden_states/, training/, evaluation/, exports/ in runs/NAME/"
_SOURCES = "the verifier; the prompts of data.sources"
_CHECKPOINT = "the best checkpoint of runs/NAME/training/; the verifier"

PURPOSES = {
    "whole runs": {
        "demo": Command(
            function="fledge.conf.runtime.launch:run",
            what="run with experiment=demo: a small verifier that comes with fledge",
            reads="what comes with fledge",
            writes=_STAGES,
            groups=("",),
            examples=("fledge demo", "fledge demo train.loss=lk_lambda name=demo2"),
        ),
        "run": Command(
            function="fledge.conf.runtime.launch:run",
            what="synthesize to export in order, skipping what is complete",
            reads=_SOURCES,
            writes=_STAGES,
            groups=("",),
            examples=(f"fledge run {RUN}", f"fledge run {RUN} train.num_processes=8"),
        ),
        "submit": Command(
            function="fledge.slurm.submit:submit",
            what="run every stage as Slurm jobs that follow each other",
            reads=_SOURCES,
            writes="jobs/, then what every stage writes, in runs/NAME/",
            groups=("", "submit", "cluster"),
            examples=(
                f"fledge submit {RUN} cluster=slurm_gpu --dry-run",
                f"fledge submit {RUN} cluster=slurm_gpu",
            ),
            flags={"--dry-run": "submit.dry_run=true"},
        ),
        "status": Command(
            function="fledge.slurm.status:status",
            what="print where a submitted run stands",
            reads="runs/NAME/",
            writes="nothing; prints stages, jobs, progress and logs",
            groups=("status",),
            examples=("fledge status first", "fledge status runs/first"),
            prints=True,
            option="status.run",
        ),
    },
    "stages of a run": {
        "synthesize": Command(
            function="fledge.data_synthesis.synthesize:synthesize",
            what="the verifier answers every prompt",
            reads=_SOURCES,
            writes="runs/NAME/prompts/, runs/NAME/conversations/",
            groups=("", "synthesize", "data"),
            examples=(
                f"fledge synthesize {RUN}",
                f"fledge synthesize {RUN} 'synthesize.endpoints=[http://HOST:8000/v1]'",
            ),
        ),
        "dump": Command(
            function="fledge.data_synthesis.dump:dump",
            what="record the verifier's hidden states on those conversations",
            reads="runs/NAME/conversations/; the verifier",
            writes="runs/NAME/hidden_states/",
            groups=("", "dump", "verifier"),
            examples=(f"fledge dump {RUN}", f"fledge dump {RUN} dump.engine=vllm"),
        ),
        "train": Command(
            function="fledge.train.setup:train",
            what="train the draft head on the hidden states",
            reads="runs/NAME/hidden_states/, or train.stores",
            writes="runs/NAME/training/: checkpoints, metrics.jsonl",
            groups=("", "train", "deepspeed", "tracking"),
            examples=(TORCHRUN, f"fledge train -m {RUN} train.lr=1e-4,5e-5"),
        ),
        "layers": Command(
            function="fledge.eval.layers:layers",
            what="find the layers of the verifier that a head should read",
            reads="runs/NAME/conversations/; the verifier",
            writes="runs/NAME/layers/: states of all layers, a short training of each set, layers.json",
            groups=("", "layers", "train"),
            examples=(f"fledge layers {RUN}", f"fledge layers {RUN} layers.steps=500"),
        ),
        "evaluate": Command(
            function="fledge.eval.evaluate:evaluate",
            what="measure acceptance length by decoding",
            reads=_CHECKPOINT,
            writes="runs/NAME/evaluation/: acceptance.json, questions.jsonl, report.md, report.html, plots",
            groups=("", "evaluate"),
            examples=(f"fledge evaluate {RUN}", f"fledge evaluate {RUN} evaluate.num_draft_tokens=5"),
        ),
        "export": Command(
            function="fledge.models.export:export",
            what="write the checkpoint that engines serve",
            reads="the best checkpoint of runs/NAME/training/",
            writes="runs/NAME/exports/FORMAT/",
            groups=("", "export"),
            examples=(f"fledge export {RUN}", f"fledge export {RUN} overwrite=true"),
        ),
    },
    "heads made elsewhere": {
        "adapt": Command(
            function="fledge.eval.adapt:adapt",
            what="train a head further on texts of one's own, and say what it gained and lost",
            reads="adapt.head; the stores of adapt.replay; " + _SOURCES,
            writes="imports/, conversations/, hidden_states/, training/, adaptation.md, exports/ in runs/NAME/",
            groups=("", "adapt", "data"),
            examples=(
                f"fledge adapt {RUN} adapt.head=runs/general 'data.sources=[{{path: mine.jsonl}}]'",
                "fledge adapt experiment=llama31_8b name=first adapt.head=ORG/HEAD "
                "'adapt.replay=[{folder: STORE, weight: 0.2}]'",
            ),
        ),
        "import": Command(
            function="fledge.models.import_head:import_head",
            what="read a head made elsewhere, to evaluate or export it",
            reads="head_import.source, a published head",
            writes="runs/NAME/imports/FOLDER/",
            groups=("", "head_import", "verifier"),
            examples=(f"fledge import {RUN} head_import.source=FOLDER", "fledge import --help verifier"),
        ),
        "doctor": Command(
            function="fledge.eval.doctor.doctor:doctor",
            what="say why a head loses acceptance, and which field to change",
            reads="head_import.source, a published head or an export",
            writes="nothing; prints what costs acceptance, and the cure",
            groups=("", "doctor", "head_import"),
            examples=(
                f"fledge doctor {RUN} head_import.source=FOLDER",
                f"fledge doctor {RUN} head_import.source=runs/first/exports/plain",
            ),
            prints=True,
        ),
    },
    "look": {
        "plan": Command(
            function="fledge.slurm.plan.plan:plan",
            what="say what a run needs: tokens, disk, GPU memory",
            reads="the verifier's config.json",
            writes="nothing; prints tokens, disk and GPU memory",
            groups=("", "plan"),
            examples=(f"fledge plan {RUN}", f"fledge plan {RUN} plan.gpu=h200"),
            prints=True,
        ),
        "preview": Command(
            function="fledge.data_synthesis.preview:preview",
            what="print a conversation, what the verifier wrote coloured",
            reads="runs/NAME/conversations/, or preview.file; the verifier's chat template",
            writes="nothing; prints tokens and loss mask",
            groups=("", "preview"),
            examples=(f"fledge preview {RUN}", "fledge preview --help synthesize"),
            prints=True,
        ),
        "inspect": Command(
            function="fledge.data_synthesis.inspect_store:inspect_store",
            what="print what a store holds, and if it is sound",
            reads="a store of hidden states",
            writes="nothing; exit code 1 if states are not finite",
            groups=("inspect",),
            examples=("fledge inspect runs/first/hidden_states", "fledge inspect runs/first/hidden_states --verify"),
            prints=True,
            option="inspect.store",
            flags={"--verify": "inspect.verify=true"},
        ),
        "compare": Command(
            function="fledge.eval.compare:compare",
            what="print trainings and evaluations side by side, with published figures",
            reads="runs/NAME/training/ and evaluation/ of each run",
            writes="nothing; prints them side by side",
            groups=("compare",),
            examples=("fledge compare runs/first", "fledge compare runs/first runs/second"),
            prints=True,
            option="compare.runs",
        ),
        "tune": Command(
            function="fledge.eval.served.tune:tune",
            what="say how many draft tokens pay at which load, as settings of the engines",
            reads="runs/NAME/evaluation/ of each run",
            writes="nothing; prints speeds and settings",
            groups=("tune",),
            examples=("fledge tune alone-1 head-1", "fledge tune runs/first tune.folder=serving"),
            prints=True,
            option="tune.runs",
        ),
    },
}
COMMANDS = {name: command for commands in PURPOSES.values() for name, command in commands.items()}
