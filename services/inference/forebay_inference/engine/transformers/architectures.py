"""Which architectures are served: those that a test has compared with the plain library model, and no other unasked.

`tests/integration/engine/test_architectures.py` makes a tiny checkpoint of each, and docs/models.md has the table.
"""

from typing import Any, Final

from transformers import AutoModelForCausalLM

from forebay_contracts.wire.errors import ConfigurationError

TESTED: Final = {
    "afmoe": "Trinity",
    "apertus": "Apertus",
    "arcee": "AFM",
    "biogpt": "BioGPT",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "cohere2_moe": "Command A MoE",
    "cwm": "CWM",
    "deepseek_v2": "DeepSeek V2, V2 Lite, Coder V2",
    "deepseek_v3": "DeepSeek V3, R1, Moonlight",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5",
    "ernie4_5_moe": "ERNIE 4.5 MoE",
    "exaone": "EXAONE 3, 3.5",
    "exaone4": "EXAONE 4",
    "exaone_moe": "K-EXAONE",
    "falcon": "Falcon, without ALiBi",
    "flex_olmo": "FlexOlmo",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, text only",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n_text": "Gemma 3n, text alone",
    "gemma4": "Gemma 4, text only",
    "gemma4_text": "Gemma 4, text alone",
    "glm": "GLM 4 9B",
    "glm4": "GLM 4 0414",
    "glm4_moe": "GLM 4.5, 4.6, 4.7",
    "glm4_moe_lite": "GLM 4.7 Flash",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gpt_oss": "gpt-oss",
    "gptj": "GPT-J",
    "granite": "Granite 3",
    "granite_swa": "Granite with sliding windows",
    "granitemoe": "Granite 3 MoE",
    "granitemoe_swa": "Granite MoE with sliding windows",
    "granitemoeshared": "Granite MoE with shared experts",
    "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan",
    "hunyuan_v1_moe": "Hunyuan MoE",
    "hy_v3": "Hunyuan 3",
    "hyperclovax": "HyperCLOVA X SEED",
    "internlm3": "InternLM3",
    "iquestcoder": "IQuest-Coder",
    "jais2": "Jais 2",
    "llama": "Llama 1 to 3.3, SmolLM2, Yi, Vicuna",
    "longcat_flash": "LongCat Flash",
    "mimo_v2_flash": "MiMo V2 Flash",
    "minicpm3": "MiniCPM3",
    "minimax_m2": "MiniMax M2",
    "ministral": "Ministral",
    "ministral3": "Ministral 3, text alone",
    "mistral": "Mistral 7B, Nemo, Small",
    "mixtral": "Mixtral",
    "nanochat": "nanochat",
    "nemotron": "Nemotron 4, Minitron",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "persimmon": "Persimmon",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4, Phi-4-mini, with longrope",
    "qwen2": "Qwen2, Qwen2.5, QwQ",
    "qwen2_moe": "Qwen1.5 MoE, Qwen2 MoE",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 MoE",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM3",
    "solar_open": "Solar Open",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
    "vaultgemma": "VaultGemma",
    "youtu": "Youtu-LLM",
}
"""Known models by `model_type` of config.json."""

_SERVED_LAYERS: Final = frozenset({"full_attention", "sliding_attention"})


def check(config: Any, *, allow_untested: bool) -> None:
    """Refuse what cannot be batched, and, without `allow_untested`, what no test has compared.

    Raises:
        ConfigurationError: one sentence that names the architecture and says why.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(f"{kind} is an encoder-decoder model; only decoder models are served")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigurationError(f"{kind} is no text generation model of the Transformers library")
    text = config.get_text_config()
    if other := sorted(set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYERS):
        raise ConfigurationError(f"{kind} has layers of {', '.join(other)}, which the continuous batch cannot keep")
    if getattr(text, "alibi", False) or kind in ("bloom", "mpt"):
        raise ConfigurationError(f"{kind} places its tokens with ALiBi, which the continuous batch cannot compute")
    if kind not in TESTED and not allow_untested:
        raise ConfigurationError(
            f"{kind} is not among the tested architectures (docs/models.md); ALLOW_UNTESTED_MODELS=true serves it "
            "if it passes a check at start"
        )
