"""Model directories that would have transformers open something else than what was screened, or build without end.

Long because it is a list of directories.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language import save, tokenizer

from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends import sentencepiece
from repquant_fx.frontends.loading import load_model
from repquant_fx.frontends.sentencepiece import check_sentencepiece


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "llama"
    save("llama", folder, with_tokenizer=True)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **changes}))


class Payload:
    """Touches the file RAN in the current directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("RAN"),)


def evil(path: Path) -> None:
    torch.save({"lm_head.weight": Payload()}, path)


# ---- weights: what is screened is what is loaded --------------------------------------------------------------------


def decoy(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    evil(folder / "pytorch_model.bin")


def index_of_a_pickle(folder: Path) -> None:
    weights = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    (folder / "model.safetensors.index.json").write_text(weights)
    decoy(folder)


def index_of_hidden_names(folder: Path) -> None:
    weights = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "other.bin"}})
    (folder / "pytorch_model.bin.index.json").write_text(weights)
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    evil(folder / "other.bin")


def distributed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    evil(folder / "metadata")
    (folder / "metadata").rename(folder / ".metadata")
    (folder / "__0_0.distcp").write_bytes(b"x")


def linked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    os.symlink(folder.parent / "elsewhere", folder / "model.safetensors")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (decoy, "cannot be loaded as plain tensors"),
        (index_of_a_pickle, "do not end in .safetensors"),
        (index_of_hidden_names, "cannot be loaded as plain tensors"),
        (distributed, "no weights"),
        (linked, "leads out of the directory"),
    ],
)
def test_no_other_weights(
    spoil: Any, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(folder)
    with pytest.raises(ModelFileError, match=message):
        load_model(folder)
    assert not (tmp_path / "RAN").exists()


def test_the_cache_of_the_hub_is_made_of_links(sound: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sound.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        os.symlink(f"../../blobs/{number:040x}", snapshot / file.name)
    loaded, mapped = load_model(snapshot), load_model(snapshot, offload_dir=tmp_path / "scratch")
    assert loaded.tokenizer("the fox")["input_ids"] == tokenizer()("the fox")["input_ids"]  # type: ignore[misc]
    assert loaded.module is not None and mapped.module is not None
    first, second = loaded.module.state_dict(), mapped.module.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_links_are_not_copied_beside_the_model(folder: Path, tmp_path: Path) -> None:
    from repquant_fx.frontends.companions import companions

    (tmp_path / "secret").write_text("mine")
    (folder / "readme.txt").write_text("theirs")
    os.symlink(tmp_path / "secret", folder / "notes.txt")
    os.symlink("readme.txt", folder / "inside.txt")
    found = companions(load_model(folder))
    assert "notes.txt" not in found and found["readme.txt"] == found["inside.txt"] == b"theirs"
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= found.keys()


def test_a_link_swapped_in_later_is_not_followed(folder: Path, tmp_path: Path) -> None:
    from repquant_fx.frontends.companions import companions

    loaded = load_model(folder)
    (tmp_path / "secret").write_text("mine")
    (folder / "generation_config.json").unlink()
    os.symlink(tmp_path / "secret", folder / "generation_config.json")
    with pytest.raises(ModelFileError, match=r"generation_config\.json cannot be read"):
        companions(loaded)


# ---- descriptions ---------------------------------------------------------------------------------------------------

KERNELS, OTHERS = "kernels of the hub", "names another file"


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "further configurations"),
        ("config.json", {"transformers_weights": "x.safetensors"}, "names the file of its weights"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "m.M"}}}, "code of its own"),
        ("config.json", {"text_config": {"quantization_config": {"a": 1}}}, "already quantized"),
        ("config.json", {"use_kernels": True}, KERNELS),
        ("config.json", {"_use_kernels": True}, KERNELS),
        ("config.json", {"_attn_implementation": "someone/kernel"}, KERNELS),
        ("config.json", {"vision_config": {"attn_implementation": {"": "someone/kernel:f"}}}, KERNELS),
        ("config.json", {"attribute_map": {"a": "b"}}, "renames the entries"),
        ("config.json", {"to_dict": 1}, "no setting"),
        ("config.json", {"__class__": "x"}, "no setting"),
        ("config.json", {"dtype": "_import_dotted_name"}, "dtype"),
        (
            "config.json",
            {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"checkpoint_path": "/x"}},
            OTHERS,
        ),
        ("config.json", {"model_type": "timm_wrapper", "architecture": "local-dir:/x"}, "names another model"),
        (
            "config.json",
            {
                "model_type": "timm_wrapper",
                "architecture": "resnet18",
                "model_args": {"pretrained_cfg": {"file": "/x"}},
            },
            OTHERS,
        ),
        ("config.json", {"backbone": "/somewhere/else"}, "names another model"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["m.M", None]}}, "code of its own"),
        ("generation_config.json", {"custom_generate": "x"}, "code of its own"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "m.M"}}, "code of its own"),
    ],
    ids=str,
)
def test_entries_that_lead_elsewhere(file: str, changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder / file, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_entries_that_mean_nothing_here_do_no_harm(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{")
    edit(
        folder / "config.json",
        _attn_implementation="flash_attention_2",
        _name_or_path="/their/disk",
        dtype="bfloat16",
        auto_map={},
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_file=str(tmp_path / "other.json"),
        vocab_file=None,
        name_or_path="/their/disk",
        fast_tokenizer_files=["tokenizer.4.0.0.json"],
        model_max_length=10**30,
    )
    (folder / "tokenizer.4.0.0.json").write_text("{}")
    loaded = load_model(folder)
    assert loaded.tokenizer.name_or_path == str(folder)  # type: ignore[union-attr]
    assert loaded.tokenizer("the fox")["input_ids"] == tokenizer()("the fox")["input_ids"]  # type: ignore[misc]


def test_large_descriptions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repquant_fx.frontends import huggingface

    monkeypatch.setattr(huggingface, "_MOST_BYTES", 1000)
    edit(folder / "config.json", filler="x" * 1000)
    with pytest.raises(ModelFileError, match="larger than"):
        load_model(folder)


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt_neo", "attention_types": [[["global", "local"], 10**9]]}, "attention_types"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"] * 1000, 500]] * 50}, "attention_types"),
        ({"vision_config": {"depths": [10**9]}}, "depths"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"something": 10**9}, "something"),
        ({"hidden_size": 10**4000}, "hidden_size of more than 40 digits"),
        ({"x": {"x": 1}, "num_hidden_layers": "9"}, "does not describe"),
        (
            {"model_type": "xlm", "emb_dim": 1 << 16, "max_position_embeddings": 1 << 20, "n_heads": 1, "n_layers": 1},
            "a table of",
        ),
        (
            {"model_type": "gpt2", "n_positions": 10**8, "n_embd": 4, "n_head": 1, "n_layer": 1},
            "too large|belong to another model",
        ),
        ({"hidden_size": 8192, "intermediate_size": 8192, "vocab_size": 2**17}, "belong to another model"),
        ({"model_type": "swin", "window_size": 10**7, "depths": [1], "num_heads": [2], "embed_dim": 8}, "too large"),
    ],
    ids=str,
)
def test_sizes_that_no_model_has(changes: dict[str, Any], message: str, folder: Path) -> None:
    if "model_type" in changes:
        (folder / "config.json").write_text(json.dumps(changes))
    else:
        edit(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert len(str(caught.value)) < 600


def test_nested_descriptions(folder: Path) -> None:
    for depth in (50, 100_000):
        (folder / "config.json").write_text('{"model_type": "llama", "a": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ModelFileError, match=r"nested|not valid JSON"):
            load_model(folder)


@pytest.mark.parametrize(
    "arch",
    [
        "timm:vit_tiny_patch16_224,embed_dim=8192,num_heads=8,depth=2",
        "timm:vit_giant_patch14_224",
        "torchvision:vit_h_14",
    ],
)
def test_weights_that_do_not_fit_are_known_before_memory_is_taken(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    from repquant_fx.frontends import architectures

    monkeypatch.setattr(architectures, "build", lambda _: pytest.fail("it was built"))
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, {"arch": arch}))
    with pytest.raises(ModelFileError, match="do not fit"):
        load_model(path)


# ---- tokenizers -----------------------------------------------------------------------------------------------------

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
WORD = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed", "invert": False}


def charsmap(text: bytes) -> str:
    return base64.b64encode((0).to_bytes(4, "little") + text).decode()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}, "times as long"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{**DOUBLE, "pattern": {"Regex": "(?=e)"}, "content": "e"}] * 30,
                }
            },
            "times as long",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 9000}] * 100}},
            "times as long",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 100_000)}}, "times as long"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 300}}, "more than 200 rules"),
        ({"pre_tokenizer": {**WORD, "pattern": {"Regex": "(x|" * 9000}}}, "letters"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000,
                    "pair": [],
                    "special_tokens": {},
                }
            },
            "repeats a text 2000 times",
        ),
        ({"padding": {"strategy": {"Fixed": 10**12}}}, "length"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 60}}, "times as long"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Sequence", "pretokenizers": [BYTES] * 8}] * 8,
                }
            },
            "times as long",
        ),
        (
            {"model": {"type": "WordPiece", "vocab": {"a": 0}, "continuing_subword_prefix": "#" * 100_000}},
            "rule of 100000 letters",
        ),
        (
            {"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**12}},
            "max_input_chars_per_word",
        ),
    ],
    ids=[
        "doubling",
        "regex",
        "prepend",
        "table",
        "rules",
        "pattern",
        "template",
        "padding",
        "bytes",
        "nested bytes",
        "prefix",
        "words",
    ],
)
def test_tokenizers_that_multiply(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder / "tokenizer.json", **changes)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_a_tokenizer_that_panics(tmp_path: Path) -> None:
    """What its library raises is no Exception."""
    from repquant_fx.calibration.text import Tokenization, encode
    from repquant_fx.errors import CalibrationError
    from repquant_fx.evaluation.text import tokenize

    class PanicException(BaseException):
        pass

    def panics(*_: Any, **__: Any) -> Any:
        raise PanicException("internal error: entered unreachable code")

    (tmp_path / "t.txt").write_text("a\nb")
    with pytest.raises(InputError, match="the tokenizer fails"):
        tokenize(panics, ["a"])
    with pytest.raises(CalibrationError, match="the tokenizer fails"):
        encode(tmp_path / "t.txt", Tokenization(panics, 4, False), 4, 0)


def test_a_tokenizer_is_read_under_the_guard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a directory beside an ONNX file, or of --tokenizer, too."""
    from repquant_fx.frontends.tokenizer import load_tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: os.system("touch ran"))
    with pytest.raises(InputError, match=r"loading the tokenizer of .* it tried to start a process"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["BertTokenizerFast", "T5TokenizerFast"])
def test_honest_rules_pass(kind: str) -> None:
    from repquant_fx.frontends.tokenizer_growth import check_growth

    made = getattr(transformers, kind)()
    check_growth(json.loads(made.backend_tokenizer.to_str()), "tokenizer.json")


def test_slow_tokenizers_still_know_their_files(tmp_path: Path) -> None:
    """The private copy that they were read from is gone."""
    from repquant_fx.frontends.tokenizer import load_tokenizer

    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "a", "b"]))
    edit(tmp_path / "tok" / "tokenizer_config.json", tokenizer_class="EsmTokenizer")
    found = load_tokenizer(tmp_path / "tok")
    found.save_pretrained(tmp_path / "again")
    assert (
        found("a b")["input_ids"] == transformers.AutoTokenizer.from_pretrained(tmp_path / "again")("a b")["input_ids"]
    )


# ---- SentencePiece --------------------------------------------------------------------------------------------------


def field(number: int, content: bytes) -> bytes:
    """A field of a protobuf that has a length."""
    length, head = len(content), bytearray([number << 3 | 2])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes([*head, length]) + content


PIECE = field(1, field(1, "\u2581the".encode()) + b"\x15\x00\x00\x80\xbf" + b"\x18\x01")
TRAINER = field(2, b"\x18\x02" + field(7, b"m"))


def replacing(text: bytes) -> bytes:
    return field(3, field(1, b"nmt_nfkc") + field(2, (4).to_bytes(4, "little") + bytes(4) + text))


@pytest.mark.parametrize(
    "data",
    [
        PIECE * 3 + TRAINER + replacing(b"fi\0ffi\0"),
        b"IQ== 0\nIg== 1\r\nIyMj 2",  # of tiktoken
    ],
)
def test_sound_vocabularies(data: bytes) -> None:
    check_sentencepiece(data, "tokenizer.model")


@pytest.mark.parametrize(
    "data, message",
    [
        (PIECE * 21, "more than 20 pieces"),
        (field(1, b"a" * 10_001), "a piece has 10001 bytes"),
        (PIECE + field(2, bytes(1_000_001)), "field 2 has 1000001 bytes"),
        (PIECE + replacing(b"x" * 1001 + b"\0"), "replaces a letter by 1001"),
        (PIECE + b"\x0a\xff\xff\xff\xff\x0f", "leads beyond its end"),
        (PIECE + b"\x0a" + b"\xff" * 20, "does not end"),
        (PIECE + b"\x0b", "a field of the type 3"),
        (PIECE[:-1], "leads beyond its end|does not end"),
        (TRAINER, "has no pieces"),
        (b"IQ== 0\nIg== 1\nnot a table", "no sound SentencePiece model"),
        (b"", "has no pieces"),
    ],
)
def test_vocabularies_that_no_library_sees(data: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece, "_MOST_PIECES", 20)
    with pytest.raises(InputError, match=message) as caught:
        check_sentencepiece(data, "tokenizer.model")
    assert "\n" not in str(caught.value)


def test_they_are_judged_beside_another_tokenizer_as_well(folder: Path) -> None:
    (folder / "spiece.model").write_bytes(PIECE + b"\x0a\xff")
    with pytest.raises(InputError, match=r"spiece\.model is no sound SentencePiece model"):
        load_model(folder)
    (folder / "spiece.model").write_bytes(PIECE)
    assert load_model(folder).tokenizer is not None
