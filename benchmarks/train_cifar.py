"""Train small timm vision transformers on CIFAR-10 at 32 px, from scratch.

    python benchmarks/train_cifar.py vit  --data train_folder --test test_folder --out
    benchmarks/weights/vit_cifar10.safetensors python benchmarks/train_cifar.py swin --data train_folder --test
    test_folder --out benchmarks/weights/swin_cifar10.safetensors

``--data`` and ``--test`` are class folders of images (torchvision ``ImageFolder`` layout). The last line printed is the
accuracy on the whole test folder. The weights are an exponential moving average, saved after every epoch with the
architecture specification and the accuracy in the safetensors metadata, so that an interrupted run is still usable.

Recipe: AdamW for embeddings, norms and biases, Muon (orthogonalised momentum; K. Jordan, 2024) for the hidden matrices,
one-cycle learning rate, flips, translations, a cutout square, label smoothing and bfloat16 autocast. The schedule
follows whichever runs out first, ``--epochs`` or ``--minutes``: a slow CPU then still ends at learning rate zero.
"""
from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from repquant_fx.frontends import architectures

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# written into the specification, so that calibration and `evaluate` preprocess as training did: no resizing, no
# cropping
OVERLAY = f"pretrained_cfg_overlay={{'input_size':(3,32,32),'crop_pct':1.0,'mean':{MEAN},'std':{STD}}}"
ARCHITECTURES = {
    "vit": "timm:vit_tiny_patch16_224,img_size=32,patch_size=4,embed_dim=128,depth=6,num_heads=4,mlp_ratio=2,"
           "num_classes=10,class_token=False,global_pool='avg'," + OVERLAY,
    "swin": "timm:swin_tiny_patch4_window7_224,img_size=32,patch_size=2,window_size=4,embed_dim=64,depths=(2,4),"
            "num_heads=(2,4),mlp_ratio=2,num_classes=10," + OVERLAY,
}


def build(spec: str) -> nn.Module:
    return architectures.build(architectures.parse_architecture(spec))


def load_folder(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as uint8 (N, 3, 32, 32) and labels (N,), read once and kept in memory."""
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(folder))
    images = np.stack([np.asarray(data.loader(path).convert("RGB")) for path, _ in data.samples])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def normalize(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: torch.Tensor, generator: torch.Generator, pad: int = 4, hole: int = 8) -> torch.Tensor:
    """Random flip, translation by up to `pad` pixels and one square of `hole` pixels set to the mean, per image."""
    n, _, h, w = images.shape
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    dy, dx = (torch.randint(0, 2 * pad + 1, (n,), generator=generator).to(images.device) for _ in range(2))
    flip = (torch.rand(n, generator=generator) < 0.5).to(images.device)
    rows = dy[:, None] + torch.arange(h, device=images.device)
    cols = torch.arange(w, device=images.device).expand(n, w)
    cols = torch.where(flip[:, None], w - 1 - cols, cols) + dx[:, None]
    out = padded[torch.arange(n, device=images.device)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(
        0, 3, 1, 2
    )
    cy, cx = (torch.randint(0, h, (n,), generator=generator).to(images.device) for _ in range(2))
    inside = [(torch.arange(h, device=images.device)[None] - c[:, None]).abs() <= hole // 2 for c in (cy, cx)]
    return out.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def cutmix(
    images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One rectangle of another image of the batch, targets mixed by area (S. Yun et al., arXiv 1905.04899)."""
    n, _, h, w = images.shape
    other = torch.randperm(n, generator=generator).to(images.device)
    area = float(torch.rand((), generator=generator))
    hh, ww = int(h * area ** 0.5), int(w * area ** 0.5)
    top, left = (int(torch.randint(0, room + 1, (), generator=generator)) for room in (h - hh, w - ww))
    mixed = images.clone()
    mixed[:, :, top:top + hh, left:left + ww] = images[other, :, top:top + hh, left:left + ww]
    share = hh * ww / (h * w)
    return mixed, (1 - share) * targets + share * targets[other]


def mimetic_init(model: nn.Module, generator: torch.Generator) -> None:
    """Give attention the structure that trained transformers show (A. Trockman, J. Z. Kolter, arXiv 2305.09828):
    Wq Wk^T close to the identity, Wv Wproj close to minus the identity."""
    for module in model.modules():
        qkv, proj, heads = (
            getattr(module, "qkv", None),
            getattr(module, "proj", None),
            getattr(module, "num_heads", None),
        )
        if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)):
            continue
        dim = proj.in_features
        head = dim // heads

        def noise(dim: int = dim) -> torch.Tensor:
            return torch.randn(dim, dim, generator=generator) / math.sqrt(dim)

        with torch.no_grad():
            for h in range(heads):
                u, s, v = torch.linalg.svd(0.7 * noise() + 0.7 * torch.eye(dim))
                rows = slice(h * head, (h + 1) * head)
                qkv.weight[:dim][rows] = (u[:, :head] * s[:head].sqrt()).T
                qkv.weight[dim:2 * dim][rows] = s[:head].sqrt()[:, None] * v[:head]
            u, s, v = torch.linalg.svd(0.4 * noise() - 0.4 * torch.eye(dim))
            qkv.weight[2 * dim:] = s.sqrt()[:, None] * v
            proj.weight.copy_(u * s.sqrt())


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix, found by five Newton-Schulz steps."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(buffer, group["momentum"])
                g = g / (g.norm() + 1e-7)
                tall = g.shape[0] > g.shape[1]
                g = g.T if tall else g
                for _ in range(5):
                    gram = g @ g.T
                    g = 3.4445 * g + (-4.7750 * gram + 2.0315 * gram @ gram) @ g
                g = g.T if tall else g
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(g, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int = 500) -> float:
    model.eval()
    device = next(model.parameters()).device
    hits = 0
    for x, y in zip(images.split(batch), labels.split(batch)):
        hits += int((model(normalize(x.to(device))).argmax(1).cpu() == y).sum())
    return 100 * hits / len(labels)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(ARCHITECTURES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--init", type=Path, help="weights to go on from (a second cycle, with a smaller learning rate)"
    )
    parser.add_argument("--cutmix", type=float, default=0.0, help="share of the steps that use CutMix")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def optimizers_of(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers, AdamW for the rest."""
    hidden = [p for n, p in model.named_parameters()
              if p.ndim == 2 and p.requires_grad and not any(k in n for k in ("head", "embed", "table"))]
    others = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return [torch.optim.AdamW(others, lr=args.lr, weight_decay=args.weight_decay),
            Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay)]


def main() -> None:
    """Long because it is one loop of training."""
    args = options()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = load_folder(args.data)
    test_images, test_labels = load_folder(args.test)

    model = build(ARCHITECTURES[args.model])
    if args.init:
        model.load_state_dict(load_file(str(args.init)))
    else:
        mimetic_init(model, generator)
    model.to(device)
    optimizers = optimizers_of(model, args)
    peak = [args.lr, args.muon_lr]
    ema = copy.deepcopy(model)
    forward = torch.compile(model) if args.compile else model

    steps = len(images) // args.batch_size
    start, step, progress, epoch = time.time(), 0, 0.0, 0
    while progress < 1:
        model.train()
        order, total = torch.randperm(len(images), generator=generator), 0.0
        for index in order[:steps * args.batch_size].split(args.batch_size):
            progress = max(step / (args.epochs * steps), (time.time() - start) / (60 * args.minutes))
            if progress >= 1:
                break
            factor = min(progress / 0.05, (1 - progress) / 0.95)
            for optimizer, lr in zip(optimizers, peak):
                optimizer.param_groups[0]["lr"] = lr * max(factor, 1e-3)
            x, y = augment(normalize(images[index].to(device)), generator), labels[index].to(device)
            targets = F.one_hot(y, 10).float()
            if float(torch.rand((), generator=generator)) < args.cutmix:
                x, targets = cutmix(x, targets, generator)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = forward(x)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.1 * (1 - progress))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                decay = min(0.998, (step + 1) / (step + 10))
                for a, b in zip(ema.parameters(), model.parameters()):
                    a.lerp_(b, 1 - decay)
            total += float(loss.detach())
            step += 1
        epoch += 1
        final = progress >= 1
        shown = slice(None) if final else slice(0, None, 5)
        score = accuracy(ema, test_images[shown], test_labels[shown])
        print(
            f"epoch {epoch} progress {progress:.3f} loss {total / steps:.4f} "
            f"{'test' if final else 'one fifth of the test'} accuracy {score:.2f} {time.time() - start:.0f} s",
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in ema.state_dict().items()}, str(args.out),
                  metadata={"arch": ARCHITECTURES[args.model], "accuracy": f"{score:.2f}", "data": "CIFAR-10 train"})


if __name__ == "__main__":
    main()
