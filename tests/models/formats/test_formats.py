"""Heads in the formats of engines and other projects: written, read back, and refused where they cannot be read."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builders import make_head
from fledge.conf.schema import (
    AuxNumbering,
    Config,
    Device,
    Dtype,
    ExportFormat,
    HeadImportConfig,
    VerifierConfig,
    validate,
)
from fledge.models.export import export
from fledge.models.formats.plain import load_head, save_head
from fledge.models.formats.published import read_foreign_head
from fledge.models.formats.speculators import save_speculators
from fledge.models.import_head import import_head
from fledge.models.verifier.model import VerifierWeights, verifier_identity
from make_embedded import CHAT_TEMPLATE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config

SHAPE = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=120,
    num_hidden_layers=8, max_position_embeddings=256,
)  # fmt: skip
VERIFIER = {"name_or_path": "some/verifier", "architectures": ["LlamaForCausalLM"]}
FORMS = [
    {},
    {"draft_vocab_size": None},
    {"fc_norm": False, "norm_output": False},
    {"norm_before_residual": True},
    {"aux_layers": (2, 5), "draft_vocab_size": None},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    {"hidden_size": 24, "own_embedding": True},
    {"own_embedding": True},
]


@pytest.fixture(scope="module")
def small_verifier(tmp_path_factory) -> Path:
    """An untrained verifier that fits `make_head`."""
    folder = tmp_path_factory.mktemp("verifier")
    torch.manual_seed(0)
    LlamaForCausalLM(SHAPE).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(120)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, small_verifier) -> Config:
    verifier = VerifierConfig(path=str(small_verifier), dtype=Dtype.float32, device=Device.cpu)
    return Config(name="run", runs_dir=str(tmp_path / "runs"), verifier=verifier)


@dataclass
class Published:
    """A head in a folder of its own, as some project publishes it; files can be changed in place."""

    folder: Path

    def change_config(self, **changes: object) -> None:
        values = json.loads((self.folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in values.items() if value is not ABSENT}
        (self.folder / "config.json").write_text(json.dumps(kept))

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    def change_tensors(self, **changes: object) -> None:
        tensors = self.tensors() | {name.replace("__", "."): value for name, value in changes.items()}
        save_file({n: t for n, t in tensors.items() if t is not ABSENT}, self.folder / "model.safetensors")


ABSENT = object()
IDS = "eagle_aux_hidden_state_layer_ids"


def published(tmp_path: Path, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Published:
    """A head as NVIDIA, SpecForge and EAGLE publish them: few fields, ids in eagle_config, fledge's files absent."""
    folder = tmp_path / "published"
    folder.mkdir()
    head = make_head(**({"fc_norm": False, "norm_output": False} | changes))
    save_head(folder, head, {}, dtype)
    (folder / "fledge.json").unlink()
    theirs = Published(folder)
    ours_only = ("rope_parameters", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    theirs.change_config(
        **dict.fromkeys(ours_only, ABSENT),
        eagle_aux_hidden_state_layer_ids=ABSENT,
        eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True,
                      "use_last_layernorm": True, "use_mtp_layernorm": False},
    )  # fmt: skip
    return theirs


def rounded(head, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype).float() for name, tensor in head.state_dict().items()}


def assert_same_head(read, head, dtype: torch.dtype) -> None:
    assert read.config == head.config
    expected, found = rounded(head, dtype), read.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(read.d2t, head.d2t)
    assert torch.equal(read.t2d, head.t2d)


# round trips


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", FORMS)
def test_each_format_reads_back_bit_for_bit(tmp_path, changes, dtype):
    head = make_head(**changes)
    save_head(tmp_path, head, {}, dtype)
    plain = read_foreign_head(tmp_path, SHAPE)
    save_speculators(tmp_path, head, {}, dtype, VERIFIER, 3)
    speculators = read_foreign_head(tmp_path, SHAPE)
    for read in (plain, speculators):
        assert_same_head(read.head, head, dtype)
        assert read.dtype == dtype


def test_speculators_config_has_the_fields_that_vllm_reads(tmp_path):
    save_speculators(tmp_path, make_head(), {}, torch.bfloat16, VERIFIER, 5)
    values = json.loads((tmp_path / "config.json").read_text())
    layer = values.pop("transformer_layer_config")
    assert isinstance(values.pop("speculators_version"), str)
    assert values == {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 100,
        "target_hidden_size": None,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 5,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": VERIFIER,
        },
    }
    assert layer["model_type"] == "llama"
    assert (layer["vocab_size"], layer["num_hidden_layers"], layer["head_dim"]) == (120, 1, 16)
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert LlamaConfig(**layer).rope_parameters == layer["rope_parameters"]


@pytest.mark.parametrize(("size", "has_map"), [(100, True), (None, False)])
def test_speculators_tensors_are_named_by_layer_and_mapped_only_if_reduced(tmp_path, size, has_map):
    save_speculators(tmp_path, make_head(draft_vocab_size=size), {}, torch.bfloat16, VERIFIER, 3)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any("midlayer" in name for name in tensors)
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    assert ({"d2t", "t2d"} <= tensors.keys()) is has_map
    assert "embed_tokens.weight" not in tensors


# heads as others publish them


def as_sharded(theirs: Published) -> None:
    tensors = theirs.tensors()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, theirs.folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (theirs.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (theirs.folder / "model.safetensors").unlink()


def as_pickle(theirs: Published) -> None:
    torch.save(theirs.tensors(), theirs.folder / "pytorch_model.bin")
    (theirs.folder / "model.safetensors").unlink()


def as_numbered_layers(theirs: Published) -> None:
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in theirs.tensors().items()}
    save_file(tensors, theirs.folder / "model.safetensors")


@pytest.mark.parametrize("rewrite", [lambda _: None, as_sharded, as_pickle, as_numbered_layers])
@pytest.mark.parametrize("size", [100, None])
def test_published_forms_are_read(tmp_path, rewrite, size):
    theirs = published(tmp_path, draft_vocab_size=size)
    rewrite(theirs)
    read = read_foreign_head(theirs.folder, SHAPE)
    head = make_head(fc_norm=False, norm_output=False, draft_vocab_size=size)
    assert_same_head(read.head, head, torch.bfloat16)
    assert read.dtype == torch.bfloat16


def test_t2d_is_made_of_d2t_where_it_is_absent(tmp_path):
    theirs = published(tmp_path)
    theirs.change_tensors(t2d=ABSENT)
    assert_same_head(
        read_foreign_head(theirs.folder, SHAPE).head, make_head(fc_norm=False, norm_output=False), torch.bfloat16
    )


def test_a_full_vocabulary_may_come_with_its_identity_map(tmp_path):
    theirs = published(tmp_path, draft_vocab_size=None)
    theirs.change_tensors(d2t=torch.zeros(120, dtype=torch.int64), t2d=torch.ones(120, dtype=torch.bool))
    head = make_head(fc_norm=False, norm_output=False, draft_vocab_size=None)
    assert_same_head(read_foreign_head(theirs.folder, SHAPE).head, head, torch.bfloat16)


def test_weights_of_two_dtypes_are_kept_in_the_wider(tmp_path):
    theirs = published(tmp_path)
    theirs.change_tensors(norm__weight=theirs.tensors()["norm.weight"].float() + 1e-6)
    read = read_foreign_head(theirs.folder, SHAPE)
    assert read.dtype == torch.float32
    assert torch.equal(read.head.norm.weight, theirs.tensors()["norm.weight"])


def test_older_rotary_fields_are_joined(tmp_path):
    theirs = published(tmp_path)
    scaling = {"type": "linear", "factor": 8.0}
    theirs.change_config(rope_theta=5e5, rope_scaling=scaling)
    config = read_foreign_head(theirs.folder, SHAPE).head.config
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}


@pytest.mark.parametrize(
    ("scaling", "kind"),
    [
        ({"type": "mrope", "mrope_section": [2, 3, 3]}, "default"),
        ({"rope_type": "mrope", "mrope_section": [2, 3, 3], "mrope_interleaved": True}, "default"),
        ({"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}, "longrope"),
        ({"type": "default", "rope_type": "default"}, "default"),
    ],
)
def test_other_names_of_a_rotary_type_are_read(tmp_path, scaling, kind):
    theirs = published(tmp_path)
    theirs.change_config(rope_scaling=scaling)
    assert read_foreign_head(theirs.folder, SHAPE).head.config.rope_parameters["rope_type"] == kind


@pytest.mark.parametrize("present", [True, False])
def test_norm_before_residual_absent_means_what_each_format_means(tmp_path, present):
    theirs = published(tmp_path)
    assert read_foreign_head(theirs.folder, SHAPE).head.config.norm_before_residual is False
    save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    theirs.change_config(norm_before_residual=False if present else ABSENT)
    assert read_foreign_head(theirs.folder, SHAPE).head.config.norm_before_residual is not present


def test_an_early_speculators_head_is_read_with_the_formats_defaults(tmp_path):
    theirs = published(tmp_path)
    head = make_head(fc_norm=False, norm_output=False, norm_before_residual=True)
    save_speculators(theirs.folder, head, {}, torch.bfloat16, VERIFIER, 3)
    later = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")
    theirs.change_config(
        **dict.fromkeys(later, ABSENT),
        architectures=["Eagle3Speculator"],
        eagle_aux_hidden_state_layer_ids=ABSENT,
    )
    layers = HeadImportConfig(aux_layers=[1, 3, 4])
    assert_same_head(read_foreign_head(theirs.folder, SHAPE, layers).head, head, torch.bfloat16)


def test_more_than_one_layer_is_read_and_not_exported(tmp_path, config):
    theirs = published(tmp_path, num_layers=2)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    config.export.checkpoint = str(config.run_folder / "imports" / "published")
    assert load_head(Path(config.export.checkpoint))[0].config.num_layers == 2
    with pytest.raises(ValueError, match="only heads of one layer"):
        export(config)


# aux layer ids


@pytest.mark.parametrize(
    ("nested", "top", "numbering", "layers"),
    [
        ([1, 3, 4], None, None, (1, 3, 4)),
        ([1, 3, 4], [2, 4, 5], None, (1, 3, 4)),
        ([1, 3, 4], [1, 3, 4], None, (1, 3, 4)),
        ([4, 1, 3], [5, 2, 4], None, (1, 3, 4)),
        (None, [1, 3, 4], AuxNumbering.zero_based, (1, 3, 4)),
        (None, [1, 3, 4], AuxNumbering.vllm, (0, 2, 3)),
    ],
)
def test_aux_ids_are_read_as_numbered(tmp_path, nested, top, numbering, layers):
    theirs = published(tmp_path)
    theirs.change_config(
        eagle_config={"eagle_aux_hidden_state_layer_ids": nested}, eagle_aux_hidden_state_layer_ids=top
    )
    options = HeadImportConfig(aux_numbering=numbering)
    assert read_foreign_head(theirs.folder, SHAPE, options).head.config.aux_layers == layers


@pytest.mark.parametrize(
    ("nested", "top", "numbering", "words"),
    [
        (None, [1, 3, 4], None, "head_import.aux_numbering=zero_based .* =vllm"),
        ([1, 3, 4], [2, 4, 6], None, "neither the same nor one higher"),
        ([1, 3, 4], [0, 2, 3], None, "neither the same nor one higher"),
        ([1, 3, 4], None, AuxNumbering.vllm, "leaves nothing open"),
        ([1, 3, 8], None, None, "0 to 7"),
        ([1, 3, 3], None, None, "different ones"),
        (None, [0, 3, 4], AuxNumbering.vllm, r"\[-1, 2, 3\]"),
        (["a"], None, None, "list of integers"),
        ([1, 3], None, None, r"fc.weight has shape \[32, 96\], \[32, 64\] is required"),
    ],
)
def test_aux_ids_that_cannot_be_right_are_refused(tmp_path, nested, top, numbering, words):
    theirs = published(tmp_path)
    theirs.change_config(
        eagle_config={"eagle_aux_hidden_state_layer_ids": nested}, eagle_aux_hidden_state_layer_ids=top
    )
    with pytest.raises(ValueError, match=words):
        read_foreign_head(theirs.folder, SHAPE, HeadImportConfig(aux_numbering=numbering))


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize("ids", [ABSENT, None, []])
def test_layers_that_config_json_does_not_name_are_asked_for(tmp_path, speculators, ids):
    theirs = published(tmp_path)
    head = make_head(fc_norm=False, norm_output=False, aux_layers=(0, 2, 6))
    if speculators:
        save_speculators(theirs.folder, head, {}, torch.bfloat16, VERIFIER, 3)
    theirs.change_config(**{IDS: ids, "eagle_config": {}})
    refused(theirs, r"does not say which layers.*head_import\.aux_layers=\[.*engines take \[1, 3, 4\] unasked")
    read = read_foreign_head(theirs.folder, SHAPE, HeadImportConfig(aux_layers=[6, 0, 2]))
    assert read.head.config.aux_layers == (0, 2, 6)
    with pytest.raises(ValueError, match="different ones from 0 to 7"):
        read_foreign_head(theirs.folder, SHAPE, HeadImportConfig(aux_layers=[0, 2, 8]))


def test_layers_are_not_taken_from_the_option_where_config_json_names_them(tmp_path):
    with pytest.raises(ValueError, match=r"head_import\.aux_layers is \[0, 2, 6\].*leaves nothing open"):
        read_foreign_head(published(tmp_path).folder, SHAPE, HeadImportConfig(aux_layers=[0, 2, 6]))


@pytest.mark.parametrize("layers", [[], [1, 1, 3], [-1, 3, 4]])
def test_the_option_must_name_different_layers(layers):
    with pytest.raises(ValueError, match=r"head_import\.aux_layers must be different layers"):
        validate(Config(name="x", head_import=HeadImportConfig(aux_layers=layers)))


# refusals


def refused(theirs: Published, words: str) -> str:
    with pytest.raises(ValueError, match=words) as error:
        read_foreign_head(theirs.folder, SHAPE)
    return str(error.value)


def test_every_wrong_tensor_is_named_in_one_refusal(tmp_path):
    theirs = published(tmp_path)
    theirs.change_tensors(
        norm__weight=ABSENT,
        fc__weight=torch.ones(32, 64),
        midlayer__self_attn__q_proj__bias=torch.ones(64),
        midlayer__self_attn__q_norm__weight=torch.ones(16),
        midlayer__mlp__up_proj__bias=torch.ones(48),
        model__norm__weight=torch.ones(32),
        layers__0__hidden_norm__weight=torch.ones(32),
        midlayer__input_layernorm__weight=torch.ones(32, dtype=torch.int32),
        t2d=torch.ones(100, dtype=torch.bool),
        embed_tokens__weight=torch.ones(100, 32),
    )
    message = refused(theirs, "norm.weight is missing")
    for words in (
        "fc.weight has shape [32, 64], [32, 96] is required",
        "layers.0.self_attn.q_proj.bias is unknown",
        "layers.0.self_attn.q_norm.weight is unknown",
        "layers.0.mlp.up_proj.bias is unknown",
        "model.norm.weight is unknown",
        "layers.0.hidden_norm.weight stands twice",
        "layers.0.input_layernorm.weight is int32",
        "t2d has shape [100], [120] is required",
        "embed_tokens.weight has shape [100, 32], [120, 32] is required",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lm_head__weight": ABSENT}, "lm_head.weight is missing.*fetch the head's complete checkpoint"),
        ({"d2t": ABSENT}, "d2t is missing"),
        ({"d2t": torch.arange(100)}, "0 to 119 is required: it must hold offsets"),
        ({"d2t": torch.full((100,), -1)}, "target ids from -1 to 98"),
        ({"d2t": torch.arange(99, -1, -1)}, "do not increase"),
        ({"d2t": torch.zeros(100)}, "d2t is float32, integers"),
        ({"t2d": torch.ones(120, dtype=torch.bool)}, "t2d contradicts d2t"),
        ({"fc__weight": torch.ones(32, 96, dtype=torch.float64)}, "fc.weight is float64"),
    ],
)
def test_a_wrong_lm_head_or_vocabulary_map_is_refused(tmp_path, change, words):
    theirs = published(tmp_path)
    theirs.change_tensors(**change)
    refused(theirs, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 121}, "verifier of vocab_size 121, verifier.path has 120"),
        ({"hidden_size": 64}, "verifier of hidden size 64, verifier.path has 32"),
        ({"hidden_size": 64, "target_hidden_size": 32}, "norm.weight has shape"),
        ({"target_hidden_size": 64}, "verifier of hidden size 64, verifier.path has 32"),
        ({"intermediate_size": ABSENT}, "no usable intermediate_size"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"norm_before_fc": True}, "norm_before_fc is True"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is False"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm is True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"speculators_model_type": "dflash"}, "speculators_model_type is 'dflash'"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type is 'ntk'"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 500000.0, and 10000.0 in rope_p"),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_theta": 1e4}},
            "rope_theta is 500000.0, and 10000.0 in rope_scaling",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is default, and linear in rope_scaling",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}}, "rope_scaling.alpha is 1000.0"),
        (
            {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
            "rope_scaling.partial_rotary_factor is 0.5",
        ),
        ({"fc_norm": True}, "fc_norm.0.weight is missing"),
    ],
)
def test_a_config_that_cannot_be_represented_is_refused_by_name(tmp_path, change, words):
    theirs = published(tmp_path)
    theirs.change_config(**change)
    refused(theirs, words)


IDS_OF_HEAD = {IDS: [1, 3, 4]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["sliding_attention"], "sliding_window": 16}, "layer_types is .'sliding_attention'."),
        ({"layer_types": ["chunked_attention"]}, "layer_types is .'chunked_attention'."),
        ({"layer_types": ["linear_attention"]}, "layer_types is .'linear_attention'."),
        ({"sliding_window": 16, "use_sliding_window": True}, "use_sliding_window is True"),
        ({"sliding_window": 16, "model_type": "mistral"}, "sliding_window is 16"),
        ({"sliding_window": 16, "model_type": "gemma3_text"}, "sliding_window is 16"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192"),
        ({"no_rope_layers": [0]}, r"no_rope_layers is \[0\]"),
        ({"is_causal": False}, "is_causal is False"),
    ],
)
@pytest.mark.parametrize("speculators", [False, True])
def test_a_head_that_does_not_attend_to_all_is_refused_by_the_field_that_says_so(tmp_path, change, words, speculators):
    theirs = published(tmp_path)
    if speculators:
        save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
        layer = json.loads((theirs.folder / "config.json").read_text())["transformer_layer_config"]
        change = {"transformer_layer_config": layer | change}
    theirs.change_config(**change)
    refused(theirs, words)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 512, "use_sliding_window": False},
        {"sliding_window": 512, "layer_types": ["full_attention"]},
        {"sliding_window": 512},  # a Llama knows no window
        {"sliding_window": 32768, "model_type": "qwen2", "max_window_layers": 28},  # off unless said otherwise
        {"sliding_window": None, "model_type": "mistral"},
        {"no_rope_layers": [1], "no_rope_layer_interval": 4, "attention_chunk_size": None},
    ],
)
def test_a_window_that_is_switched_off_changes_nothing(tmp_path, change):
    theirs = published(tmp_path)
    theirs.change_config(**change)
    head = make_head(fc_norm=False, norm_output=False)
    assert_same_head(read_foreign_head(theirs.folder, SHAPE).head, head, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eagle_config": {**IDS_OF_HEAD, "eh_proj_before_attn": True}}, "eagle_config.eh_proj_before_attn is True"),
        ({"eagle_config": {**IDS_OF_HEAD, "norm_before_fc": True}}, "eagle_config.norm_before_fc is True"),
        (
            {"eagle_config": {**IDS_OF_HEAD, "fc_norm": True}},
            "eagle_config.fc_norm is True, and fc_norm is read at the top",
        ),
        ({"eagle_config": {**IDS_OF_HEAD, "norm_output": True}}, "eagle_config.norm_output is True"),
        ({"eagle_config": {**IDS_OF_HEAD, "norm_before_residual": True}}, "eagle_config.norm_before_residual is True"),
        ({"return_hidden_post_norm": True}, "return_hidden_post_norm is True, and .* is read in eagle_config"),
        (
            {"norm_output": False, "eagle_config": {**IDS_OF_HEAD, "return_hidden_post_norm": True}},
            "norm_output is False and eagle_config.return_hidden_post_norm True",
        ),
        ({"eagle_config": {**IDS_OF_HEAD, "head_dim": 8}}, "eagle_config.head_dim is 8"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states is 4"),
        ({"eagle_config": [1, 3, 4]}, "eagle_config is .1, 3, 4., fields with values"),
        ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"qkv_bias": True}, "qkv_bias is True"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
    ],
)
def test_a_field_that_changes_the_arithmetic_is_refused_wherever_it_stands(tmp_path, change, words):
    theirs = published(tmp_path)
    theirs.change_config(**change)
    refused(theirs, words)


@pytest.mark.parametrize("place", ["top", "eagle_config", "transformer_layer_config"])
@pytest.mark.parametrize("value", [True, False, 3, {"a": 1}])
def test_an_unknown_field_is_never_dropped_silently(tmp_path, place, value):
    theirs = published(tmp_path)
    if place == "transformer_layer_config":
        save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    values = json.loads((theirs.folder / "config.json").read_text())
    (values if place == "top" else values[place]).update(gated_residual=value, another_one=value, none=None)
    theirs.change_config(**values)
    path = "" if place == "top" else f"{place}."
    message = refused(theirs, "fields that fledge does not know")
    assert f"{path}gated_residual = {value!r}, {path}another_one = {value!r}; it drops none" in message


def test_a_layer_that_is_no_object_is_refused(tmp_path):
    theirs = published(tmp_path)
    save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    theirs.change_config(transformer_layer_config="x")
    refused(theirs, "transformer_layer_config")


def test_flags_of_the_layer_must_say_what_the_top_level_says(tmp_path):
    theirs = published(tmp_path)
    save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    layer = json.loads((theirs.folder / "config.json").read_text())["transformer_layer_config"]
    theirs.change_config(transformer_layer_config=layer | {"norm_before_residual": False, "fc_norm": True})
    read_foreign_head(theirs.folder, SHAPE)
    theirs.change_config(norm_before_residual=ABSENT)  # true in this format
    refused(theirs, "transformer_layer_config.norm_before_residual is False, and .* is read at the top level")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("top", [True, ABSENT])
def test_tensorrt_llms_name_of_norm_output_is_read(tmp_path, nested, top):
    theirs = published(tmp_path)
    eagle = {**IDS_OF_HEAD, "return_hidden_post_norm": nested or top is True}
    theirs.change_config(norm_output=top, eagle_config=eagle)
    assert read_foreign_head(theirs.folder, SHAPE).head.config.norm_output is (nested or top is True)


def test_sglangs_older_name_of_fc_norm_is_read(tmp_path):
    theirs = published(tmp_path, fc_norm=True)
    theirs.change_config(use_aux_norm=True)
    assert read_foreign_head(theirs.folder, SHAPE).head.config.fc_norm


MODEL_OPTIMIZER = {
    "transformers_version": "4.55.0", "torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.01,
    "bos_token_id": 200000, "eos_token_id": [200001, 200007], "pad_token_id": 200018, "pretraining_tp": 1,
    "attention_dropout": 0.0, "position_embedding_type": "rope",
    "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0},
    "eagle_config": {
        IDS: [1, 3, 4], "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "has_lm_head": True,
        "use_last_layernorm": True, "use_mtp_layernorm": False, "next_layer_regular": True, "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    },
}  # fmt: skip
SPECFORGE = {
    "max_window_layers": 28, "sliding_window": 32768, "use_sliding_window": False, "target_model_type": "qwen2_5_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vision_start_token_id": 151652, "video_token_id": 7,
    "image_token_id": 151655, "modal_type": "VLM", "tie_word_embeddings": True, "decoder_sparse_step": 1,
    "transformers_version": "4.53.2", "use_mrope": False, "output_router_logits": False, "_torchspec_version": "0.1",
}  # fmt: skip
ANGELSLIM = {
    "add_classification_head": False, "attention_head_dim": 16, "cla_share_factor": 2, "class_num": 0,
    "eod_token_id": 7, "dense_list": [2048, 0], "im_end_id": 5, "im_newline_id": 11, "im_start_id": 4,
    "mask_init_id": 12, "text_end_id": 7, "norm_type": "rms", "org_vocab_size": 120, "pad_id": 2, "pool_type": "last",
    "use_cla": False, "use_qk_norm": True, "use_rotary_pos_emb": True, "text_start_id": 6, "sep_token_id": 7,
}  # fmt: skip
OLDER_TRANSFORMERS = {
    "_name_or_path": "x", "return_dict": True, "chunk_size_feed_forward": 0, "id2label": {"0": "LABEL_0"}, "top_k": 50,
    "is_decoder": False, "tf_legacy_loss": False, "torchscript": False, "pruned_heads": {}, "num_beams": 1,
    "task_specific_params": {}, "use_bfloat16": False, "tie_encoder_decoder": False, "temperature": 1.0,
    "typical_p": 1.0, "early_stopping": False, "add_cross_attention": False, "max_length": 20, "prefix": "",
}  # fmt: skip


@pytest.mark.parametrize("fields", [MODEL_OPTIMIZER, SPECFORGE, ANGELSLIM, OLDER_TRANSFORMERS])
def test_fields_that_projects_write_beside_the_arithmetic_are_no_obstacle(tmp_path, fields):
    theirs = published(tmp_path)
    theirs.change_config(**fields)
    config = read_foreign_head(theirs.folder, SHAPE).head.config
    rope = {name: value for name, value in config.rope_parameters.items() if name != "mrope_section"}
    assert rope == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_fields_that_speculators_writes_are_read(tmp_path):
    theirs = published(tmp_path)
    save_speculators(theirs.folder, make_head(), {}, torch.bfloat16, VERIFIER, 3)
    layer = json.loads((theirs.folder / "config.json").read_text())["transformer_layer_config"]
    for written in (
        LlamaConfig(**layer).to_dict(),
        Qwen3Config(**layer).to_dict(),
        Qwen3Config(**layer).to_diff_dict(),
    ):
        theirs.change_config(transformer_layer_config=written, auto_map={"": "config.Eagle3SpeculatorConfig"})
        assert_same_head(read_foreign_head(theirs.folder, SHAPE).head, make_head(), torch.bfloat16)


class Code:
    """Pickled, it makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path, legacy):
    theirs = published(tmp_path)
    witness = tmp_path / "was run"
    content = {**theirs.tensors(), "x": Code(witness)}
    torch.save(content, theirs.folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (theirs.folder / "model.safetensors").unlink()
    refused(theirs, "code in it was not run")
    assert not witness.exists()
    torch.load(theirs.folder / "pytorch_model.bin", weights_only=False)
    assert witness.exists(), "the code works where it is run, or nothing is shown"


@pytest.mark.parametrize(("said", "held"), [(8, 1), (42, 1), (1, 2)])
def test_a_number_of_layers_that_the_weights_do_not_hold_is_one_sentence(tmp_path, said, held):
    theirs = published(tmp_path, num_layers=held)
    theirs.change_config(num_hidden_layers=said)
    message = refused(theirs, f"num_hidden_layers {said}, and the weights hold {held}: write num_hidden_layers: {held}")
    assert "missing" not in message


@pytest.mark.parametrize("prefix", ["draft_model.", "module.", "eagle_module._orig_mod."])
def test_a_prefix_before_every_tensor_is_named(tmp_path, prefix):
    theirs = published(tmp_path)
    tensors = {prefix + name: tensor for name, tensor in theirs.tensors().items()}
    save_file(tensors, theirs.folder / "model.safetensors")
    assert "missing" not in refused(theirs, f"tensors begin with '{prefix}'.*rename them without it")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "lm_head.weight", "embed_tokens.weight"])
def test_a_quantised_tensor_is_refused_by_name(tmp_path, dtype, name):
    theirs = published(tmp_path)
    tensors = {n.replace("midlayer.", "layers.0."): tensor for n, tensor in theirs.tensors().items()}
    tensors[name] = tensors.get(name, torch.ones(120, 32)).to(dtype)
    save_file(tensors, theirs.folder / "model.safetensors")
    refused(theirs, f"{name} is {str(dtype).removeprefix('torch.')}, float32, bfloat16 or float16 is required")


def test_damaged_files_are_refused(tmp_path):
    theirs = published(tmp_path)
    weights = theirs.folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-100], whole[:40], b""):
        weights.write_bytes(content)
        refused(theirs, "model.safetensors cannot be read as weights")
    weights.unlink()
    refused(theirs, "holds no weights")
    for content in (b"", b"not a pickle", b"PK\x03\x04 not an archive"):
        (theirs.folder / "pytorch_model.bin").write_bytes(content)
        refused(theirs, "pytorch_model.bin (cannot be read|is damaged)")
    for content in ([torch.ones(1)], {"fc.weight": 1}, {1: torch.ones(1)}):
        torch.save(content, theirs.folder / "pytorch_model.bin")
        refused(theirs, "something else than named tensors")
    index = theirs.folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"fc.weight": "../elsewhere.safetensors"}}')
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    refused(theirs, "elsewhere.safetensors is named by the index and missing")
    index.write_text("[]")
    refused(theirs, "is not an index")
    for content in ("{", "[]"):
        (theirs.folder / "config.json").write_text(content)
        weights.write_bytes(whole)
        refused(theirs, "config.json is not")
    (theirs.folder / "config.json").unlink()
    refused(theirs, "config.json is missing")


# the commands


def test_an_imported_head_is_exported_and_imported_again_unchanged(tmp_path, config, small_verifier):
    theirs = published(tmp_path)
    embedding = VerifierWeights(config.verifier).embedding()
    theirs.change_tensors(embed_tokens__weight=embedding.bfloat16())
    head = make_head(fc_norm=False, norm_output=False)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    imported = config.run_folder / "imports" / "published"
    read, record = load_head(imported)
    assert_same_head(read, head, torch.bfloat16)
    assert (record["step"], record["imported_from"]) == (0, "published")
    assert record["verifier"]["vocab_size"] == 120
    assert "embed_tokens.weight" not in load_file(imported / "model.safetensors")

    config.export.checkpoint, config.export.format = str(imported), ExportFormat.all
    export(config)
    for name in ("plain", "speculators"):
        config.head_import.source = str(config.run_folder / "exports" / name)
        import_head(config)
        again, _ = load_head(config.run_folder / "imports" / name)
        assert_same_head(again, head, torch.bfloat16)
    values = json.loads((config.run_folder / "exports" / "speculators" / "config.json").read_text())
    verifier = values["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": str(small_verifier), "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(ValueError, match=r"holds a head in Speculators format.*fledge import"):
        load_head(config.run_folder / "exports" / "speculators")


def test_an_embedding_of_the_heads_own_is_kept_and_other_engines_than_vllm_are_named(tmp_path, config, capsys):
    theirs = published(tmp_path)
    embedding = VerifierWeights(config.verifier).embedding().clone()
    embedding[7, 3] += 0.5
    theirs.change_tensors(embed_tokens__weight=embedding)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    assert "differs from the embedding of verifier.path" in capsys.readouterr().out
    config.export.checkpoint = str(config.run_folder / "imports" / "published")
    head, _ = load_head(Path(config.export.checkpoint))
    assert torch.equal(head.embed_tokens.weight, embedding)
    export(config)
    notes = (config.run_folder / "exports" / "plain" / "SERVING.md").read_text()
    assert notes.count("cannot serve this head: it takes the verifier's embedding") == 2
    assert "launch_server" not in notes
    assert not (config.run_folder / "exports" / "plain" / "trtllm.yaml").exists()


def test_a_head_that_declares_the_verifiers_lm_head_is_given_it(tmp_path, config):
    theirs = published(tmp_path, draft_vocab_size=None)
    theirs.change_tensors(lm_head__weight=ABSENT)
    theirs.change_config(draft_vocab_size=None)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    head, _ = load_head(config.run_folder / "imports" / "published")
    assert torch.equal(head.lm_head.weight, VerifierWeights(config.verifier).lm_head())


@pytest.mark.parametrize("size", [None, 120])
def test_a_head_that_reuses_the_verifiers_lm_head_by_name_is_given_it(tmp_path, config, size):
    theirs = published(tmp_path, draft_vocab_size=None)
    theirs.change_tensors(lm_head__weight=ABSENT)
    theirs.change_config(draft_vocab_size=size, reuse_target_lm_head=True, additional_fc=False)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    head, _ = load_head(config.run_folder / "imports" / "published")
    assert torch.equal(head.lm_head.weight, VerifierWeights(config.verifier).lm_head())


def test_the_verifiers_lm_head_is_offered_as_a_cure_to_a_full_vocabulary_only(tmp_path):
    theirs = published(tmp_path)
    theirs.change_tensors(lm_head__weight=ABSENT)
    assert "draft_vocab_size: null" not in refused(theirs, "fetch the head's complete checkpoint")
    theirs.change_config(draft_vocab_size=120)
    refused(theirs, "fetch the head's complete checkpoint, or, .* by draft_vocab_size: null")


def test_q_and_k_for_pairs_of_neighbours_are_reordered(tmp_path, config):
    head = make_head(fc_norm=False, norm_output=False)
    theirs = published(tmp_path)
    pairs = torch.arange(16).view(2, 8).T.flatten()  # 0, 8, 1, 9 ...: dimension i and its partner side by side
    tensors = theirs.tensors()
    for name in ("midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight"):
        tensors[name] = tensors[name].view(-1, 16, 64)[:, pairs].flatten(0, 1)
    save_file(tensors, theirs.folder / "model.safetensors")
    assert not torch.equal(
        read_foreign_head(theirs.folder, SHAPE).head.layers[0].self_attn.q_proj.weight,
        rounded(head, torch.bfloat16)["layers.0.self_attn.q_proj.weight"],
    )
    config.head_import = HeadImportConfig(source=str(theirs.folder), interleaved_rotary=True)
    import_head(config)
    assert_same_head(load_head(config.run_folder / "imports" / "published")[0], head, torch.bfloat16)


def test_a_narrower_head_without_an_embedding_is_refused(tmp_path):
    theirs = published(tmp_path, hidden_size=24, own_embedding=True)
    theirs.change_tensors(embed_tokens__weight=ABSENT)
    refused(theirs, "embed_tokens.weight is missing, the verifier's has rows of 32")


def test_the_verifiers_last_layer_is_not_served_by_sglang(tmp_path, config):
    theirs = published(tmp_path, aux_layers=(1, 3, 7))
    theirs.change_config(eagle_config={IDS: [1, 3, 7]})
    config.head_import.source = str(theirs.folder)
    import_head(config)
    config.export.checkpoint = str(config.run_folder / "imports" / "published")
    export(config)
    notes = (config.run_folder / "exports" / "plain" / "SERVING.md").read_text()
    assert "SGLang cannot serve this head: it cannot take the output of the verifier's last layer" in notes
    assert "trtllm-serve" in notes


def test_importing_again_is_skipped_and_another_head_needs_overwrite(tmp_path, config, capsys):
    theirs = published(tmp_path)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    import_head(config)
    assert "is complete" in capsys.readouterr().out
    theirs.change_tensors(norm__weight=torch.ones(32))
    with pytest.raises(ValueError, match="overwrite=true"):
        import_head(config)
    config.overwrite = True
    import_head(config)
    assert torch.equal(load_head(config.run_folder / "imports" / "published")[0].norm.weight, torch.ones(32))


def test_import_asks_for_a_folder_of_a_published_head(tmp_path, config):
    with pytest.raises(ValueError, match=r"head_import\.source is required"):
        import_head(config)
    config.head_import.source = "some/head"
    with pytest.raises(ValueError, match="hf download"):
        import_head(config)
    config.head_import.source = str(published(tmp_path).folder)
    import_head(config)
    config.head_import.source = str(config.run_folder / "imports" / "published")
    with pytest.raises(ValueError, match="was imported already"):
        import_head(config)


def exported(tmp_path: Path, config: Config) -> Path:
    config.head_import.source = str(published(tmp_path).folder)
    import_head(config)
    config.export.checkpoint = str(config.run_folder / "imports" / "published")
    config.export.format = ExportFormat.all
    export(config)
    return config.run_folder / "exports"


def test_serving_notes_name_the_engines_that_read_the_format(tmp_path, config):
    folder = exported(tmp_path, config)
    plain, speculators = ((folder / name / "SERVING.md").read_text() for name in ("plain", "speculators"))
    for words in (
        f'"model": "{folder / "plain"}", "num_speculative_tokens": 3',
        "--speculative-algorithm EAGLE3 --speculative-draft-model-path",
        "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
        "trtllm-serve",
    ):
        assert words in plain
    assert f"vllm serve {folder / 'speculators'}" in speculators
    assert "SGLang" not in speculators
    assert "TensorRT" not in speculators
    assert not (folder / "speculators" / "trtllm.yaml").exists()
    assert (folder / "plain" / "trtllm.yaml").read_text() == (
        "speculative_config:\n  decoding_type: Eagle3\n  max_draft_len: 3\n"
        f'  speculative_model: "{folder / "plain"}"\n  eagle3_layers_to_capture: [1, 3, 4]\n'
    )


@pytest.mark.parametrize(
    ("form", "plain", "speculators"),
    [
        ({}, {}, {}),
        (
            {"norm_before_residual": True},
            {"SGLang": "ignores norm_before_residual", "TensorRT-LLM": "ignores norm_b"},
            {},
        ),
        ({"aux_layers": (1, 3)}, {}, {"vLLM": "build fc for 3 aux layers in this format, and it has 2"}),
        ({"aux_layers": (0, 1, 3, 4)}, {}, {"vLLM": "build fc for 3 aux layers in this format, and it has 4"}),
        ({"aux_layers": (1, 3, 7)}, {"SGLang": "last layer"}, {}),
        (
            {"own_embedding": True, "norm_before_residual": True},
            {"SGLang": "embedding .* and it ignores norm_before_residual", "TensorRT-LLM": "embedding"},
            {},
        ),
        ({"hidden_size": 24, "own_embedding": True}, {}, {}),
    ],
)
def test_an_export_has_commands_for_the_engines_that_serve_it_as_it_was_trained(
    tmp_path, config, capsys, form, plain, speculators
):
    folder = tmp_path / "head"
    folder.mkdir()
    save_head(folder, make_head(**form), {"verifier": verifier_identity(config.verifier), "step": 0}, torch.float32)
    config.export.checkpoint, config.export.format = str(folder), ExportFormat.all
    export(config)
    said = capsys.readouterr().out
    commands = {"vLLM": "vllm serve", "SGLang": "sglang.launch_server", "TensorRT-LLM": "trtllm-serve"}
    for name, refused, engines in (("plain", plain, commands), ("speculators", speculators, ["vLLM"])):
        exported = config.run_folder / "exports" / name
        notes = (exported / "SERVING.md").read_text()
        for engine in engines:
            assert (commands[engine] in notes) is (engine not in refused)
            if engine in refused:
                assert re.search(f"{engine} cannot serve this head: .*{refused[engine]}", notes)
                assert re.search(f"export: {engine} cannot serve this head: .*{refused[engine]}", said)
        assert (exported / "trtllm.yaml").exists() is (name == "plain" and "TensorRT-LLM" not in refused)
    assert ("exports/speculators, served by" in said) is not bool(speculators)


def test_engines_are_told_to_draft_a_chain_as_deep_as_the_tree_that_was_evaluated(tmp_path, config):
    options = config.evaluate
    options.num_draft_tokens, options.tree_depth, options.tree_top_k = 60, 7, 10
    folder = exported(tmp_path, config)
    assert '"num_speculative_tokens": 7' in (folder / "plain" / "SERVING.md").read_text()
    assert "max_draft_len: 7\n" in (folder / "plain" / "trtllm.yaml").read_text()
    assert '"speculative_tokens": 7' in (folder / "speculators" / "config.json").read_text()


def test_a_model_card_shows_only_what_belongs_to_its_head(tmp_path, config, small_verifier):
    folder = exported(tmp_path, config)
    card = (folder / "plain" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert f'base_model: "{small_verifier.name}"\n' in front
    assert 'license: "other"\n' in front
    assert '"eagle3"' in front
    assert 'library_name: "speculators"' in (folder / "speculators" / "README.md").read_text()
    assert str(small_verifier) not in card
    assert "the verifier's licence applies" in card
    assert "Converted with fledge from `published`" in card
    assert "## Acceptance" not in card
    config.conversations_folder.mkdir()
    (config.conversations_folder / "manifest.json").write_text(json.dumps({"complete": True}))
    counts = {"acceptance_length": 2.346, "acceptance_rate_per_pos": [0.8, 0.4, 0.146]}
    results = {
        **counts,
        "by_category": {"writing": {"trained head": counts}},
        "num_draft_tokens_per_round": 3,
        "num_questions": 80,
        "questions": "/somewhere/question.jsonl",
        "drafting": "chain",
        "temperature": 0.0,
        "dtype": "float32",
        "max_tokens": 64,
        "definition": "tokens per round",
    }
    evaluation = config.run_folder / "evaluation"
    evaluation.mkdir()
    (evaluation / "acceptance.json").write_text(json.dumps(results))
    manifests = [
        json.loads((folder / "plain" / "manifest.json").read_text())["settings"]["head"],
        "of another head",
    ]
    for head, shown in zip(manifests, (True, False), strict=True):
        (evaluation / "manifest.json").write_text(json.dumps({"complete": True, "settings": {"head": head}}))
        export(config)
        card = (folder / "plain" / "README.md").read_text()
        assert ("| writing | 2.35 | 0.80 | 0.40 | 0.15 |" in card) is shown
        assert "/somewhere" not in card
        assert "## Training data" not in card, "the run's conversations are not what an imported head was trained on"


def test_an_export_with_other_draft_tokens_is_made_anew_and_an_equal_one_is_kept(tmp_path, config, capsys):
    folder = exported(tmp_path, config)
    weights = folder / "speculators" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    export(config)
    assert weights.stat().st_mtime_ns == before
    config.evaluate.num_draft_tokens = 7
    export(config)
    values = json.loads((folder / "speculators" / "config.json").read_text())
    assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    assert not list(folder.glob(".*.tmp"))
    shutil.rmtree(folder / "speculators")
    (folder / "speculators").mkdir()
    with pytest.raises(ValueError, match="not an export of fledge's"):
        export(config)
