"""Speculative decoding gives the verifier's own tokens, and counts what it did."""

import pytest
import torch
from builders import make_head
from fledge.conf.schema import DraftConfig
from fledge.data_synthesis.chat import prompt_tokens
from fledge.eval.acceptance import AcceptanceRule, Proposal
from fledge.eval.draft_decoder import DraftDecoder
from fledge.eval.metrics import Counts
from fledge.eval.prompt_lookup import NoDraft, PromptLookup
from fledge.eval.speculative import speculate
from fledge.models.draft_head import DraftHead, DraftHeadConfig, initialise
from fledge.models.embedded.corpus import questions
from fledge.models.verifier import VerifierWeights
from fledge.models.vocabulary import build_vocabulary


class Oracle:
    """Proposes the verifier's own continuation, wrong at every n-th proposal."""

    name = "oracle"

    def __init__(self, answer: list[int], wrong_every: int) -> None:
        self.answer, self.wrong_every = answer, wrong_every
        self.known = self.proposed = 0

    def start(self, prompt: list[int]) -> None:
        self.known = -len(prompt) + 1

    def extend(self, fed: list[int], aux_hidden_states: torch.Tensor) -> None:
        assert len(fed) == len(aux_hidden_states)
        self.known += len(fed)

    def propose(self, num_draft_tokens: int, rule: AcceptanceRule) -> Proposal:
        tokens = []
        for token in self.answer[self.known : self.known + num_draft_tokens]:
            self.proposed += 1
            tokens.append((token + 1) % 100 if self.proposed % self.wrong_every == 0 else token)
        return Proposal(tokens)


@pytest.fixture(scope="module")
def prompts(verifier) -> list[list[int]]:
    return [
        prompt_tokens(verifier.tokenizer, [{"role": "user", "content": question["turns"][0]}])
        for question in questions()[::6]
    ]


@pytest.fixture(scope="module")
def plain_answers(verifier, prompts) -> list[list[int]]:
    """transformers' own greedy answers."""
    answers = []
    for prompt in prompts:
        output = verifier.model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=verifier.end_token_ids
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def random_head(verifier, verifier_config) -> DraftDecoder:
    weights = VerifierWeights(verifier_config)
    config = DraftHeadConfig.from_verifier(DraftConfig(vocab_size=300), verifier.model.config)
    head = DraftHead(config, build_vocabulary(torch.ones(config.vocab_size, dtype=torch.int64), 300))
    initialise(head, weights.embedding(), weights.lm_head(), 0)
    return DraftDecoder(head, weights.embedding())


@pytest.mark.parametrize("drafter", ["none", "random head", "prompt lookup", "oracle, wrong at times"])
def test_greedy_speculation_equals_verifier_greedy(verifier, verifier_config, prompts, plain_answers, drafter):
    decoder = random_head(verifier, verifier_config)
    for prompt, answer in zip(prompts, plain_answers, strict=True):
        chosen = {
            "none": NoDraft(),
            "random head": decoder,
            "prompt lookup": PromptLookup(),
            "oracle, wrong at times": Oracle(answer, wrong_every=3),
        }[drafter]
        decoded = speculate(verifier, chosen, prompt, num_draft_tokens=4, max_tokens=40)
        assert decoded.tokens == answer


def test_an_oracle_gains_every_token_of_every_round(verifier, prompts, plain_answers):
    prompt, answer = next((p, a) for p, a in zip(prompts, plain_answers, strict=True) if len(a) > 12)
    decoded = speculate(verifier, Oracle(answer, wrong_every=10**9), prompt, num_draft_tokens=3, max_tokens=13)
    assert decoded.tokens == answer[:13]
    assert decoded.accepted == [3, 3, 3]


def test_a_prompt_that_fills_the_context_is_refused(verifier):
    limit = verifier.model.config.max_position_embeddings
    with pytest.raises(ValueError, match="fills the verifier's context"):
        speculate(verifier, NoDraft(), [5] * limit, num_draft_tokens=3, max_tokens=4)


def test_rejected_drafts_leave_no_trace_in_the_heads_cache():
    head = make_head()
    embedding = torch.randn(120, 32, generator=torch.Generator().manual_seed(4))
    aux = torch.randn(9, 96, generator=torch.Generator().manual_seed(5))
    tokens = list(range(10, 19))
    clean, used = (DraftDecoder(head, embedding) for _ in range(2))
    clean.extend(tokens, aux)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        used.extend(tokens[first:last], aux[first:last])
        proposed = used.propose(5)
    assert clean.propose(5) == proposed


def test_counts_follow_vllms_definitions():
    counts = Counts(3)
    counts.add(drafted=[3, 3, 3, 0], accepted=[3, 1, 0, 0], output_tokens=8, seconds=2.0)
    values = counts.as_dict()
    assert values["num_drafts"] == 4
    assert values["num_draft_tokens"] == 9
    assert values["num_accepted_tokens"] == 4
    assert values["num_accepted_tokens_per_pos"] == [2, 1, 1]
    assert values["acceptance_rate_per_pos"] == [0.5, 0.25, 0.25]
    assert values["conditional_acceptance_rate_per_pos"] == [0.5, 0.5, 1.0]
    assert values["acceptance_length"] == 2.0
    assert values["tokens_per_s"] == 4.0
