"""Write the tables of model families in docs/guide/models.md from benchmarks/walk_models.json.

    python scripts/model_table.py

A family's types stand together where they run alike. Types that no family names are in benchmarks/walk_models.md alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, RECORD = ROOT / "docs/guide/models.md", ROOT / "benchmarks/walk_models.json"

# By the year of the newest model of a family; types as in config.json.
FAMILIES: dict[str, dict[str, str]] = {
    "2026": {
        "Qwen 4 (experimental), Qwen 3.5": "qwen4_exp qwen4_exp_text qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
        "Gemma 4": "gemma4 gemma4_text gemma4_unified gemma4_unified_text",
        "DeepSeek V4": "deepseek_v4",
        "GLM-5, GLM-OCR": "glm_moe_dsa glm5_next glm_ocr glmga",
        "Kimi-Linear, Kimi K2.5": "kimi_linear kimi_k25",
        "MiniMax M3": "minimax_m3_vl minimax_m3_vl_text",
        "Mistral 4, Mistral Large 4": "mistral4 mistral_large4",
        "Nemotron-H": "nemotron_h nemotron_h_omni",
        "LFM3": "lfm3 lfm3_vl",
        "HunYuan V3, V4": "hy_v3 hy_v4",
        "Dots 3": "dots3_note dots3_note_text",
        "A.X K1, K2": "axk1 axk2",
        "Step 3.7": "step3p7",
        "MiMo-V2": "mimo_v2_flash",
        "EXAONE 4.5, EXAONE MoE": "exaone4_5 exaone_moe",
        "Olmo Hybrid": "olmo_hybrid",
        "Command A (MoE), Compass": "cohere2_moe cohere_compass cohere_compass_text",
        "Granite SWA, Granite 4 Vision, Granite Docling": "granite_swa granitemoe_swa granite4_vision granite_docling",
        "Ling, Ring (hybrid)": "bailing_hybrid",
        "Inkling": "inkling_text inkling2 inkling2_text inkling_mm_model",
        "MiniCPM 3, MiniCPM-V 4.6, 4.7": "minicpm3 minicpmv4_6 minicpmv4_7",
        "Zaya, HRM, Laguna, Muse, Solar Open, Youtu": "zaya hrm_text laguna muse_glimmer muse_spark solar_open youtu",
        "Molmo 2, Cosmos 3, HyperCLOVA X, InternLM 3": "molmo2 cosmos3_edge cosmos3_omni hyperclovax internlm3",
    },
    "2025": {
        "Qwen3, Qwen3-Next": "qwen3 qwen3_moe qwen3_next",
        "Qwen3-VL, Qwen2.5-VL, Qwen2.5-Omni": "qwen3_vl qwen3_vl_moe qwen2_5_vl qwen2_5_omni_thinker",
        "Gemma 3, 3n, VaultGemma": "gemma3 gemma3_text gemma3n gemma3n_text vaultgemma",
        "Llama 4": "llama4 llama4_text",
        "DeepSeek V2, V3, V3.2": "deepseek_v2 deepseek_v3 deepseek_v32",
        "GPT-OSS": "gpt_oss",
        "Mistral 3, Ministral": "mistral3 ministral ministral3",
        "GLM 4, 4.5, GLM-4V": "glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm46v",
        "MiniMax, MiniMax M2": "minimax minimax_m2",
        "Granite 4 H, Falcon-H1, LFM2": "granitemoehybrid falcon_h1 lfm2 lfm2_moe lfm2_vl",
        "SmolLM3, SmolVLM": "smollm3 smolvlm",
        "Olmo 3, FlexOlmo": "olmo3 flex_olmo",
        "ERNIE 4.5": "ernie4_5 ernie4_5_moe ernie4_5_vl_moe",
        "HunYuan": "hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl",
        "EXAONE 4, Seed-OSS, Dots 1, LongCat, Apertus, Arcee": "exaone4 seed_oss dots1 longcat_flash apertus arcee afmoe",
        "Phi-4 multimodal, Aya Vision, Command A Vision": "phi4_multimodal aya_vision cohere2_vision",
        "InternVL, LLaVA-OneVision, Ovis 2, Janus, PaddleOCR-VL": "internvl llava_onevision ovis2 janus paddleocr_vl",
        "xLSTM": "xlstm",
    },
    "Before": {
        "Llama, Mistral, Mixtral, Qwen2, Gemma, Gemma 2": "llama mistral mixtral qwen2 qwen2_moe gemma gemma2",
        "Phi, OLMo, Granite, Cohere, StableLM, StarCoder 2": "phi phi3 phimoe olmo olmo2 olmoe granite granitemoe cohere cohere2 "
        "stablelm starcoder2",
        "Bamba, Jamba, Zamba, RecurrentGemma": "bamba jamba zamba zamba2 recurrent_gemma",
        "Mamba, Falcon-Mamba, RWKV": "mamba mamba2 falcon_mamba rwkv",
        "GPT-2, GPT-NeoX, GPT-J, GPT-Neo, the first GPT": "gpt2 gpt_neox gptj gpt_neo openai-gpt",
        "BLOOM, MPT, Falcon, OPT": "bloom mpt falcon opt",
        "LLaVA, Qwen2-VL, Idefics, Llama 3.2 Vision": "llava llava_next qwen2_vl idefics2 idefics3 mllama",
        "BERT and its like, XLNet, Reformer": "bert roberta xlm-roberta camembert electra big_bird xlnet reformer paligemma",
        "BART, Pegasus, Marian, mBART, T5Gemma 2": "bart pegasus marian mbart t5gemma2",
        "T5, mT5, Flan-T5, LongT5, M2M100, NLLB": "t5 mt5 umt5 longt5 m2m_100 nllb-moe",
    },
}  # fmt: skip


def table_of(families: dict[str, str], found: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a table: a row for each way in which types of a family run. Types without right numbers are left out."""
    lines = ["| family | scoring | texts | `model_type` |", "|---|---|---|---|"]
    for family, types in families.items():
        ways: dict[tuple[str, str], list[str]] = {}
        for name in types.split():
            one = found.get(name)
            if one is not None and one["verdict"] == "right":
                ways.setdefault((one["mode"], one["generation"] or "transformers cannot"), []).append(f"`{name}`")
        lines += [f"| {family} | {mode} | {texts} | {', '.join(names)} |" for (mode, texts), names in ways.items()]
    return lines


def page_of(page: str, found: dict[str, dict[str, Any]]) -> str:
    """The page with its tables written anew, each behind a line `<!-- families of YEAR -->` and before an empty line."""
    for year, families in FAMILIES.items():
        mark = f"<!-- families of {year} -->\n"
        before, after = page.split(mark)
        rest = re.sub(r"\A(\|.*\n)*", "", after)
        page = before + mark + "\n".join(table_of(families, found)) + "\n" + rest
    return page


def main() -> None:
    PAGE.write_text(page_of(PAGE.read_text(encoding="utf-8"), json.loads(RECORD.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
