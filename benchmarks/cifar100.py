"""CIFAR-100 as class folders of images, from the binary archive that its authors publish.

    python benchmarks/cifar100.py cifar-100-binary.tar.gz --out cifar100/
    repquant-fx evaluate path/to/clip --data cifar100/ --prompts 'a photo of a {}'
"""

from __future__ import annotations

import argparse
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, CLASSES = 32, 100
RECORD = 2 + 3 * SIDE * SIDE  # the coarse class, the fine one, then the pixels of each colour
NAME = re.compile(r"[a-z_]+")


def unpack(archive: Path, split: str, out: Path) -> int:
    """Write `out/CLASS/NUMBER.png` for each image of a split (train or test); returns how many.

    Raises:
        SystemExit: the archive is another one, or damaged.
    """
    with tarfile.open(archive) as tar:
        names = _read(tar, "fine_label_names.txt").decode("ascii").split()
        data = np.frombuffer(_read(tar, f"{split}.bin"), dtype=np.uint8)
    if len(names) != CLASSES or not all(map(NAME.fullmatch, names)) or data.size % RECORD:
        raise SystemExit(f"{archive} is not the binary version of CIFAR-100")
    records = data.reshape(-1, RECORD)
    if len(records) and int(records[:, 1].max()) >= CLASSES:
        raise SystemExit(f"{archive} is damaged: a class beyond {CLASSES - 1}")
    for name in names:
        (out / name).mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        pixels = record[2:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(out / names[record[1]] / f"{number:05}.png")
    return len(records)


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    member = next((each for each in tar.getmembers() if each.isfile() and Path(each.name).name == name), None)
    file = tar.extractfile(member) if member is not None else None
    if file is None:
        raise SystemExit(f"{tar.name} has no {name}: give cifar-100-binary.tar.gz")
    return file.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="cifar-100-binary.tar.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the class folders")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    options = parser.parse_args()
    print(f"{unpack(options.archive, options.split, options.out)} images in {options.out}")


if __name__ == "__main__":
    main()
