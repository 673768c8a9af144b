"""A drafter of another family is one entry: it answers, is counted and is reported."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from fledge.conf.runtime.journal import Journal
from fledge.conf.schema import Config, DraftConfig, EvaluateConfig
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.eval.decoding.drafters import DRAFTERS
from fledge.eval.decoding.proposal import NOTHING, NewRows, Proposal
from fledge.eval.decoding.speculator import Request, Speculator, answer_alone
from fledge.eval.figures.records import RECORDS
from fledge.eval.figures.report import print_table
from fledge.eval.figures.results import summarise
from fledge.eval.local import Answerer
from fledge.eval.questions.question import Question
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead, initialise
from fledge.models.head.vocabulary import build_vocabulary
from fledge.models.verifier.cache import round_up
from fledge.models.verifier.weights import VerifierWeights
from oracles import Oracle, TreeOracle

NAME = "nearest state"


class NearestState:
    """Proposes what followed the position whose aux states are nearest to the last one's; inherits nothing."""

    on_device, draws_tokens, num_draft_rows = True, False, 0

    def __init__(self, num_draft_tokens: int, num_sequences: int) -> None:
        self.num_draft_tokens = self.depth = num_draft_tokens
        self.tokens = torch.zeros(num_sequences, 0, dtype=torch.int64)
        self.last = torch.zeros(num_sequences, dtype=torch.int64)

    def reserve(self, num_slots: int) -> bool:
        if num_slots <= self.tokens.shape[1]:
            return False
        self.tokens = torch.zeros(len(self.last), round_up(num_slots), dtype=torch.int64)
        self.states: torch.Tensor | None = None
        return True

    def extend(self, rows: NewRows, aux_hidden_states: torch.Tensor) -> None:
        if self.states is None:
            self.states = torch.zeros(*self.tokens.shape, aux_hidden_states.shape[-1])
        each = torch.arange(len(rows.fed))[:, None]
        slots = rows.lengths[:, None] + torch.arange(rows.fed.shape[1])
        self.tokens[rows.sequences][each, slots] = rows.fed
        self.states[rows.sequences][each, slots] = aux_hidden_states
        self.last[rows.sequences] = rows.lengths + rows.counts - 1

    def propose(self, draws: torch.Tensor, num_read: int) -> Proposal:
        last = self.states[torch.arange(len(self.last)), self.last]
        distances = torch.cdist(last[:, None], self.states[:, :num_read])
        earlier = torch.arange(distances.shape[2]) < self.last[:, None] - self.depth
        nearest = distances[:, 0].masked_fill(~earlier, torch.inf).argmin(1)
        following = nearest[:, None] + 1 + torch.arange(self.depth)
        return Proposal(self.tokens.gather(1, following.clamp(max=self.tokens.shape[1] - 1)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_drafter_is_one_entry(verifier, verifier_config, tmp_path, capsys, monkeypatch, batch_size):
    monkeypatch.setitem(
        DRAFTERS, NAME, lambda inputs: NearestState(inputs.options.num_draft_tokens, inputs.options.batch_size)
    )
    options = EvaluateConfig(questions="q", max_tokens=30, batch_size=batch_size)
    config = Config(name="x", runs_dir=str(tmp_path), verifier=verifier_config, evaluate=options)
    weights = VerifierWeights(verifier_config)
    shape = DraftHeadConfig.from_verifier(DraftConfig(vocab_size=300), verifier.model.config)
    head = DraftHead(shape, build_vocabulary(torch.ones(shape.vocab_size, dtype=torch.int64), 300))
    initialise(head, weights.embedding(), weights.lm_head(), 0)
    questions = [Question(str(i), "all", (f"Say {i}: the river, the river, the", "Again?")) for i in range(3)]
    answerer = Answerer(config, verifier, head)
    journal = Journal(tmp_path / RECORDS)
    for first in range(0, 3, batch_size):
        journal.append(answerer.answer(questions[first : first + batch_size]))
    journal.close()
    results = summarise(config, None, {}, questions, tmp_path)
    found = results["baselines"][NAME]
    assert results["lossless"]["decoded_answers"] == results["lossless"]["equal_to_verifier"] == 6 * len(DRAFTERS)
    assert found["num_draft_tokens"] == 3 * found["num_drafts"]
    assert found["num_output_tokens"] == results["num_output_tokens"]
    assert found["num_accepted_tokens"] > 0
    assert results["by_category"]["all"][NAME]["acceptance_length"] == found["acceptance_length"]
    print_table(results)
    assert capsys.readouterr().out.count(NAME) == 2  # a row of all questions, a column of the categories


def test_the_draft_that_a_round_refused_is_kept_of_a_chain(verifier):
    turn = {"role": "user", "content": "Name three rivers, and say where they begin."}
    prompt = prompt_tokens(verifier.tokenizer, [turn])
    answer = answer_alone(verifier, prompt, 60)
    chain, tree = Oracle([answer], 3, wrong=0.3), TreeOracle([answer], 9, 3, wrong=0.3)
    speculator = Speculator(verifier, [chain, tree])
    speculator.prefill([Request(prompt, 60)])
    found, of_tree = (speculator.decode(drafter)[0] for drafter in (chain, tree))
    assert found.tokens == answer
    ends = list(accumulate(accepted + 1 for accepted in found.accepted))
    within = [
        (accepted, refused, answer[end])
        for accepted, refused, end in zip(found.accepted, found.refused, ends, strict=True)
        if end < len(answer)
    ]
    assert {accepted == 3 for accepted, *_ in within} == {True, False}
    for accepted, refused, own in within:
        assert refused == (NOTHING if accepted == 3 else (own + 1) % 100), "what the oracle says in its place"
    assert set(of_tree.refused) == {NOTHING}
