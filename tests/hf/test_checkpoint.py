"""Weights in and out: dtype, shards, memory, and files that are not what they say."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from archcompass.blocks import zoo
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.hf import checkpoint
from archcompass.blocks.hf.checkpoint import INDEX, SINGLE, load_pretrained, save_pretrained
from archcompass.blocks.hf.configuration import read_config
from archcompass.blocks.model.module import LanguageModel
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE
from archcompass.errors import ConversionError, FileFormatError

SMALL = ModelSpec(
    hidden_size=32,
    vocab_size=60,
    blocks={
        "attention": Attention(num_attention_heads=4, num_key_value_heads=2, head_dim=8),
        "moe": MoE(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    },
    layers="2*(attention moe)",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(SMALL.build(), tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = dict(load_file(folder / SINGLE))
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def reconfigure(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_come_back_bit_for_bit_in_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = SMALL.build(dtype=dtype)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_shards_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    model = SMALL.build()
    save_pretrained(model, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    loaded = load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_shards_of_transformers_are_read_and_ours_opens_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    save_pretrained(SMALL.build(), tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / INDEX).is_file()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        difference = load_pretrained(tmp_path / "theirs")(ids).logits - theirs(ids).logits
    assert difference.abs().max() < 1e-5


def test_saving_over_the_folder_a_model_is_mapped_from_keeps_it_whole(folder: Path) -> None:
    model = load_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_pretrained(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_pretrained(folder).state_dict().items())


def test_a_loaded_model_can_be_trained_and_leaves_the_file_alone(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    model = load_pretrained(folder).train()
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert (folder / SINGLE).read_bytes() == content


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_at_most_a_fifth_more_memory_than_the_weights(tmp_path: Path) -> None:
    spec = ModelSpec(
        hidden_size=512,
        vocab_size=4000,
        blocks={
            "attention": Attention(num_attention_heads=8, num_key_value_heads=4, head_dim=64),
            "moe": MoE(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=768),
        },
        layers="6*(attention moe)",
    )
    model = spec.build(device="meta").to_empty(device="cpu")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    save_pretrained(model, tmp_path)
    del model
    before = _reset_peak()
    loaded = load_pretrained(tmp_path)
    assert all(parameter.detach().min() == parameter.detach().max() == 0.5 for parameter in loaded.parameters())
    assert _status("VmHWM") - before < 1.2 * weights


def _reset_peak() -> int:
    """Sets the peak to what is resident now, and says how much that is."""
    import gc

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(FileFormatError, match=r"lacks model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_pretrained(folder)


def test_a_tensor_left_over_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    with pytest.raises(FileFormatError, match=r"holds model\.layers\.0\.extra\.weight"):
        load_pretrained(folder)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_known_by_the_configuration(model_type: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = sizes | {"model_type": model_type, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1}
    config |= {"num_experts_per_tok": 2, "topk_group": 1, "num_key_value_heads": 4, "intermediate_size": 48}
    config |= {"first_k_dense_replace": 1}
    save_pretrained(read_config(config).build(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.2.shared_head.norm.weight": torch.zeros(2)}))
    with pytest.raises(FileFormatError, match=r"holds model\.layers\.2\.shared_head"):
        load_pretrained(tmp_path)
    reconfigure(tmp_path, num_nextn_predict_layers=1)
    assert load_pretrained(tmp_path).spec.num_hidden_layers == 2
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(2)}))
    with pytest.raises(FileFormatError, match=r"holds model\.layers\.3\.eh_proj"):
        load_pretrained(tmp_path)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(33)}))
    with pytest.raises(FileFormatError, match=r"model\.norm\.weight give norm\.weight the shape \[33\].*\[32\]"):
        load_pretrained(folder)


def test_a_piece_of_another_shape_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.v_proj.weight": torch.zeros(15, 32)}))
    with pytest.raises(FileFormatError, match=r"v_proj\.weight cannot become"):
        load_pretrained(folder)


def test_a_head_beside_a_tied_table_must_be_the_table(tmp_path: Path) -> None:
    save_pretrained(SMALL.model_copy(update={"tie_word_embeddings": True}).build(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert load_pretrained(tmp_path).head.weight is None
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(60, 32)}))
    with pytest.raises(FileFormatError, match=r"lm_head\.weight differs"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/one.safetensors", "weights.bin", ".."])
def test_an_index_that_points_elsewhere_is_refused(name: str, folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(FileFormatError, match=r"a shard is a \.safetensors file in the same folder"):
        load_pretrained(folder)


def test_an_index_that_names_a_missing_file_or_tensor_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(FileFormatError, match=r"names gone\.safetensors, which is not in"):
        load_pretrained(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"nowhere.weight": SINGLE}}))
    with pytest.raises(FileFormatError, match=r"says nowhere\.weight is in"):
        load_pretrained(folder)


def lying_header(size: int | None = None, **entry: Any) -> bytes:
    claimed = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry
    header = json.dumps({"model.norm.weight": claimed}).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        lying_header(size=2**60),
        lying_header(size=3),
        lying_header(shape=[2**40]),
        lying_header(data_offsets=[0, 10**9]),
        lying_header(data_offsets=[8, 0]),
        lying_header(dtype="X9"),
        lying_header(shape=[-4]),
    ],
    ids=["empty", "short", "huge header", "cut header", "huge shape", "past the end", "backwards", "dtype", "negative"],
)
def test_a_header_that_lies_is_refused(content: bytes, folder: Path) -> None:
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(FileFormatError, match=r"model\.safetensors is no sound safetensors file"):
        load_pretrained(folder)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="no safetensors file"):
        load_pretrained(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    reconfigure(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConversionError, match="quantization_config is set"):
        load_pretrained(folder)


def test_every_table_fills_every_tensor_of_its_model_once() -> None:
    from archcompass.blocks.hf.configuration import family

    for name in (
        "llama-3.1-8b",
        "jamba-v0.1",
        "zamba2-2.7b",
        "qwen3-next-80b-a3b",
        "deepseek-v3.2",
        "rwkv7-0.1b-world",
    ):
        spec = zoo.published(name)
        assert spec.model_type is not None
        with torch.device("meta"):
            expected = set(LanguageModel(spec).state_dict())
        assert {weight.ours for weight in family(spec.model_type).weights(spec)} == expected


def test_the_folder_says_it_was_written_for_torch(folder: Path) -> None:
    with safe_open(folder / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
