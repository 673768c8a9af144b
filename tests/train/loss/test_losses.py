"""The losses: what each is by definition, and that another is one entry."""

import subprocess
import sys

import pytest
import torch
from builders import make_batch, make_head, matrices
from fledge.train.loss.losses import LOSSES, Loss, Rows
from fledge.train.loss.unroll import TTTModule
from plain_ttt import PlainTTTModule, plain_unroll

DEFINITIONS = {  # of probabilities P, q over a draft vocabulary, p = P / sum P, gamma^k, b, and R_k
    "kl": lambda P, p, q, gamma, b, reach: gamma * (p * (p / q).log()).sum(-1),
    "reverse_kl": lambda P, p, q, gamma, b, reach: gamma * (q * (q / p).log()).sum(-1),
    "total_variation": lambda P, p, q, gamma, b, reach: gamma * ((P - q).abs().sum(-1) + 1 - P.sum(-1)) / 2,
    "lk_alpha": lambda P, p, q, gamma, b, reach: -gamma * torch.minimum(P, q).sum(-1).log(),
    "lk_lambda": lambda P, p, q, gamma, b, reach: (
        gamma * (b * (p * (p / q).log()).sum(-1) + (1 - b) * (1 - torch.minimum(P, q).sum(-1)))
    ),
    "acceptance_length": lambda P, p, q, gamma, b, reach: (
        gamma * b * (p * (p / q).log()).sum(-1) - (1 - b) * reach  # E[length] - 1 = sum R_k
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_value_of_a_loss_is_its_definition(name):
    generator = torch.Generator().manual_seed(1)
    P, q = (torch.randn(2, 9, 30, generator=generator, dtype=torch.float64) * 2).softmax(-1)
    P = P * torch.rand(9, 1, generator=generator, dtype=torch.float64)  # the rest lies outside the draft vocabulary
    p, reach = P / P.sum(-1, keepdim=True), torch.rand(9, generator=generator, dtype=torch.float64)
    kl, overlap = (p * (p / q).log()).sum(-1), torch.minimum(P, q).sum(-1)
    found = LOSSES[name].value(Rows(kl, overlap, reach, 0.8, 0.3, p, q.log()))
    torch.testing.assert_close(found, DEFINITIONS[name](P, p, q, 0.8, 0.3, reach), rtol=1e-12, atol=1e-12)


def test_the_running_mean_of_acceptance_is_kept_for_losses_that_read_it():
    for name, loss in LOSSES.items():
        ones = torch.ones(3)
        values = [loss.value(Rows(ones, 0.5 * ones, ones, 1.0, b, ones[:, None], -ones[:, None])) for b in (0.2, 0.7)]
        assert torch.equal(*values) != loss.blends, name


def squared_error_(q, probabilities, mass, scratch):
    """Turn q into the gradient of sum (q - p)^2."""
    difference = torch.addcmul(q, probabilities, (1 / mass)[:, None], value=-1, out=scratch)
    value = difference.square().sum(-1)
    mean = (q * difference).sum(-1, keepdim=True)
    q.mul_(2 * (difference - mean))
    return value


NEW = {
    "squared_error": Loss(
        lambda rows: rows.gamma * (rows.log_q.exp() - rows.p).square().sum(-1), gradient_=squared_error_
    ),
    "squared_variation": Loss(
        lambda rows: rows.gamma * (1 - rows.overlap).square(), lambda rows: (None, 2 * (1 - rows.overlap))
    ),
    "kl_and_reach": Loss(
        lambda rows: rows.gamma * (rows.blend * rows.kl - rows.overlap) - 0.5 * rows.blend * rows.reach,
        lambda rows: (rows.blend, 1.0),
        reach_share=lambda blend: 0.5 * blend,
        blends=True,
    ),
}


def trained(kind, name, steps=4):
    """Train a head; give the loss of each step, and the weights."""
    head = make_head(draft_vocab_size=60).double()
    module = kind(head, 4, 0.8, LOSSES[name])
    batch = make_batch([17, 1, 31], seed=3).to(torch.device("cpu"), torch.float64, 4)
    embedding, lm_head = (matrix.double() for matrix in matrices())
    optimizer = torch.optim.SGD(head.parameters(), 0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = module(batch, embedding, lm_head, acceptance=torch.tensor([0.5, 0.3, 0.2, 0.1]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach() for name, parameter in head.named_parameters()}


@pytest.mark.parametrize("name", NEW)
def test_a_loss_is_added_by_one_entry(name, monkeypatch):
    """Its value and gradient are those of autograd over the plain form, and training lowers it."""
    monkeypatch.setitem(LOSSES, name, NEW[name])
    losses, weights = trained(TTTModule, name)
    expected, of_autograd = trained(PlainTTTModule, name)
    assert losses == pytest.approx(expected, rel=1e-9)
    for part, weight in of_autograd.items():
        torch.testing.assert_close(weights[part], weight, rtol=1e-8, atol=1e-10)
    assert losses[-1] < losses[0]


def test_that_entry_is_a_value_of_train_loss():
    code = (
        "import sys\n"
        "from fledge.train.loss.losses import LOSSES, Loss\n"
        "LOSSES['squared_variation'] = Loss(lambda rows: rows.gamma * (1 - rows.overlap).square())\n"
        "from fledge.conf.cli import main\n"
        "sys.argv = ['fledge', 'plan', 'experiment=llama31_8b', 'name=x', 'plan.disk_tb=100', sys.argv[1]]\n"
        "main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run([*command, "train.loss=squared_variation"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "train.loss=squared"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "train.loss: " in done.stderr
    assert all(name in done.stderr for name in (*LOSSES, "squared_variation"))


def test_the_loss_does_not_care_how_the_states_of_its_steps_came_about():
    def plainly(head, batch, rows, embedding, recompute=False, kernels=False):
        everywhere = plain_unroll(head, batch, embedding, len(rows.steps))
        return [states[rows.rows[places]] for states, places in zip(everywhere, rows.steps, strict=True)]

    head, batch, (embedding, lm_head) = make_head(), make_batch([14, 30], seed=5), matrices()
    gradients = []
    for module in (TTTModule(head, 4, 0.8, unroll=plainly), TTTModule(head, 4, 0.8)):
        module.zero_grad()
        module(batch, embedding, lm_head)[0].backward()
        gradients.append([parameter.grad for parameter in head.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
