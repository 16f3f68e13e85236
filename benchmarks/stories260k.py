"""Bring stories260K (a LLaMA really trained, by llama2.c) into the form of an ordinary transformers directory.

    python benchmarks/stories260k.py stories260K.bin tok512.bin OUT_FOLDER

Reads llama2.c's first checkpoint format: seven int32 (dim, hidden, layers, heads, key/value heads, vocabulary, length),
then float32 tensors. Its rotary embedding turns neighbouring channels, transformers' the two halves of a head: q and k
are permuted.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_model(path: Path) -> Any:
    """The checkpoint as a `LlamaForCausalLM`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", data[:28])
    values, position = np.frombuffer(data, dtype=np.float32, offset=28), 0
    size = dim // heads

    def take(*shape: int) -> Tensor:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return torch.from_numpy(values[position - count:position].reshape(shape).copy())

    def halves(weight: Tensor, count: int) -> Tensor:
        return weight.reshape(count, size // 2, 2, dim).transpose(1, 2).reshape(-1, dim)

    embedding = take(abs(vocabulary), dim)
    parts = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_heads * size, dim),
        "self_attn.v_proj": take(layers, kv_heads * size, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    take(length * size)  # tables of cosines and sines
    state["lm_head.weight"] = embedding if vocabulary > 0 else take(abs(vocabulary), dim)
    if position != len(values):
        raise ValueError(f"{path}: {len(values) - position} floats left over")
    for name, stacked in parts.items():
        for layer in range(layers):
            weight = stacked[layer]
            if name.endswith(("q_proj", "k_proj")):
                weight = halves(weight, heads if "q_proj" in name else kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=abs(vocabulary),
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=vocabulary > 0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.load_state_dict(state, strict=True)
    return model.eval()


def read_tokenizer(path: Path) -> Any:
    """llama2.c's sentencepiece vocabulary as a fast tokenizer: byte-pair merges in the order of the scores, bytes for
    what is missing.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    data, position = path.read_bytes(), 4
    pieces: list[tuple[str, float]] = []
    while position < len(data):
        score, length = struct.unpack_from("fi", data, position)
        position += 8 + length
        pieces.append((data[position - length:position].decode("utf-8", "replace"), score))
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *(text.replace(" ", "\u2581") for text, _ in pieces[259:]),
    ]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = []
    for _, name in sorted(enumerate(names[259:], 259), key=lambda item: -pieces[item[0]][1]):
        splits = [
            (name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in vocabulary and name[i:] in vocabulary
        ]
        merges += sorted(splits, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    checkpoint, vocabulary, folder = (Path(a) for a in sys.argv[1:])
    read_model(checkpoint).save_pretrained(folder)
    read_tokenizer(vocabulary).save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
