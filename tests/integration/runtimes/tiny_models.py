"""GGUF files made here: a llama and an encoder of a few kilobytes, and LoRA adapters for SmolLM2."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

WIDTH, LAYERS, HEADS, HIDDEN = 32, 2, 2, 64
SMOLLM2_WIDTH, SMOLLM2_LAYERS = 576, 30


def tiny_llama(path: Path, *, seed: int = 1) -> Path:
    """Write a llama of random weights whose tokens are bytes."""
    writer = gguf.GGUFWriter(str(path), "llama")
    _sizes(writer, context=128)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = _Random(writer, seed)
    random.matrix("token_embd", len(tokens), WIDTH)
    random.vector("output_norm")
    random.matrix("output", len(tokens), WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            random.vector(f"blk.{layer}.{name}")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            random.matrix(f"blk.{layer}.{name}", WIDTH, WIDTH)
        random.matrix(f"blk.{layer}.ffn_gate", HIDDEN, WIDTH)
        random.matrix(f"blk.{layer}.ffn_up", HIDDEN, WIDTH)
        random.matrix(f"blk.{layer}.ffn_down", WIDTH, HIDDEN)
    return _finish(writer, path)


def tiny_encoder(path: Path, *, context: int, pooling: gguf.PoolingType | None) -> Path:
    """Write a BERT of random weights, which looks both ways; its words are letters and a few more."""
    writer = gguf.GGUFWriter(str(path), "bert")
    _sizes(writer, context=context)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    writer.add_vocab_size(len(tokens))
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * (len(tokens) - 5))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_unk_token_id(1)
    writer.add_sep_token_id(3)
    writer.add_pad_token_id(0)
    random = _Random(writer, 2)
    random.matrix("token_embd", len(tokens), WIDTH)
    random.matrix("position_embd", context, WIDTH)
    random.matrix("token_types", 2, WIDTH)
    random.vector("token_embd_norm")
    random.zeros("token_embd_norm.bias", WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            random.matrix(f"blk.{layer}.{name}", WIDTH, WIDTH)
            random.zeros(f"blk.{layer}.{name}.bias", WIDTH)
        for name in ("attn_output_norm", "layer_output_norm"):
            random.vector(f"blk.{layer}.{name}")
            random.zeros(f"blk.{layer}.{name}.bias", WIDTH)
        random.matrix(f"blk.{layer}.ffn_up", HIDDEN, WIDTH)
        random.zeros(f"blk.{layer}.ffn_up.bias", HIDDEN)
        random.matrix(f"blk.{layer}.ffn_down", WIDTH, HIDDEN)
        random.zeros(f"blk.{layer}.ffn_down.bias", WIDTH)
    return _finish(writer, path)


def smollm2_adapter(path: Path, *, rank: int = 4, width: int = SMOLLM2_WIDTH, strength: float = 0.3) -> Path:
    """Write a LoRA adapter of random weights for the query matrices of SmolLM2, or of a model of another width."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    random = np.random.default_rng(3)
    for layer in range(SMOLLM2_LAYERS):
        name = f"blk.{layer}.attn_q.weight"
        writer.add_tensor(f"{name}.lora_a", _normal(random, rank, width) * np.float32(strength))
        writer.add_tensor(f"{name}.lora_b", _normal(random, width, rank) * np.float32(strength))
    return _finish(writer, path)


def _sizes(writer: gguf.GGUFWriter, *, context: int) -> None:
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)


def _normal(random: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return random.standard_normal(shape).astype(np.float32)


class _Random:
    def __init__(self, writer: gguf.GGUFWriter, seed: int) -> None:
        self._writer = writer
        self._random = np.random.default_rng(seed)

    def matrix(self, name: str, rows: int, columns: int) -> None:
        self._writer.add_tensor(f"{name}.weight", _normal(self._random, rows, columns) / np.float32(columns**0.5))

    def vector(self, name: str) -> None:
        self._writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    def zeros(self, name: str, size: int) -> None:
        self._writer.add_tensor(name, np.zeros(size, np.float32))


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
