"""The benchmark: what it needs, what it prints, what it refuses."""

import json
from dataclasses import replace

import pytest
from builders import make_head
from commands import import_without
from fledge.train.metrics.cost import plain_flops
from training_step import main, parse

TINY = ["hidden_size=32", "intermediate_size=48", "vocab_size=200", "draft_vocab_size=120", "seq_len=60", "repeats=1"]


def test_it_imports_with_torch_and_transformers_alone():
    import_without("training_step", "omegaconf", "hydra", "deepspeed", "accelerate", "datasets", "wandb", "matplotlib")


def test_both_implementations_are_measured_and_lose_the_same(capsys):
    main([*TINY, "implementation=both", "counted_share=0.5", "documents=2"])
    result = json.loads(capsys.readouterr().out)
    assert result["fused"]["loss"] == pytest.approx(result["plain"]["loss"], rel=1e-5)
    assert result["fused"]["cpu_ratio"] > 0
    for name in ("cpu_s", "wall_s", "tokens_per_s", "utilisation", "loss"):
        assert result["fused"][name] > 0
    assert result["options"]["draft_vocab_size"] == 120


def test_heads_of_several_depths_are_measured_in_turn(capsys):
    main([*TINY, "depths=1,3", "sliding_window=16"])
    result = json.loads(capsys.readouterr().out)
    assert result["3"]["plain_tflop"] > result["1"]["plain_tflop"]
    assert result["1"]["cpu_ratio"] == 1
    assert result["3"]["cpu_ratio"] > 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hiden_size=3", "unknown option 'hiden_size=3'"),
        ("hidden_size=x", "hidden_size must be of type int"),
        ("preset=c", "preset must be one of a, b, maverick, llama31_8b"),
        ("implementation=fast", "implementation must be one of fused, plain, both"),
        ("recompute=yes", "recompute must be of type bool"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(argument, message):
    with pytest.raises(ValueError, match=message):
        parse([argument])


def test_the_loss_kernel_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="loss_kernel needs device=cuda and loss=kl"):
        main(["loss_kernel=true"])


def test_a_preset_is_changed_by_what_follows_it():
    options = parse(["preset=maverick", "seq_len=64"])
    assert (options.hidden_size, options.vocab_size, options.seq_len, options.dtype) == (5120, 202048, 64, "bfloat16")


def test_operations_of_the_plain_algorithm_are_those_written_out():
    head = make_head(hidden_size=8, intermediate_size=5, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    config = replace(head.config, verifier_hidden_size=10, vocab_size=11, draft_vocab_size=7)
    weights = 16 * 8 + 2 * 16 * 4 + 8 * 8 + 3 * 8 * 5  # q, k and v, o, gate up down
    layer = 2 * 6 * weights + 2 * 2 * 8 * (4 * 4 + 2 * 2) / 2  # and q k^T, w v, half of it causal
    expected = 2 * 2 * 6 * 30 * 8 + 2 * 6 * 10 * 11 + 2 * 3 * layer + 3 * 2 * (4 + 3) * 8 * 7
    assert plain_flops(config, True, [4, 2], [4, 3]) == expected
    assert plain_flops(config, False, [4, 2], [4, 3]) == expected - 2 * (4 + 3) * 8 * 7
    frozen = 2 * 6 * 30 * 8 + 2 * 2 * 6 * weights + 2 * (4 + 3) * 8 * 7
    assert plain_flops(config, False, [4, 2], [4, 3], lora=True) == expected - frozen
    deep = replace(config, num_layers=3, sliding_window=3, window_layers=(1,))
    further = 2 * 6 * (weights - 8 * 16) + 2 * 2 * 8 * (4 * 4 + 2 * 2) / 2  # q, k and v read the state alone
    beyond = 2 * 2 * 8 * 1 * 1 / 2  # of the document of 4 rows, what one row does not see
    assert plain_flops(deep, True, [4, 2], [4, 3]) == expected + 2 * 3 * (2 * further - beyond)
