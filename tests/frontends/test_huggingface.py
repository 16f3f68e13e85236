"""transformers models: directories, tasks, what a model takes and gives, image processors, and the whole way to ONNX.

Long because all of it needs the same small models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from language import LENGTH, MODELS, VOCABULARY, make, save, tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from repquant_fx import Recipe, compile
from repquant_fx.errors import InputError, ModelFileError, RepQuantWarning
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.frontends.memory import from_memory
from repquant_fx.frontends.processor import load_preprocessing
from repquant_fx.frontends.tasks import TASKS, task_of

FAST = Recipe(
    gptq=False, correction=False, clipping="none", activations="minmax", weights="minmax", softmax_scale="percentile"
)
TASK = {
    "opt": "causal-lm",
    "llama": "causal-lm",
    "bert": "text-classification",
    "clip": "zero-shot-image-classification",
    "vit": "image-classification",
    "sam": "mask-generation",
}
NAMES = {
    "opt": ("input_ids", "attention_mask"),
    "llama": ("input_ids", "attention_mask"),
    "bert": ("input_ids", "attention_mask"),
    "clip": ("input_ids", "attention_mask", "pixel_values"),
    "vit": ("pixel_values",),
    "sam": ("pixel_values", "input_points"),
}
SEQUENCE = {0: "batch", 1: "sequence"}


def run(loaded: LoadedModel) -> Any:
    assert loaded.module is not None and loaded.input_names is not None
    with torch.no_grad():
        return loaded.module(**dict(zip(loaded.input_names, loaded.example_inputs)))


def edit(folder: Path, **changes: Any) -> Path:
    """Change `config.json`; None removes."""
    path = folder / "config.json"
    config = {key: value for key, value in {**json.loads(path.read_text()), **changes}.items() if value is not None}
    path.write_text(json.dumps(config))
    return folder


def rename(folder: Path, *, drop: str = "", add: dict[str, Tensor] | None = None) -> Path:
    """Take weights out of, or put weights into, `model.safetensors`."""
    weights = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if not drop or drop not in name
    }
    save_file({**weights, **(add or {})}, folder / "model.safetensors", {"format": "pt"})
    return folder


# ---- what a model takes and gives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_gives_the_model_that_was_saved(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.task == TASK[name] and loaded.input_names == NAMES[name] and type(loaded.module) is type(model)
    with torch.no_grad():
        expected = model(**dict(zip(NAMES[name], loaded.example_inputs)))
    found = run(loaded)
    assert loaded.outputs
    for output in loaded.outputs:
        assert torch.allclose(found[output], expected[output], rtol=0, atol=1e-5), output
    assert loaded.tokenizer is None


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_is_described_like_its_directory_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    before = model.config.to_dict()
    stored, held = load_model(tmp_path), from_memory(model)
    for field in ("input_names", "dynamic_axes", "outputs", "task", "float_modules"):
        assert getattr(stored, field) == getattr(held, field)
    assert all(torch.equal(a, b) for a, b in zip(stored.example_inputs, held.example_inputs))
    assert model.config.to_dict() == before
    assert held.module is not None and held.module is not model
    # no second copy of the weights
    assert {t.data_ptr() for t in held.module.parameters()} == {t.data_ptr() for t in model.parameters()}


def test_examples_of_text_are_in_the_vocabulary_padded_and_no_longer_than_the_model_takes() -> None:
    loaded = from_memory(make("opt"))
    ids, mask = loaded.example_inputs
    assert ids.shape == mask.shape == (2, LENGTH) and ids.dtype == mask.dtype == torch.int64
    assert 0 <= int(ids.min()) and int(ids.max()) < VOCABULARY and 0 < int(mask.sum()) < mask.numel()
    assert loaded.dynamic_axes == (SEQUENCE, SEQUENCE) and loaded.outputs == ("logits",)
    assert from_memory(make("opt"), input_shape=(9,)).example_inputs[0].shape == (2, 9)


def test_a_table_of_positions_that_counts_from_behind_its_padding_takes_fewer_tokens() -> None:
    config = transformers.RobertaConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=20,
    )
    assert from_memory(transformers.RobertaForMaskedLM(config).eval()).example_inputs[0].shape == (2, 18)


def test_outputs_by_task_have_no_cache_among_them() -> None:
    model = make("llama")
    assert model.config.use_cache is True
    assert set(run(from_memory(model))) == {"logits"} and "past_key_values" in model(
        torch.zeros(1, 3, dtype=torch.int64)
    )


def test_texts_and_images_of_two_towers_are_counted_apart() -> None:
    loaded = from_memory(make("clip"))
    texts, _, images = loaded.example_inputs
    assert len(texts) != len(images) and loaded.dynamic_axes is not None
    assert [axes[0] for axes in loaded.dynamic_axes] == ["text_batch", "text_batch", "batch"]
    assert loaded.outputs == ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")


@pytest.mark.slow
def test_only_the_image_encoder_of_a_promptable_model_is_quantized() -> None:
    model = make("sam")
    globs = from_memory(model).float_modules
    assert {glob for glob in globs if not glob.endswith(".*")} == {name for name, _ in model.named_children()} - {
        "vision_encoder"
    }
    # the user's rules come later and win
    rule = {"layers": [{"match": "mask_decoder.iou_prediction_head.*", "skip": False}]}
    report = compile(
        model, recipe=Recipe.from_dict({**FAST.to_dict(), **rule}), samples=8, batch_size=4, check=False
    ).report
    paths = [layer["path"] for layer in report["layers"]]
    assert {path.split(".")[0] for path in paths} == {"vision_encoder", "mask_decoder"}
    assert all(
        path.startswith("mask_decoder.iou_prediction_head") for path in paths if not path.startswith("vision_encoder")
    )


def test_input_shape_and_inputs_by_name() -> None:
    assert [len(t.shape) for t in from_memory(make("clip"), input_shape=(7,)).example_inputs] == [2, 2, 4]
    with pytest.raises(InputError, match="input_ids, attention_mask"):
        from_memory(make("opt"), input_shape=(3, 8, 8))
    with pytest.raises(InputError, match="does not run on pixel_values"):
        from_memory(make("vit"), input_shape=(3, 9, 9))
    ids = torch.arange(10).reshape(2, 5)
    loaded = from_memory(make("llama"), example_inputs={"input_ids": ids})
    assert (
        loaded.input_names == ("input_ids",)
        and loaded.dynamic_axes == (SEQUENCE,)
        and torch.equal(loaded.example_inputs[0], ids)
    )


def test_a_model_of_sound_is_told_what_to_do() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,),
        conv_stride=(2,),
        conv_kernel=(2,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    with pytest.raises(InputError, match=r"takes input_values.*\.pt2"):
        from_memory(transformers.Wav2Vec2Model(config).eval())


# ---- directories -----------------------------------------------------------------------------------------------------


def test_tasks_are_deduced_from_the_class() -> None:
    assert [task_of(type(make(name)).__name__) for name in TASK] == list(TASK.values())
    assert task_of("BertModel") == task_of("NoSuchModel") == "feature-extraction"


def test_sharded_half_precision_and_pickled_weights(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ids = torch.arange(8).reshape(2, 4)
    sharded = load_model(tmp_path / "sharded").module
    assert sharded is not None and torch.equal(sharded(ids).logits, model(ids).logits)
    make("llama").half().save_pretrained(tmp_path / "half")  # type: ignore[operator]
    half = load_model(tmp_path / "half").module
    assert half is not None and {p.dtype for p in half.parameters()} == {torch.float32}
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    pickled = load_model(tmp_path / "pickled").module
    assert pickled is not None and torch.equal(pickled(ids).logits, model(ids).logits)


def test_pickled_weights_execute_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    make("llama").config.save_pretrained(tmp_path / "m")
    torch.save({"lm_head.weight": Payload()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def test_a_task_chooses_the_class(tmp_path: Path) -> None:
    save("llama", tmp_path)
    with pytest.warns(RepQuantWarning, match=r"leaves out 1 weights.*lm_head\.weight"):
        loaded = load_model(tmp_path, task="feature-extraction")
    assert type(loaded.module).__name__ == "LlamaModel" and loaded.outputs == ("last_hidden_state",)


def test_a_trunk_without_the_pooler_it_was_never_trained_with(tmp_path: Path) -> None:
    save("vit", tmp_path)
    with pytest.warns(RepQuantWarning, match="classifier"):
        loaded = load_model(tmp_path, task="feature-extraction")
    assert loaded.outputs == ("last_hidden_state",) and not any(
        "pooler" in name for name, _ in loaded.module.named_parameters()
    )


def test_a_configuration_without_architectures_gives_features(tmp_path: Path) -> None:
    make("bert").bert.save_pretrained(tmp_path)  # type: ignore[operator,union-attr]
    loaded = load_model(edit(tmp_path, architectures=None))
    assert loaded.task == "feature-extraction" and loaded.outputs == ("last_hidden_state", "pooler_output")


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    save("opt", tmp_path, with_tokenizer=True)
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.tokenizer("the fox")["input_ids"] == tokenizer()("the fox")["input_ids"]  # type: ignore[misc]


@pytest.mark.parametrize(
    "name, task, words",
    [
        ("llama", "translation", ["no task 'translation'", *TASKS]),
        ("vit", "causal-lm", ["cannot do causal-lm", "image-classification"]),
        ("llama", "text-classification", ["lacks 1 weights", "score.weight", "choose the task"]),
        ("bert", "masked-lm", ["cls.predictions", "choose the task"]),
    ],
)
def test_tasks_that_a_model_cannot_do(name: str, task: str, words: list[str], tmp_path: Path) -> None:
    save(name, tmp_path)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path, task=task)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda d: edit(d, auto_map={"AutoModel": "modeling_x.X"}), ["code of its own", "modeling_x.X"]),
        (lambda d: edit(d, model_type="no_such_model"), ["does not describe a model", "no_such_model"]),
        (lambda d: edit(d, quantization_config={"quant_method": "gptq"}), ["already quantized"]),
        (lambda d: edit(d, num_hidden_layers=2), ["lacks", "layers.1."]),
        (lambda d: edit(d, hidden_size=8), ["cannot be loaded"]),
        (lambda d: (d / "config.json").write_text("{"), ["not valid JSON"]),
        (lambda d: (d / "config.json").write_text("[]"), ["object"]),
        (lambda d: (d / "config.json").unlink(), ["without config.json"]),
        (lambda d: (d / "model.safetensors").unlink(), ["no weights"]),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), ["cannot be loaded"]),
        (lambda d: rename(d, drop="lm_head"), ["lm_head.weight"]),
        (lambda d: rename(d, add={"model.layers.1.mlp.up_proj.weight": torch.zeros(2)}), ["no place for", "layers.1"]),
        (
            lambda d: rename(d, add={"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}),
            ["no place for", "q_proj.bias"],
        ),
        (
            lambda d: rename(d, drop="lm_head", add={"lm_head.weight": torch.full((VOCABULARY, 16), torch.nan)}),
            ["NaN", "lm_head.weight"],
        ),
        (lambda d: (d / "tokenizer.json").write_text("{"), ["tokenizer", "cannot be read"]),
    ],
)
def test_directories_that_are_refused(spoil: Any, words: list[str], tmp_path: Path) -> None:
    save("llama", tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert all(word in str(caught.value) for word in [*words, str(tmp_path)]), str(caught.value)


def test_a_head_that_the_class_does_not_have_is_left_out_with_a_warning(tmp_path: Path) -> None:
    save("llama", tmp_path)
    with pytest.warns(RepQuantWarning, match=r"extra_head\.weight"):
        load_model(rename(tmp_path, add={"extra_head.weight": torch.zeros(2)}))


def test_a_hub_id_is_downloaded_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    save("llama", tmp_path)
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"][-1]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("hf:someone/model@v1").task == "causal-lm" and load_model(f"hf:{tmp_path}").task == "causal-lm"
    assert asked == [("someone/model", "v1", "*.safetensors")]
    with pytest.raises(ModelFileError, match="does not exist"):
        load_model("someone/model")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelFileError, match="can be downloaded"):
        load_model("hf:nobody/no-such-model")


# ---- image processors ------------------------------------------------------------------------------------------------


def processed(folder: Path, image: Any) -> Tensor:
    tensor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)(image, return_tensors="pt")[
        "pixel_values"
    ]
    return tensor[0] if isinstance(tensor, Tensor) else torch.as_tensor(np.asarray(tensor[0]))


@pytest.mark.parametrize(
    "kind, settings",
    [
        (
            "ViTImageProcessor",
            {
                "size": {"height": 16, "width": 16},
                "resample": 3,
                "image_mean": [0.2, 0.3, 0.4],
                "image_std": [0.5, 0.6, 0.7],
            },
        ),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "do_normalize": False}),
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "rescale_factor": 1 / 127.5}),
    ],
)
def test_image_folders_are_prepared_as_the_processor_does(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    from repquant_fx.calibration.images import ImageReader

    save("vit", tmp_path)
    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    x, y = np.meshgrid(np.arange(40), np.arange(40))
    image = Image.fromarray(np.stack([3 * x + y, 2 * x + 4 * y, 5 * x], -1).astype(np.uint8) // 2)
    image.save(tmp_path / "x.png")
    preprocessing = load_model(tmp_path).preprocessing
    assert (
        preprocessing is not None
        and preprocessing["input_size"] == [3, 16, 16]
        and json.loads(json.dumps(preprocessing)) == preprocessing
    )
    ours, theirs = ImageReader(preprocessing, (3, 16, 16))(tmp_path / "x.png"), processed(tmp_path, image)
    assert isinstance(ours, Tensor) and ours.shape == theirs.shape
    # their filters round differently
    assert float((ours - theirs).abs().max()) < 0.05 * float(theirs.max() - theirs.min())


def test_a_processor_that_leads_to_no_one_size_says_so(tmp_path: Path) -> None:
    save("sam", tmp_path)
    transformers.SamImageProcessor(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    with pytest.warns(RepQuantWarning, match="32x32 as a whole"):
        found = load_model(tmp_path).preprocessing
    assert (
        found is not None
        and found["input_size"] == [3, 32, 32]
        and found["crop_mode"] == "squash"
        and found["mean"][0] == pytest.approx(0.485)
    )


def test_a_processor_that_cannot_be_read_is_no_obstacle(tmp_path: Path) -> None:
    save("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.warns(RepQuantWarning, match="cannot be read"):
        assert load_model(tmp_path).preprocessing is not None
    assert load_preprocessing(tmp_path / "nowhere", None) is None


# ---- the whole way ---------------------------------------------------------------------------------------------------


def drawn(loaded: LoadedModel, *, texts: int, length: int, images: int) -> dict[str, Tensor]:
    """Inputs of one kind, whatever their number: what calibrates a model is what it is tried on."""
    assert loaded.input_names is not None
    seeded = torch.Generator().manual_seed(length)
    ids = torch.randint(0, VOCABULARY, (texts, length), generator=seeded)
    sides = dict(zip(loaded.input_names, (tensor.shape[1:] for tensor in loaded.example_inputs)))
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(images, *sides.get("pixel_values", ()), generator=seeded),
        "input_points": torch.rand(images, 1, 2, 2, generator=seeded) * 32,
    }
    return {name: made[name] for name in loaded.input_names}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("llama", "bert") else pytest.mark.slow) for name in MODELS])
def test_models_in_memory_become_files_that_take_any_size(name: str) -> None:
    model = make(name)
    loaded = from_memory(model)
    assert loaded.module is not None
    compiled = compile(model, [drawn(loaded, texts=24, length=LENGTH, images=24)], recipe=FAST, batch_size=8,
                       with_past=False)
    assert name != "sam" or {layer["path"].split(".")[0] for layer in compiled.report["layers"]} == {"vision_encoder"}
    session = compiled.session()
    assert tuple(i.name for i in session.get_inputs()) == loaded.input_names == NAMES[name]
    assert loaded.outputs == tuple(o.name for o in session.get_outputs())
    for texts, length, images in ((1, 7, 1), (3, 20, 5)):
        feed = drawn(loaded, texts=texts, length=length, images=images)
        found = session.run(None, {key: value.numpy() for key, value in feed.items()})
        with torch.no_grad():
            expected = loaded.module(**feed)
        for output, value in zip(loaded.outputs, found):
            assert value.shape == tuple(expected[output].shape)
            assert float((torch.from_numpy(value) - expected[output]).norm() / expected[output].norm()) < 0.25, output
    assert compiled.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param in ("batch", "text_batch")
