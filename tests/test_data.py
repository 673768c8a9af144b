"""Packing: every sample once an epoch, in an order that a seed fixes."""

import random

import pytest
from fledge.conf.schema import TrainConfig
from fledge.train.batches import PackStream, pack
from fledge.train.engine import learning_rate


def test_packs_hold_every_sample_once_and_never_overflow():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(500)]
    packs = pack(lengths, list(range(500)), 100)
    assert sorted(sample for p in packs for sample in p) == list(range(500))
    assert max(sum(lengths[s] for s in p) for p in packs) <= 100
    assert len(packs) <= 1.05 * sum(lengths) / 100, "best fit leaves little room unused"


def test_stream_is_reproducible_from_any_position():
    lengths = [(7 * i) % 40 + 1 for i in range(60)]
    stream = PackStream(lengths, list(range(60)), 64, seed=3)
    whole = [p for epoch in range(4) for p in stream.epoch(epoch)]
    for first in (0, 1, len(stream.epoch(0)), len(stream.epoch(0)) + 5):
        resumed = stream.start_at(first)
        assert [next(resumed) for _ in range(20)] == whole[first : first + 20]
    assert stream.epoch(0) != stream.epoch(1)
    assert PackStream(lengths, list(range(60)), 64, seed=4).epoch(0) != stream.epoch(0)


def test_learning_rate_warms_up_linearly_and_falls_to_its_floor():
    options = TrainConfig(lr=1.0, warmup_share=0.1, min_lr_share=0.2)
    rates = [learning_rate(options, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.2, abs=1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
