"""What `engine_forms.py` and the formats rely on in vLLM, held against the sources of the installed release.

A text that has moved fails here: read what vLLM does now, and correct the row.
"""

import ast
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
from fledge.models.formats.engine_forms import ENGINES, VLLM

pytestmark = pytest.mark.serving
MODELS, CONFIGS = "model_executor/models", "transformers_utils/configs/speculators"
LLAMA, QWEN3 = f"{MODELS}/llama_eagle3.py", f"{MODELS}/qwen3_eagle3.py"
HEADS = [(LLAMA, "LlamaModel", "Eagle3LlamaForCausalLM"), (QWEN3, "Qwen3Eagle3Model", "Eagle3Qwen3ForCausalLM")]
# (file, class or function, text in it)
OF_BOTH = [
    fact
    for file, model, head in HEADS
    for fact in (
        # fields
        (
            file,
            f"{model}.__init__",
            "eagle_config.get('norm_before_fc', getattr(self.config, 'norm_before_fc', False))",
        ),
        (file, f"{model}.__init__", "getattr(self.config, 'num_aux_hidden_states', None)"),
        (file, f"{model}.__init__", "getattr(self.config, 'target_hidden_size', self.config.hidden_size)"),
        (file, f"{model}.__init__", "getattr(self.config, 'fc_norm', False)"),
        (file, f"{model}.__init__", "getattr(self.config, 'norm_output', False)"),
        (file, f"{model}.__init__", "for layer_idx in range(self.config.num_hidden_layers)"),
        # tensors
        *(
            (file, f"{model}.__init__", f"self.{name} = ")
            for name in ("embed_tokens", "layers", "fc", "fc_norm", "norm")
        ),
        (file, f"{model}.__init__", "RMSNorm(self.fc_input_size, eps=self.config.rms_norm_eps)"),
        (file, model, "'midlayer.': 'layers.0.'"),
        (file, f"{head}.load_weights", "name.replace('d2t', 'draft_id_to_target_id')"),
        (file, f"{head}.load_weights", "if 't2d' in name:\n        continue"),
        (file, f"{head}.load_weights", "if not self.model.norm_before_fc:"),  # then input_norm is dropped
        (file, f"{head}.load_weights", "process_eagle_weight(self, name)"),  # finds lm_head, or the verifier's is taken
    )
]
FACTS = [
    *OF_BOTH,
    (LLAMA, "LlamaDecoderLayer.__init__", "getattr(config, 'norm_before_residual', False)"),
    (LLAMA, "LlamaDecoderLayer.__init__", "qkv_bias = getattr(config, 'attention_bias', False)"),
    # Each layer has both norms, and later ones apply input_layernorm: one file holds both names.
    (LLAMA, "LlamaDecoderLayer.__init__", "self.hidden_norm = RMSNorm(config.hidden_size"),
    (LLAMA, "LlamaDecoderLayer.forward", "self.input_layernorm(hidden_states, residual)"),
    (QWEN3, "Qwen3Eagle3DecoderLayer.__init__", "self.hidden_norm = RMSNorm(config.hidden_size"),
    (QWEN3, "Qwen3Eagle3DecoderLayer.forward", "self.input_layernorm(hidden_states, residual)"),
    (f"{MODELS}/llama.py", "LlamaDecoderLayer.__init__", "bias_o_proj = attention_bias"),
    (f"{MODELS}/qwen3.py", "Qwen3Attention.__init__", "self.q_norm = RMSNorm(self.head_dim"),
    (f"{MODELS}/qwen3.py", "Qwen3Attention.__init__", "self.k_norm = RMSNorm(self.head_dim"),
    (f"{MODELS}/qwen3.py", "Qwen3Attention.__init__", "hidden_size, bias=False, quant_config"),  # of o_proj
    (f"{MODELS}/utils.py", "AutoWeightsLoader.load_weights", "self.ignore_unexpected_suffixes.append('.bias')"),
    # A window, by layer.
    (f"{MODELS}/llama.py", "LlamaAttention.__init__", "layer_types[effective_layer_idx] == 'sliding_attention'"),
    (f"{MODELS}/llama.py", "LlamaAttention.__init__", "sliding_window = config.sliding_window"),
    (f"{MODELS}/llama.py", "LlamaAttention.__init__", "layer_idx - config.target_layer_count"),
    (QWEN3, "Qwen3Eagle3DecoderLayer.__init__", "layer_types[layer_idx] == 'sliding_attention'"),
    ("v1/spec_decode/llm_base_proposer.py", "", "All drafting layers should belong to the same kv cache group"),
    ("config/scheduler.py", "SchedulerConfig", "disable_hybrid_kv_cache_manager"),
    ("model_executor/layers/rotary_embedding/__init__.py", "get_rope", "get('partial_rotary_factor', 1.0)"),
    (f"{MODELS}/registry.py", "", "'LlamaForCausalLMEagle3': ('llama_eagle3', 'Eagle3LlamaForCausalLM')"),
    (f"{MODELS}/registry.py", "", "'Eagle3Qwen3ForCausalLM': ('qwen3_eagle3', 'Eagle3Qwen3ForCausalLM')"),
    # Speculators format: the layer's fields as they are, and these of the top level.
    (f"{CONFIGS}/base.py", "SpeculatorsConfig", "config_dict.get('transformer_layer_config', {})"),
    *(
        (f"{CONFIGS}/algos.py", "update_eagle3", f"pre_trained_config['{name}'] = config_dict.get('{name}', {default})")
        for name, default in (
            ("norm_before_residual", True), ("norm_before_fc", False), ("fc_norm", False), ("norm_output", False)
        )
    ),
    (f"{CONFIGS}/algos.py", "update_eagle3", "'qwen3': 'Eagle3Qwen3ForCausalLM'"),
    (f"{CONFIGS}/algos.py", "update_eagle3", "pre_trained_config.get('model_type', 'llama')"),
    (f"{MODELS}/gemma3.py", "Gemma3ForCausalLM", "class Gemma3ForCausalLM(nn.Module, SupportsLoRA, SupportsPP):"),
    (f"{MODELS}/transformers/base.py", "", "SupportsEagle3,"),  # so `--model-impl transformers`
    ("v1/worker/gpu_model_runner.py", "", "getattr(hf_config, 'eagle_aux_hidden_state_layer_ids', None)"),
    ("v1/worker/gpu_model_runner.py", "", "eagle_config.get('eagle_aux_hidden_state_layer_ids')"),
    ("v1/spec_decode/llm_base_proposer.py", "", "if not self.model.has_own_lm_head:\n"),
]  # fmt: skip


def in_vllms_python(code: str) -> str:
    command = [os.environ["FLEDGE_VLLM_PYTHON"], "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@cache
def source(file: str, name: str) -> str:
    """Return a class or function of the installed vLLM, or a file, as `ast` writes it."""
    root = in_vllms_python("import importlib.util as u; print(*u.find_spec('vllm').submodule_search_locations)")
    node: ast.AST = ast.parse((Path(root) / file).read_text())
    for part in name.split(".") if name else []:
        found = [one for one in ast.iter_child_nodes(node) if getattr(one, "name", None) == part]
        assert found, f"{file} has no {name}"
        node = found[-1]
    return ast.unparse(node)


@pytest.mark.parametrize(("file", "name", "text"), FACTS, ids=lambda value: value[:60])
def test_vllm_reads_what_the_table_says(file, name, text):
    assert " ".join(text.split()) in " ".join(source(file, name).split())


@pytest.mark.parametrize("head", [head for *_, head in HEADS])
def test_both_norms_before_fc_are_applied_in_this_order(head):
    file = next(file for file, _, name in HEADS if name == head)
    text = source(file, f"{head}.combine_hidden_states")
    places = [text.index(part) for part in ("self.model.input_norm(", "zip(self.model.fc_norm,", "self.model.fc(")]
    assert places == sorted(places)


def test_the_table_names_the_release_that_is_installed():
    version = in_vllms_python("from importlib.metadata import packages_distributions as p, version; "
                              "print(version(p()['vllm'][0]))")  # fmt: skip
    assert version.rpartition(".")[0] == ENGINES[VLLM]
