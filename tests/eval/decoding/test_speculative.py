"""Speculative decoding gives the verifier's own tokens, in chains, trees and batches, and counts what it did."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from builders import make_head
from fledge.conf.schema import DraftConfig
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.eval.decoding.acceptance import GREEDY, AcceptanceRule
from fledge.eval.decoding.head_drafter import DraftDecoder
from fledge.eval.decoding.prompt_lookup import NoDraft, PromptLookup
from fledge.eval.decoding.proposal import Drafter, Proposal, Tree, accepted_path, grow_tree
from fledge.eval.decoding.speculator import Answer, Request, Speculator, answer_alone
from fledge.eval.figures.metrics import Counts
from fledge.models.embedded.verifier import questions
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead, initialise
from fledge.models.head.vocabulary import build_vocabulary
from fledge.models.verifier.cache import CachedVerifier
from fledge.models.verifier.model import Verifier
from fledge.models.verifier.weights import VerifierWeights
from one_sequence import OneSequence
from oracles import Oracle, TreeOracle
from small_heads import FORMS

SHAPES = {"chain": {"num_draft_tokens": 4}, "tree": {"num_draft_tokens": 12, "tree_depth": 4, "tree_top_k": 4}}


@pytest.fixture(scope="module")
def prompts(verifier) -> list[list[int]]:
    asked = [question["turns"][0] for question in questions()[::8]]
    return [prompt_tokens(verifier.tokenizer, [{"role": "user", "content": text}]) for text in asked]


@pytest.fixture(scope="module")
def plain_answers(verifier, prompts) -> list[list[int]]:
    """transformers' own greedy answers."""
    return [generated(verifier, prompt, 40) for prompt in prompts]


def generated(verifier: Verifier, prompt: list[int], max_tokens: int) -> list[int]:
    output = verifier.model.generate(
        torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=verifier.end_token_ids or None
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def random_head(verifier, verifier_config) -> tuple[DraftHead, torch.Tensor]:
    weights = VerifierWeights(verifier_config)
    config = DraftHeadConfig.from_verifier(DraftConfig(vocab_size=300), verifier.model.config)
    head = DraftHead(config, build_vocabulary(torch.ones(config.vocab_size, dtype=torch.int64), 300))
    initialise(head, weights.embedding(), weights.lm_head(), 0)
    return head, weights.embedding()


def answers_of(
    verifier: Verifier,
    drafter: Drafter,
    prompts: list[list[int]],
    rule: AcceptanceRule = GREEDY,
    num_sequences: int = 1,
    max_tokens: int = 40,
) -> list[Answer]:
    speculator = Speculator(verifier, [drafter], rule, num_sequences)
    answers = []
    for first in range(0, len(prompts), num_sequences):
        group = enumerate(prompts[first : first + num_sequences], first)
        speculator.prefill([Request(prompt, max_tokens, str(number)) for number, prompt in group])
        answers += speculator.decode(drafter)
    return answers


def drafter_of(name: str, head: tuple[DraftHead, torch.Tensor], num_sequences: int, rule=GREEDY) -> Drafter:
    if name == "none":
        return NoDraft()
    if name == "prompt lookup":
        return PromptLookup(4, num_sequences)
    return DraftDecoder(*head, **SHAPES[name], rule=rule, num_sequences=num_sequences)


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("drafter", ["none", "prompt lookup", *SHAPES])
def test_greedy_speculation_equals_verifier_greedy(
    verifier, random_head, prompts, plain_answers, drafter, num_sequences
):
    answers = answers_of(verifier, drafter_of(drafter, random_head, num_sequences), prompts, GREEDY, num_sequences)
    assert [answer.tokens for answer in answers] == plain_answers


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("drafter", ["prompt lookup", *SHAPES])
def test_sampled_answers_are_those_of_the_verifier_alone_whatever_is_proposed_and_beside_whatever(
    verifier, random_head, prompts, drafter, num_sequences
):
    rule = AcceptanceRule(temperature=1.0, top_p=0.95)
    alone = answers_of(verifier, NoDraft(), prompts, rule)
    drafted = answers_of(verifier, drafter_of(drafter, random_head, num_sequences, rule), prompts, rule, num_sequences)
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in alone]
    assert sum(sum(answer.accepted) for answer in drafted) > 0


def test_an_oracle_gains_every_token_of_every_round_and_each_sequence_counts_its_own(verifier, prompts, plain_answers):
    long = [(p, a) for p, a in zip(prompts, plain_answers, strict=True) if len(a) > 12][:3]
    oracle = Oracle([a for _, a in long], 3)
    speculator = Speculator(verifier, [oracle], GREEDY, 3)
    speculator.prefill([Request(p, 5 + 4 * number) for number, (p, _) in enumerate(long)])
    for number, (decoded, (_, answer)) in enumerate(zip(speculator.decode(oracle), long, strict=True)):
        assert decoded.tokens == answer[: 5 + 4 * number]
        assert decoded.accepted == decoded.drafted == [3] * (number + 1)


@pytest.mark.parametrize("wrong", [0.0, 0.15])
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_what_is_accepted_of_a_proposal_changes_no_token(verifier, prompts, plain_answers, kind, wrong):
    accepted = rounds = 0
    for first in range(0, len(prompts) - 2, 3):
        group, expected = prompts[first : first + 3], plain_answers[first : first + 3]
        oracle = Oracle(expected, 4, wrong) if kind == "chain" else TreeOracle(expected, 17, 4, wrong)
        answers = answers_of(verifier, oracle, group, num_sequences=3)
        assert [answer.tokens for answer in answers] == expected
        accepted += sum(sum(answer.accepted[:-1]) for answer in answers)
        rounds += sum(len(answer.accepted[:-1]) for answer in answers)
    assert accepted == 4 * rounds if not wrong else 2 * rounds < accepted < 4 * rounds


def test_prompts_are_read_once_and_answered_as_often_as_wanted(verifier, random_head, prompts, plain_answers):
    drafters = [drafter_of(name, random_head, 1) for name in SHAPES]
    speculator = Speculator(verifier, drafters)
    speculator.prefill([Request(prompts[0], 40)])
    for drafter in [*drafters, NoDraft(), *drafters]:
        assert speculator.decode(drafter)[0].tokens == plain_answers[0]


def test_a_prompt_that_fills_the_context_is_refused_and_one_that_nearly_does_is_answered(verifier, random_head):
    limit = verifier.model.config.max_position_embeddings
    with pytest.raises(ValueError, match="fills the verifier's context"):
        answer_alone(verifier, [5] * limit, 4)
    (decoded,) = answers_of(verifier, drafter_of("chain", random_head, 1), [[5] * (limit - 8)])
    assert 0 < len(decoded.tokens) <= 3


def test_a_sequence_that_has_ended_stays_within_the_context_while_others_go_on():
    """GPT-2 has a table of positions, and none beyond the context."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=128, bos_token_id=None, eos_token_id=None
    )
    plain = transformers.GPT2LMHeadModel(config).eval()
    verifier = Verifier(plain, SimpleNamespace(eos_token_id=None, eos_token=None), [0])
    prompts = [list(range(44)), [3, 5, 7]]
    expected = [generated(verifier, prompt, limit) for prompt, limit in zip(prompts, (20, 50), strict=True)]
    oracle = Oracle(expected, 5)  # in its last round the first answer comes to position 62
    speculator = Speculator(verifier, [oracle], num_sequences=2)
    speculator.prefill([Request(prompt, 50) for prompt in prompts])
    answers = [answer.tokens for answer in speculator.decode(oracle)]
    assert answers == [expected[0][: len(answers[0])], expected[1]]
    assert len(answers[0]) == 14


# -- the verifier's cache ----------------------------------------------------------------------------------------------


def test_every_node_of_a_tree_sees_its_ancestors_and_nothing_else(verifier):
    prompt, nodes = list(range(20, 30)), [40, 41, 42, 43, 44]
    parents = torch.tensor([[0, 0, 1, 2]])  # of nodes 1 to 4
    ways = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]
    ancestors = torch.zeros(1, 5, 5, dtype=torch.bool)
    for node, way in enumerate(ways):
        ancestors[0, node, way] = True
    tree = Tree(parents, torch.tensor([[0, 1, 1, 2, 2]]), ancestors, 2)
    cached = CachedVerifier(verifier, 1)
    cached.reserve(64)
    cached.forward(torch.tensor([prompt]), torch.tensor([0]), 64)
    found = cached.forward(torch.tensor([nodes]), torch.tensor([10]), 64, tree=tree)
    for node, way in enumerate(ways):
        expected = verifier.forward(torch.tensor([prompt + [nodes[i] for i in way]]))
        torch.testing.assert_close(found.logits[0, node], expected.logits[0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            found.aux_hidden_states[0, node], expected.aux_hidden_states[0, -1], rtol=1e-4, atol=1e-4
        )
    # What was accepted is brought together, and the text goes on from there as if it had been read in a row.
    cached.cache.move(torch.tensor([[10, 12, 14]]), torch.tensor([[10, 11, 12]]))
    after = cached.forward(torch.tensor([[50]]), torch.tensor([13]), 64)
    expected = verifier.forward(torch.tensor([[*prompt, 40, 42, 44, 50]]))
    torch.testing.assert_close(after.logits[0, -1], expected.logits[0, -1], rtol=1e-4, atol=1e-4)


def test_a_model_to_which_masks_mean_something_else_is_refused(verifier, prompts, monkeypatch):
    cached = CachedVerifier(verifier, 2)
    cached.check(prompts[0])
    everything = lambda lengths, slots, num_read, ancestors: torch.ones(*slots.shape, num_read, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr("fledge.models.verifier.cache.visible", everything)
    with pytest.raises(ValueError, match=r"gives other logits with fledge's cache than by itself"):
        cached.check(prompts[0])


# -- proposals ---------------------------------------------------------------------------------------------------------


def test_the_way_of_the_worked_line():
    ancestors = torch.ones(1, 5, 5, dtype=torch.bool)
    sat, on, stop, the, a, mat = range(6)
    tree = Tree(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 2, 2]]), ancestors, 2)
    proposal = Proposal(torch.tensor([[on, stop, the, a]]), tree)
    way = accepted_path(proposal, torch.tensor([[on, the, sat, mat, sat]]))
    assert way.nodes.tolist() == [[0, 1, 3]]
    assert way.tokens.tolist() == [[on, the, mat]]
    assert way.accepted.tolist() == [2]
    way = accepted_path(proposal, torch.tensor([[mat, the, sat, mat, sat]]))
    assert (way.nodes.tolist(), way.accepted.tolist(), way.tokens[0, 0].item()) == ([[0, 0, 0]], [0], mat)


def test_a_chain_is_a_tree_without_branches():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 2, (50, 5), generator=generator)
    choices = torch.randint(0, 2, (50, 6), generator=generator)
    parents = torch.arange(5).expand(50, -1)
    tree = Tree(parents, torch.arange(6).expand(50, -1), torch.ones(50, 6, 6).tril().bool(), 5)
    chain, as_tree = accepted_path(Proposal(tokens), choices), accepted_path(Proposal(tokens, tree), choices)
    assert torch.equal(chain.accepted, as_tree.accepted)
    assert torch.equal(chain.nodes, as_tree.nodes)
    assert torch.equal(chain.tokens, as_tree.tokens)
    assert set(chain.accepted.tolist()) == {0, 1, 2, 3, 4, 5}


def test_a_tree_keeps_the_best_nodes_with_their_parents_also_where_scores_are_equal():
    #            0    1    2: child of 0  3: child of 1  4: child of 2
    scores = torch.tensor([[-0.5, -0.1, -0.5, -3.0, -0.5]])
    tokens, parents = torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[-1, -1, 0, 1, 2]])
    kept, tree = grow_tree(scores, tokens, parents, num_nodes=4, depth=3)
    assert kept.tolist() == [[10, 11, 12, 14]]
    assert tree.parents.tolist() == [[0, 0, 1, 3]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 3]]
    assert tree.ancestors[0, 4].tolist() == [True, True, False, True, True]
    kept, tree = grow_tree(scores, tokens, parents, num_nodes=2, depth=3)
    assert kept.tolist() == [[10, 11]]


def naive_tree(head: DraftHead, embedding, fed, aux, num_nodes: int, depth: int, top_k: int) -> dict[tuple, float]:
    """EAGLE-2's tree, each node decoded by itself as the end of a chain: draft tokens on the way -> log-probability."""

    def children(way: tuple[int, ...]) -> dict[tuple, float]:
        decoder = OneSequence(head, embedding)
        decoder.extend(fed, aux)
        for step, token in enumerate(way, 1):
            decoder.feed(token, step)
        best = decoder.logits().log_softmax(-1).topk(top_k)
        return {(*way, int(head.target_ids[i])): float(s) for s, i in zip(best.values, best.indices, strict=True)}

    growing = children(())
    nodes = dict(growing)
    for _ in range(depth - 1):
        level = {}
        for way, score in growing.items():
            level |= {child: score + more for child, more in children(way).items()}
        nodes |= level
        growing = dict(sorted(level.items(), key=lambda item: -item[1])[:top_k])
    return dict(sorted(nodes.items(), key=lambda item: -item[1])[:num_nodes])


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "num_nodes", "depth", "top_k"),
    [
        *(({}, *sizes) for sizes in [(12, 4, 3), (20, 3, 5), (5, 1, 8), (4, 4, 2)]),
        *(
            (FORMS[form], 12, 4, 3)
            for form in ("speculators", "five_layers_full_vocabulary", "window", "deep_with_all")
        ),
    ],
)
def test_the_tree_of_a_head_is_that_of_eagle_2(changes, num_nodes, depth, top_k):
    head = make_head(**changes)
    embedding = torch.randn(120, 32, generator=torch.Generator().manual_seed(4))
    aux = torch.randn(9, 32 * len(head.config.aux_layers), generator=torch.Generator().manual_seed(5))
    fed = list(range(10, 19))
    decoder = OneSequence(head, embedding, num_nodes, tree_depth=depth, tree_top_k=top_k)
    decoder.extend(fed[:6], aux[:6])
    decoder.propose()  # and thrown away
    decoder.extend(fed[6:], aux[6:])
    proposal = decoder.propose()
    ways: list[tuple[int, ...]] = [()]
    for token, parent in zip(proposal.tokens[0].tolist(), proposal.tree.parents[0].tolist(), strict=True):
        ways.append((*ways[parent], token))
    assert [len(way) for way in ways] == proposal.tree.depths[0].tolist()
    assert set(ways[1:]) == set(naive_tree(head, embedding, fed, aux, num_nodes, depth, top_k))


def test_rejected_drafts_leave_no_trace_in_the_heads_cache():
    head = make_head()
    embedding = torch.randn(120, 32, generator=torch.Generator().manual_seed(4))
    aux = torch.randn(9, 96, generator=torch.Generator().manual_seed(5))
    tokens = list(range(10, 19))
    clean, used = (OneSequence(head, embedding, 5) for _ in range(2))
    clean.extend(tokens, aux)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        used.extend(tokens[first:last], aux[first:last])
        proposed = used.propose()
    assert clean.propose().tokens.tolist() == proposed.tokens.tolist()


def test_counts_follow_vllms_definitions():
    counts = Counts([0] * 3)
    counts.add({"drafted": [3, 3, 3, 0], "accepted": [3, 1, 0, 0], "output_tokens": 8, "seconds": 2.0})
    values = counts.as_dict()
    assert values["num_drafts"] == 4
    assert values["num_draft_tokens"] == 9
    assert values["num_accepted_tokens"] == 4
    assert values["num_accepted_tokens_per_pos"] == [2, 1, 1]
    assert values["acceptance_rate_per_pos"] == [0.5, 0.25, 0.25]
    assert values["conditional_acceptance_rate_per_pos"] == [0.5, 0.5, 1.0]
    assert values["acceptance_length"] == 2.0
    assert values["tokens_per_s"] == 4.0
