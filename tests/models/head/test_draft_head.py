"""The head's arithmetic and its checkpoint format."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from builders import make_head
from fledge.conf.schema import DraftConfig
from fledge.models.formats.plain import load_head, plain_config, save_head
from fledge.models.head.config import DraftHeadConfig, rope_of
from fledge.models.head.draft_head import DraftHead
from fledge.models.head.ttt_attention import TTTAttention
from fledge.models.head.vocabulary import build_vocabulary, coverage
from fledge.models.verifier.config import default_aux_layers, special_token_ids
from safetensors.torch import load_file, save_file
from small_heads import FORMS
from transformers import LlamaConfig
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3 import modeling_qwen3 as qwen3


def test_attention_equals_softmax_over_the_keys_written_out_row_by_row():
    generator = torch.Generator().manual_seed(0)
    lengths, steps = [5, 1, 7], 3
    q, k, v = (
        [torch.randn(13, heads, 8, generator=generator, dtype=torch.float64) for _ in range(steps)]
        for heads in (4, 2, 2)
    )
    attention = TTTAttention(lengths, num_layers=1)
    for step in range(steps):
        out = attention(0, q[step], k[step], v[step])
        start = 0
        for length in lengths:
            for row in range(start, start + length):
                for head in range(4):
                    keys = [k[0][j, head // 2] for j in range(start, row + 1)]
                    values = [v[0][j, head // 2] for j in range(start, row + 1)]
                    keys += [k[i][row, head // 2] for i in range(1, step + 1)]
                    values += [v[i][row, head // 2] for i in range(1, step + 1)]
                    weights = (torch.stack(keys) @ q[step][row, head] / 8**0.5).softmax(0)
                    torch.testing.assert_close(out[row, head], weights @ torch.stack(values), rtol=1e-5, atol=1e-6)
            start += length


PEERS = {  # transformers' own: what a further layer is in each form
    "llama": ({}, llama.LlamaConfig, llama.LlamaDecoderLayer, llama.LlamaRotaryEmbedding),
    "biases": ({"attention_bias": True}, llama.LlamaConfig, llama.LlamaDecoderLayer, llama.LlamaRotaryEmbedding),
    "qk_norm": ({"qk_norm": True}, qwen3.Qwen3Config, qwen3.Qwen3DecoderLayer, qwen3.Qwen3RotaryEmbedding),
    "partial_rotation": (
        {"qk_norm": True, **FORMS["partial_rotation"]},
        partial(glm4_moe.Glm4MoeConfig, use_qk_norm=True, first_k_dense_replace=2),
        glm4_moe.Glm4MoeDecoderLayer,
        glm4_moe.Glm4MoeRotaryEmbedding,
    ),
}


@pytest.mark.parametrize(("changes", "config_class", "layer_class", "rotary_class"), PEERS.values(), ids=PEERS)
def test_a_further_layer_equals_transformers_own(changes, config_class, layer_class, rotary_class):
    head = make_head(num_layers=2, **changes)
    names = [*("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")]
    names += ["rms_norm_eps", "max_position_embeddings", "attention_bias", "rope_parameters"]
    config = config_class(**{name: copy.deepcopy(getattr(head.config, name)) for name in names})
    config._attn_implementation = "eager"
    ours, theirs = head.layers[1], layer_class(config, layer_idx=1)
    theirs.load_state_dict(ours.state_dict())
    x, positions = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)), torch.arange(9)
    with torch.no_grad():
        mine = ours(x, x, head.rotary(positions, x), TTTAttention([9], 2))
        mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        rotary = rotary_class(config)(x, positions[None])
        expected = theirs(x[None], attention_mask=mask, position_embeddings=rotary)
    torch.testing.assert_close(mine, expected.squeeze(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fc_norm", [True, False])
def test_aux_states_are_normed_together_then_each_by_itself_and_joined(fc_norm):
    head = make_head(norm_before_fc=True, fc_norm=fc_norm)
    aux = 3 * torch.randn(7, 96, generator=torch.Generator().manual_seed(1))

    def normed(x, norm):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight

    expected = normed(aux, head.input_norm)
    if fc_norm:
        expected = torch.cat([normed(*pair) for pair in zip(expected.chunk(3, -1), head.fc_norm, strict=True)], -1)
    torch.testing.assert_close(head.fuse(aux), expected @ head.fc.weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_a_new_head_of_any_form_has_norms_of_ones_biases_of_zeros_and_the_matrices_of_the_default_form(changes):
    head, default = make_head(**changes, noise=0.0), make_head(noise=0.0)
    vectors = {name: p for name, p in head.named_parameters() if p.dim() == 1}
    assert all(torch.equal(p, torch.full_like(p, float("norm" in name))) for name, p in vectors.items())
    assert sum("bias" in name for name in vectors) == 4 * head.config.num_layers * head.config.attention_bias
    if len(head.config.aux_layers) == 3:  # of more fc draws more numbers
        drawn = {name: p for name, p in default.named_parameters() if p.dim() > 1 and name != "lm_head.weight"}
        assert all(torch.equal(head.state_dict()[name], matrix) for name, matrix in drawn.items())


def test_rms_norm_equals_llamas():
    ours, theirs = torch.nn.RMSNorm(32, 1e-5), LlamaRMSNorm(32, 1e-5)
    x = torch.randn(4, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_casting_the_head_leaves_rotary_frequencies_exact():
    head = make_head()
    x = torch.zeros(1)
    before = head.rotary(torch.arange(200), x)
    after = head.bfloat16().rotary(torch.arange(200), x)
    assert torch.equal(before[0], after[0])


def test_rotary_frequencies_follow_the_head_to_its_device():
    head = make_head()
    head.rotary(torch.arange(3, device="meta"), torch.zeros(1, device="meta"))
    assert head._rotary[0].inv_freq.device.type == "meta"  # moved once, not copied in every step


def test_tokens_beyond_the_verifiers_vocabulary_are_passed_over():
    assert build_vocabulary(torch.tensor([3, 1, 2]), 2, always=[2, 3]).target_ids.tolist() == [0, 2]


def test_vocabulary_holds_the_most_frequent_tokens_ties_to_the_lower_id():
    counts = torch.tensor([5, 0, 7, 7, 0, 5, 1])
    vocabulary = build_vocabulary(counts, 4, always=[6])
    assert vocabulary.target_ids.tolist() == [0, 2, 3, 6]
    assert (torch.arange(4) + vocabulary.d2t).tolist() == [0, 2, 3, 6]
    assert vocabulary.t2d.nonzero().squeeze(1).tolist() == [0, 2, 3, 6]
    assert coverage(counts, vocabulary) == 20 / 25


@pytest.mark.parametrize("size", [0, 8])
def test_vocabulary_of_an_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match="vocab_size must lie between"):
        build_vocabulary(torch.ones(7, dtype=torch.int64), size, always=[1])


def test_special_and_end_tokens_are_kept(verifier_config, verifier):
    special = special_token_ids(verifier_config)
    assert set(special) >= {*verifier.tokenizer.all_special_ids, *verifier.end_token_ids}
    counts = torch.zeros(len(verifier.tokenizer), dtype=torch.int64)
    assert build_vocabulary(counts, len(special), special).target_ids.tolist() == special


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}, ("llama3", 5e5)),
        ({"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}, ("default", 1e6)),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, ("default", 1e4)),
        ({"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0]}, ("default", 1e4)),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, ("default", 1e4)),
        (
            {
                "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            ("yarn", 1e6),
        ),
        (None, ("default", 1e4)),
    ],
)
def test_a_head_takes_its_verifiers_rope_where_engines_compute_it_alike(given, taken):
    rope = rope_of(SimpleNamespace(rope_parameters=given))
    assert (rope["rope_type"], rope["rope_theta"]) == taken
    assert not rope.keys() & {"mrope_section", "partial_rotary_factor", "long_factor"}


def test_default_aux_layers_are_those_of_the_engines():
    assert default_aux_layers(48) == [1, 23, 44]
    with pytest.raises(ValueError, match="aux_layers must be given"):
        default_aux_layers(6)


@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": None}, {"fc_norm": False, "norm_output": False}])
def test_a_saved_head_loads_back_bit_for_bit(tmp_path, changes):
    head = make_head(**changes)
    save_head(tmp_path, head, {"verifier": {"fingerprint": "x"}}, torch.float32)
    again, record = load_head(tmp_path)
    assert again.config == head.config
    assert record == {"verifier": {"fingerprint": "x"}}
    assert torch.equal(again.d2t, head.d2t)
    assert torch.equal(again.t2d, head.t2d)
    weights = head.state_dict()
    assert weights.keys() == again.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())


def test_plain_format_has_the_engines_names_and_both_numberings(tmp_path):
    head = make_head()
    save_head(tmp_path, head, {}, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {"fc.weight": [32, 96], "norm.weight": [32], "lm_head.weight": [100, 32], "d2t": [100], "t2d": [120]}
    expected |= {f"fc_norm.{i}.weight": [32] for i in range(3)}
    expected |= {f"midlayer.{n}.weight": [32] for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    expected |= {f"midlayer.self_attn.{n}_proj.weight": [size, 64] for n, size in (("q", 64), ("k", 32), ("v", 32))}
    expected |= {"midlayer.self_attn.o_proj.weight": [32, 64], "midlayer.mlp.down_proj.weight": [32, 48]}
    expected |= {f"midlayer.mlp.{n}_proj.weight": [48, 32] for n in ("gate", "up")}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool
    assert tensors["fc.weight"].dtype == torch.bfloat16


def test_a_full_vocabulary_ships_no_map(tmp_path):
    save_head(tmp_path, make_head(draft_vocab_size=None), {}, torch.float32)
    assert not {"d2t", "t2d"} & load_file(tmp_path / "model.safetensors").keys()


def test_maverick_head_has_the_size_of_nvidias():
    verifier = LlamaConfig(
        hidden_size=5120, num_attention_heads=40, num_key_value_heads=8, head_dim=128, vocab_size=202048,
        num_hidden_layers=48, intermediate_size=8192, max_position_embeddings=1048576,
    )  # fmt: skip
    draft = DraftConfig(
        aux_layers=[1, 23, 44], vocab_size=None, intermediate_size=32768, fc_norm=False, norm_output=False
    )
    config = DraftHeadConfig.from_verifier(draft, verifier)
    with torch.device("meta"):
        head = DraftHead(config)
    sizes = {name: p.numel() * 2 for name, p in head.named_parameters()}
    assert sizes["fc.weight"] == 157286400
    assert sizes["lm_head.weight"] == 2068971520
    assert sum(size for name, size in sizes.items() if "mlp" in name) == 1006632960
    assert round(sum(sizes.values()) / 2**30, 1) == 3.2
    assert plain_config(config, torch.bfloat16)["eagle_aux_hidden_state_layer_ids"] == [2, 24, 45]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "model.norm.weight is unknown"),
        (
            lambda t: t.update({"fc.weight": torch.ones(32, 64)}),
            r"fc.weight has shape \[32, 64\], \[32, 96\] is required",
        ),
        (lambda t: t.pop("d2t"), "d2t and t2d are missing"),
    ],
)
def test_a_head_with_wrong_tensors_is_refused_by_name(tmp_path, change, message):
    save_head(tmp_path, make_head(), {}, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


def test_a_truncated_head_is_refused(tmp_path):
    save_head(tmp_path, make_head(), {}, torch.float32)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged head"):
        load_head(tmp_path)
