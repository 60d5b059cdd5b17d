"""`forebay plan`: its arithmetic against real models, the engine's own numbers, and the tables in the docs."""

import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from pydantic import SecretStr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.initialization import resolve_continuous_batching_config

from forebay_cli.commands.plan import fit_all, options_of, settings_of
from forebay_cli.hub import config_of_hub
from forebay_contracts.settings import Settings
from forebay_contracts.sizing.gpu_memory import (
    BATCH_SIZES,
    ENGINES,
    GGUF_BYTES,
    MAX_SLOTS,
    PAGE_TOKENS,
    QUANTIZATIONS,
    RESERVE_BYTES,
    Fit,
    ModelShape,
    activation_bytes,
    blocks_of,
    cache_tokens,
    fit,
    kv_bytes_per_token,
    recommended,
    weights_bytes,
)
from forebay_contracts.sizing.model_shape import of_config, of_folder, of_params, parse_params, parse_size
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.transformers.cache_shape import CacheShape
from forebay_inference.engine.transformers.gpu import blocks_on_gpu, settings_on_gpu
from forebay_inference.engine.transformers.memory import CachePlan, plan_cache
from forebay_inference.models.store import ensure_model
from support.configs import LLAMA_8B
from support.hub import Hub
from support.stack import data_dir

GIB = 1 << 30
DOCS = Path(__file__).parents[2] / "docs" / "sizing.md"
DEFAULT_MODEL = Settings.model_fields["default_model"].default

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 32_000,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32_768,
}


def folder_with(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def fitted(shape: ModelShape, gib: float, quantization: str, context: int, max_slots: int = MAX_SLOTS) -> Fit:
    return fit(shape, int(gib * GIB), quantization, context, requests_per_slot=50, max_slots=max_slots)


@pytest.mark.parametrize(
    ("text", "size"),
    [(text, 24 << 30) for text in ("24GiB", "24G", "24", "24 gib")] + [("24GB", 24 * 10**9), ("0.5TiB", 1 << 39)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["GiB", "", "-1GiB", "24GiB more"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no amount of memory"):
        parse_size(text)


def test_numbers_of_parameters() -> None:
    assert [parse_params(text) for text in ("7B", "1.5b", "135M", "org/model", "7B-it")] == [
        7_000_000_000,
        1_500_000_000,
        135_000_000,
        None,
        None,
    ]


@pytest.mark.parametrize(("config", "params"), [(LLAMA_8B, 8_030_261_248), (MIXTRAL, 46_702_792_704)])
def test_parameters_from_a_configuration(tmp_path: Path, config: dict[str, Any], params: int) -> None:
    assert of_folder("m", folder_with(tmp_path, config)).params == params


@pytest.mark.parametrize("with_weights", [True, False])
def test_experts_stay_in_16_bits(tmp_path: Path, with_weights: bool) -> None:
    folder = folder_with(tmp_path, MIXTRAL)
    of_config = of_folder("m", folder)
    experts = of_config.layers * (8 * 3 * 4096 * 14_336 + 8 * 4096)
    if with_weights:
        write_header(
            folder / "model.safetensors",
            {
                "model.layers.0.mlp.experts.down_proj": [8, 4096, 14_336],
                "model.layers.0.mlp.experts.0.w1.weight": [14_336, 4096],
                "model.layers.0.self_attn.q_proj.weight": [64, 64],
            },
        )
        experts = 9 * 4096 * 14_336
    shape = of_folder("m", folder)
    assert shape.expert_params == experts < shape.other_params + 1
    saved = weights_bytes(shape, "none") - weights_bytes(shape, "nf4")
    assert saved == shape.linear_params * (2 - 0.5625)


def write_header(path: Path, shapes: dict[str, list[int]]) -> None:
    """A weight file without its numbers."""
    header = json.dumps(
        {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())


def test_compressed_keys_take_one_head(tmp_path: Path) -> None:
    latent = {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_routed_experts": 4}
    assert kv_bytes_per_token(of_folder("m", folder_with(tmp_path, LLAMA_8B | latent))) == 2 * 32 * 512 * 2


def test_a_size_alone_is_near_to_the_model_it_stands_for(tmp_path: Path) -> None:
    real, guessed = of_folder("m", folder_with(tmp_path, LLAMA_8B)), of_params("8B", 8_000_000_000)
    assert kv_bytes_per_token(guessed) == kv_bytes_per_token(real) == 131_072
    for quantization in QUANTIZATIONS:
        assert weights_bytes(guessed, quantization) == pytest.approx(weights_bytes(real, quantization), rel=0.01)
    assert kv_bytes_per_token(of_params("8B", 8_000_000_000, layers=16, kv_heads=4, head_dim=64)) == 16_384


def test_a_checkpoint_that_is_quantized_already_is_measured(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA_8B | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    guessed = of_folder("m", folder)
    # 4 bits, a scale and a zero point: what such checkpoints of this model take on the hub.
    assert (guessed.carried, weights_bytes(guessed, "auto")) == ("gptq", pytest.approx(5.73e9, rel=0.01))
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    shape = of_folder("m", folder)
    assert (shape.carried, weights_bytes(shape, "auto")) == ("gptq", 1000)
    with pytest.raises(ConfigurationError, match="quantized already"):
        of_config("m", LLAMA_8B | {"quantization_config": {"quant_method": "quip"}})


class Card:
    """A GPU that this machine may not have, with weights on it: what torch and the library are told of its memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gib: float, weights: int) -> None:
        total, free = int(gib * GIB), int(gib * GIB) - RESERVE_BYTES - weights
        told = {
            "is_available": True,
            "empty_cache": None,
            "synchronize": None,
            "memory_reserved": weights,
            "mem_get_info": (free, total),
        }
        for name, value in told.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    def plan(self, config: Any, slots: int, context: int, batch: int, *, flash: bool) -> CachePlan:
        """The engine's plan; the library then makes that cache, without its memory."""
        config._attn_implementation = "flash_attention_2" if flash else "sdpa"
        device, helper = torch.device("cuda", 0), DistributedHelper(None, None)
        options = settings_on_gpu(batch, config.max_position_embeddings, flash=flash)
        # What the library decides only where it finds a GPU and its kernels.
        options |= {"max_blocks_per_request": 0, "use_cuda_graph": False}
        settings = resolve_continuous_batching_config(config, ContinuousBatchingConfig(**options), None, False, device)
        settings.max_blocks_per_request = blocks_of(config.max_position_embeddings) if flash else 0
        affordable = blocks_on_gpu(config, settings, torch.bfloat16, helper, slices_logits=True)
        shape = CacheShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        made = plan_cache(shape, torch.bfloat16, device, slots, context, affordable=affordable)
        settings.num_blocks = made.blocks
        cache = PagedAttentionCache(config, settings, torch.device("meta"), helper, torch.bfloat16, True)
        assert cache.num_blocks == made.blocks
        return made


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(
    ("gib", "quantization", "slots", "context", "batch"),
    [(24, "nf4", 1, 131_072, 256), (80, "none", 8, 8192, 2048), (24, "none", 4, 32_768, 1024), (8, "nf4", 3, 700, 32)],
)
def test_the_cache_is_what_the_engine_makes_of_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gib: int,
    quantization: str,
    slots: int,
    context: int,
    batch: int,
    flash: bool,
) -> None:
    # Without flash attention, a cache of these sizes left no room for the attention mask, and the library raised.
    folder = folder_with(tmp_path, LLAMA_8B)
    config, shape = AutoConfig.from_pretrained(folder), of_folder("m", folder)
    made = Card(monkeypatch, gib, weights_bytes(shape, quantization)).plan(config, slots, context, batch, flash=flash)
    most = cache_tokens(shape, gib * GIB, quantization, batch, 131_072, engine="transformers", flash=flash)
    wanted = slots * -(-context // PAGE_TOKENS) * PAGE_TOKENS
    # The library removes pages for the mask by a formula that is a page off at most.
    assert made.tokens == pytest.approx(min(wanted, most), abs=PAGE_TOKENS)
    assert made.context_length == min(context, made.tokens)


def test_a_card_without_room_for_a_pass_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder_with(tmp_path, LLAMA_8B))
    with pytest.raises(ConfigurationError, match="LLM_BATCH_SIZE=8192 tokens needs that; lower LLM_BATCH_SIZE"):
        Card(monkeypatch, 8, int(6.5 * GIB)).plan(config, 1, 8192, 8192, flash=False)


def test_everything_that_is_planned_fits() -> None:
    for params in (500_000_000, 8_000_000_000, 70_000_000_000):
        for gib in (6, 8, 12, 16, 24, 48, 80, 141):
            for quantization in QUANTIZATIONS:
                one = fitted(of_params("m", params), gib, quantization, 8192)
                if one.slots:
                    used = RESERVE_BYTES + one.weights_bytes + one.cache_bytes + one.activation_bytes
                    assert used <= gib * GIB
                    assert one.slots <= one.batch_tokens in BATCH_SIZES
                    assert one.slots <= one.queue_size


@pytest.fixture(scope="module")
def default_model() -> Path:
    return ensure_model(DEFAULT_MODEL, data_dir(), lambda line: None)


@pytest.mark.model
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_weights_of_a_real_model(default_model: Path, quantization: str) -> None:
    options: dict[str, Any] = {
        "none": {},
        "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "nf4": {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        },
    }[quantization]
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.bfloat16, device_map={"": "cpu"}, **options)
    predicted = weights_bytes(of_folder("m", default_model), quantization)
    assert predicted == pytest.approx(bytes_of(model), rel=1e-3)
    assert str(predicted) in DOCS.read_text().replace(",", "")


@pytest.mark.model
def test_cache_and_activations_of_a_real_model(default_model: Path) -> None:
    shape = of_folder("m", default_model)
    assert kv_bytes_per_token(shape) == 23_040
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        cache = model(torch.ones(1, 100, dtype=torch.long), use_cache=True).past_key_values
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert kept == 100 * kv_bytes_per_token(shape)
        tokens = torch.ones(1, 256, dtype=torch.long)
        with LiveBytes(model) as live:
            model(tokens, use_cache=False).logits.float()
    predicted = activation_bytes(shape, 256, 0)
    assert 0.8 * predicted < live.peak <= predicted


def bytes_of(model: Any) -> int:
    """All tensors of a model, the scales of quantized ones included, each once."""
    tensors = {}
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        scales = (tensor.SCB,) if hasattr(tensor, "SCB") else (state.absmax, state.code) if state else ()
        for one in (tensor, *scales):
            if one is not None:
                tensors[one.data_ptr()] = one.nbytes
    return sum(tensors.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, while they live."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self._now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._seen:
                    self._seen.add(storage.data_ptr())
                    self._now += storage.nbytes()
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return made

    def _gone(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self._now -= size


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of the docs."""
    section = DOCS.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (.+) \|$", section, re.MULTILINE)
    return [[cell.strip(" `") for cell in line.split(" | ")] for line in lines[2:]]


def test_the_table_of_the_docs() -> None:
    shape = of_params("8B", 8_000_000_000)
    rows = rows_of("An 8B model")
    assert len(rows) == 6
    for memory_size, *cells in rows:
        fits = [fitted(shape, parse_size(memory_size) / GIB, quantization, 8192) for quantization in QUANTIZATIONS]
        best = recommended(fits, 4, 8192)
        assert best is not None
        expected = [best.quantization, best.slots, best.batch_tokens, best.queue_size, *(one.slots for one in fits)]
        assert cells == [str(cell) for cell in expected]


def test_the_rule_of_thumb_holds() -> None:
    shape = of_params("8B", 8_000_000_000)
    for memory_size, slots, context, batch, queue in rows_of("The usual rule of thumb"):
        gib = parse_size(memory_size) / GIB
        one = fitted(shape, gib, "nf4", int(context), max_slots=int(slots))
        assert [one.slots, one.context, one.batch_tokens, one.queue_size] == [
            int(cell) for cell in (slots, context, batch, queue)
        ]
        longer = fitted(shape, gib, "nf4", int(context) + PAGE_TOKENS, max_slots=int(slots))
        assert (longer.slots, longer.context) != (int(slots), int(context) + PAGE_TOKENS)


def test_the_most_precise_that_serves_enough() -> None:
    def best(gib: int, concurrency: int = 4, quantization: str | None = None) -> str:
        shape = of_params("8B", 8_000_000_000)
        fits = fit_all(shape, gib * GIB, 8192, quantization, requests_per_slot=50)
        found = recommended(fits, concurrency, 8192)
        return found.quantization if found else "nothing"

    assert [best(gib) for gib in (4, 8, 16, 24)] == ["nothing", "nf4", "int8", "none"]
    assert best(24, concurrency=14) == "nf4"
    assert best(24, concurrency=1000) == "nf4"
    assert best(24, quantization="fp4") == "fp4"


def test_a_hub_is_asked_for_the_config_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"config.json": json.dumps(LLAMA_8B).encode(), "model.safetensors": b"weights"}
    hub = Hub({"org/open": files, "org/gated": files}, gated={"org/gated"})
    with hub.running() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert of_config("org/open", config_of_hub("org/open", None)).params == 8_030_261_248
        with pytest.raises(ConfigurationError, match="does not give it without an HF_TOKEN"):
            config_of_hub("org/gated", None)
        assert config_of_hub("org/gated", SecretStr(hub.token)) == LLAMA_8B
        assert hub.fetched == ["config.json"] * 2
        with pytest.raises(ConfigurationError, match="the model hub answers 404"):
            config_of_hub("org/none", SecretStr(hub.token))
    with pytest.raises(ConfigurationError, match="cannot be reached"):
        config_of_hub("org/open", None)


@pytest.mark.parametrize(
    ("engine", "quantization", "options"),
    [
        ("transformers", "none", ""),
        ("vllm", "none", "--max-num-seqs 5 --max-num-batched-tokens 1024 --max-model-len 8192"),
        ("sglang", "none", "--max-running-requests 5 --chunked-prefill-size 512 --context-length 8192"),
        ("llamacpp", "BF16", "--parallel 8 --ctx-size 65536 --ubatch-size 256 (with a GGUF in BF16)"),
    ],
)
def test_each_engine_is_planned_for(engine: str, quantization: str, options: str) -> None:
    fits = fit_all(of_params("8B", 8_000_000_000), 24 * GIB, 8192, None, requests_per_slot=50, engine=engine)
    assert [one.quantization for one in fits] == list(ENGINES[engine].quantizations)
    best = recommended(fits, 4, 8192)
    assert best is not None
    assert (best.quantization, options_of(best, engine)) == (quantization, options)
    assert settings_of(best, engine)["MAX_CONCURRENT_REQUESTS"] == str(best.slots)
    with pytest.raises(ConfigurationError, match=f"--quantization Q9: {engine} has "):
        fit_all(of_params("8B", 8_000_000_000), 24 * GIB, 8192, "Q9", requests_per_slot=50, engine=engine)


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q6_K", "Q4_1", "Q4_0"])
def test_bytes_of_gguf_quantizations(name: str) -> None:
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert pytest.approx(size / weights, rel=1e-3) == GGUF_BYTES[name]


def forebay_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forebay_cli", "plan", *arguments]
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # no hub
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def test_the_command(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA_8B)
    shown = forebay_plan("--gpu-memory", "24GiB", "--model", str(folder))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-4:] == [
        "MODEL_QUANTIZATION=none",
        "MAX_CONCURRENT_REQUESTS=6",
        "LLM_BATCH_SIZE=512",
        "MAX_QUEUE_SIZE=300",
    ]
    found = json.loads(forebay_plan("--gpu-memory", "24GiB", "--model", str(folder), "--json").stdout)
    assert found["settings"]["MAX_CONCURRENT_REQUESTS"] == "6"
    assert found["model"]["params"] == 8_030_261_248
    assert [one["quantization"] for one in found["fits"]] == list(QUANTIZATIONS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("4GiB", "8B"), "8B does not fit into 4.00 GiB: its weights take 5.60 GiB with nf4"),
        (("lots", "8B"), "'lots' is no amount of memory"),
        (("8GiB", "org/no where"), "org/no where is not on this machine, and the model hub"),
    ],
)
def test_what_cannot_be_planned(arguments: tuple[str, str], sentence: str) -> None:
    ended = forebay_plan("--gpu-memory", arguments[0], "--model", arguments[1])
    assert ended.returncode == 2
    assert sentence in ended.stderr
