"""The synthesize stage: the verifier answers every user turn, in order, on its own history."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..conf.artifact import artifact, digest
from ..conf.journal import Journal
from ..conf.progress import Progress
from ..conf.schema import Config, SynthesizeConfig
from ..models.verifier import Verifier, verifier_identity
from .chat import Message, check_template, prompt_tokens
from .conversations import content_digest, open_conversations, read_conversations
from .prompts import Prompt, load_prompts
from .split import is_heldout


def synthesize(config: Config) -> None:
    """Answer the prompts of `data` with the verifier and write runs/<name>/conversations/."""
    prompts = load_prompts(config.data)
    options = config.synthesize
    settings = {
        "verifier": verifier_identity(config.verifier),
        "verifier_dtype": config.verifier.dtype.value,
        "prompts": digest([digest(dataclasses.astuple(prompt)) for prompt in prompts]),
        "num_prompts": len(prompts),
        "heldout_share": config.data.heldout_share,
        "synthesize": {
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "batch_size": options.batch_size,
            "seed": options.seed,
        },
    }
    with artifact(config.conversations_folder, "conversations", settings, config.overwrite) as target:
        if target.complete and target.manifest["content"] == content_digest(target.folder):
            print(f"conversations: {target.folder} is complete")
            return
        target.save(complete=False, verifier_path=config.verifier.path)
        journal = open_conversations(target.folder)
        _answer_all(config, prompts, journal)
        journal.close()
        counts, sources = _count(target.folder)
        counts["left_out"] = len(prompts) - counts["conversations"]
        target.finish(counts=counts, sources=sources, content=content_digest(target.folder))
        print(
            f"conversations: {counts['conversations']} in {target.folder}, {counts['truncated']} with a truncated "
            f"answer, {counts['left_out']} left out because the prompt fills the verifier's context"
        )


def _answer_all(config: Config, prompts: list[Prompt], journal: Journal) -> None:
    """Answer what the journal lacks.

    Batches are the same at every start, and one that a kill left half-written is answered anew as a whole, so that a
    resumed run says what an uninterrupted one would have said.
    """
    if journal.done >= {prompt.id for prompt in prompts}:
        return
    verifier = Verifier.load(config.verifier, config.draft.aux_layers)
    check_template(verifier.tokenizer, verifier.end_token_ids)
    share, options = config.data.heldout_share, config.synthesize
    fitting = [prompt for prompt in prompts if _room(verifier, first_context(verifier, prompt), options) >= 0]
    progress = Progress("synthesize", len(fitting), "conversation", done=len(journal.done))
    for greedy in (True, False):
        split = [prompt for prompt in fitting if is_heldout(prompt.id, share) == greedy]
        split.sort(key=lambda prompt: (len(prompt.turns), sum(map(len, prompt.turns)), prompt.id))
        for start in range(0, len(split), options.batch_size):
            batch = split[start : start + options.batch_size]
            missing = {prompt.id for prompt in batch} - journal.done
            if missing:
                records = answer(verifier, batch, options, greedy)
                journal.append(record for record in records if record["id"] in missing)
                progress.update(len(missing))
    progress.close()


def first_context(verifier: Verifier, prompt: Prompt) -> list[int]:
    """Give the tokens the verifier reads before its first answer."""
    return prompt_tokens(verifier.tokenizer, [*_system(prompt), {"role": "user", "content": prompt.turns[0]}])


def _system(prompt: Prompt) -> list[Message]:
    return [{"role": "system", "content": prompt.system}] if prompt.system else []


def _room(verifier: Verifier, context: list[int], options: SynthesizeConfig) -> int:
    """Give the tokens of the verifier's context that the longest answer leaves free; negative if it does not fit."""
    return verifier.model.config.get_text_config().max_position_embeddings - len(context) - options.max_tokens


def answer(verifier: Verifier, prompts: list[Prompt], options: SynthesizeConfig, greedy: bool) -> list[dict[str, Any]]:
    """Answer prompts turn by turn, each on its own history, and give their records.

    A conversation that outgrows the verifier's context ends at the last turn that fits; the first must fit.
    """
    histories = [_system(prompt) for prompt in prompts]
    records: list[dict[str, Any]] = [
        {
            "id": p.id,
            "source": p.source,
            "messages": h,
            "finish_reasons": [],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0},
        }
        for p, h in zip(prompts, histories, strict=True)
    ]
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        contexts: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            if turn < len(prompt.turns) and len(records[i]["finish_reasons"]) == turn:
                asked = [*histories[i], {"role": "user", "content": prompt.turns[turn]}]
                context = prompt_tokens(verifier.tokenizer, asked)
                if _room(verifier, context, options) >= 0:
                    histories[i][:] = asked
                    contexts[i] = context
        if not contexts:
            break
        seed = int(digest([options.seed, turn, [prompts[i].id for i in contexts]]), 16) % 2**63
        answers = generate(verifier, list(contexts.values()), options, greedy, seed)
        for (i, context), (tokens, ended) in zip(contexts.items(), answers, strict=True):
            text = str(verifier.tokenizer.decode(tokens, skip_special_tokens=True))
            histories[i].append({"role": "assistant", "content": text})
            records[i]["finish_reasons"].append("stop" if ended else "length")
            records[i]["usage"]["prompt_tokens"] += len(context)
            records[i]["usage"]["completion_tokens"] += len(tokens)
    return records


def generate(
    verifier: Verifier, contexts: list[list[int]], options: SynthesizeConfig, greedy: bool, seed: int
) -> list[tuple[list[int], bool]]:
    """Generate an answer to each token context; give its tokens and whether it ended by itself."""
    width = max(map(len, contexts))
    end = verifier.end_token_ids
    padding = verifier.tokenizer.pad_token_id if verifier.tokenizer.pad_token_id is not None else end[0]
    input_ids = torch.tensor([[padding] * (width - len(c)) + c for c in contexts], device=verifier.device)
    attention_mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=verifier.device)
    sample = not greedy and options.temperature > 0
    torch.manual_seed(seed)
    # A configuration of our own: the verifier's may carry penalties, and greedy must be greedy.
    generation = GenerationConfig(
        max_new_tokens=options.max_tokens,
        do_sample=sample,
        **({"temperature": options.temperature, "top_p": options.top_p, "top_k": 0} if sample else {}),
        eos_token_id=end,
        pad_token_id=padding,
    )
    verifier.model.generation_config = generation
    output = verifier.model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=generation)
    answers = []
    for row in output[:, width:].tolist():
        stop = next((i for i, token in enumerate(row) if token in end), None)
        answers.append((row if stop is None else row[: stop + 1], stop is not None))
    return answers


def _count(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Give what the conversations hold, and how many of them each source has."""
    sources: dict[str, int] = {}
    counts = {"conversations": 0, "truncated": 0, "completion_tokens": 0}
    for record in read_conversations(folder):
        counts["conversations"] += 1
        sources[record["source"]] = sources.get(record["source"], 0) + 1
        counts["truncated"] += "length" in record["finish_reasons"]
        counts["completion_tokens"] += record["usage"]["completion_tokens"]
    return counts, sources
