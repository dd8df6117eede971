"""Every model family on the allow-list follows the masks it is handed; those that would not are off it."""

import pytest
import torch

from larpo.modeling.prefix_sharing import FAMILIES, check_prefix_sharing, supports_prefix_sharing
from tests.helpers.tiny import causal_lm
from tests.larpo.modeling.test_prefix_sharing import APART, SHARED, TOKENS, WINDOW, _attentive, _logps

MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MIXTURES = ("deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
WANTS = {  # beside the sizes of tiny.causal_lm
    "deepseek_v3": {
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi": {"partial_rotary_factor": 0.5},
}


def _tiny(family, attention="eager"):
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    config = {"sliding_window": WINDOW, **(MOE if family in MIXTURES else {}), **WANTS.get(family, {})}
    return _attentive(causal_lm(family, attn_implementation=attention, **config))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_on_the_list_gives_the_numbers_of_separate_rows(family):
    model = _tiny(family)
    assert supports_prefix_sharing(model.config) is None
    with torch.no_grad():
        apart, shared = _logps(model, APART), _logps(model, SHARED)
        assert check_prefix_sharing(shared, apart, TOKENS, torch.float32) is None
        alone = {**SHARED, "segments": torch.where(SHARED["segments"] == 0, -2, SHARED["segments"])}
        assert check_prefix_sharing(_logps(model, alone), apart, TOKENS, torch.float32), "the mask changes nothing"
