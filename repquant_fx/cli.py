"""The command line: `repquant-fx compile` and `repquant-fx evaluate`.

Exit codes: 0 done, 1 internal error, 2 bad input, 3 the exported file disagrees with the reference, 130 interrupted.
Messages go to stderr; `--json` prints one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from repquant_fx.errors import InputError, RecipeError, RepQuantError, RepQuantWarning
from repquant_fx.version import VERSION

SOURCES = "a file (.pt2, .pt, .safetensors), a transformers directory, hf:OWNER/NAME, or timm:NAME[,key=value...][,pretrained]"
TASKS = "of a transformers model: image-classification, text-classification, masked-lm, causal-lm, feature-extraction, " \
    "zero-shot-image-classification, image-segmentation, object-detection or mask-generation (deduced by default)"


class Parser(argparse.ArgumentParser):
    """Reports wrong options like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        options = parser().parse_args(arguments)
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", RepQuantWarning)
                warnings.showwarning = _show_warning
            return int(options.run(options))
    except RepQuantError as error:
        if debug:
            traceback.print_exc()
        print(f"repquant-fx: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("repquant-fx: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"repquant-fx: internal error: {type(error).__name__}: {error}\n"
              "This is a bug; please report it with the output of the same command and --debug.", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = Parser(prog="repquant-fx", description="Post-training quantization of transformers: torch.fx in, ONNX QDQ out.")
    top.add_argument("--version", action="version", version=f"repquant-fx {VERSION}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    _add_compile(commands.add_parser("compile", help="quantize a model and write it as ONNX"))
    _add_evaluate(commands.add_parser("evaluate", help="accuracy, perplexity, similarity or zero-shot accuracy of a model or an exported file"))
    return top


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=SOURCES)
    command.add_argument("--arch", help="architecture of a state dict, e.g. timm:vit_small_patch16_224,num_classes=10")
    command.add_argument("--allow-pickle", action="store_true", help="load files that execute code; only for files you trust")
    command.add_argument("--seed", type=int, default=0, help="chooses samples and every random number (default 0)")
    command.add_argument("--debug", action="store_true", help="show tracebacks and warnings of libraries")
    command.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")


def _add_compile(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_compile)
    _add_source(command)
    command.add_argument("--out", required=True, type=Path, help="the ONNX file to write")
    command.add_argument("--force", action="store_true", help="replace existing output files")
    command.add_argument("--report", type=Path, help="write a JSON report, layer by layer")
    command.add_argument("--input-shape", metavar="C,H,W", help="shape of one input without the batch, where the model does not tell")
    command.add_argument("--task", help=TASKS)
    data = command.add_argument_group("calibration")
    data.add_argument("--calib", help="image folder, .npy/.npz/.pt/.safetensors tensors, .txt/.jsonl text, or module:callable")
    data.add_argument("--calib-samples", type=int, help="default 1024, of text 128; fewer if there are fewer")
    data.add_argument("--seq-len", type=int, help="tokens of a calibration sequence (default 128, fewer if the model takes fewer)")
    data.add_argument("--tokenizer", metavar="DIR", help="directory of a transformers tokenizer, where the model brings none")
    data.add_argument("--batch-size", type=int, default=32, help="default 32")
    from repquant_fx.recipe import CHOICES, PRESETS

    method = command.add_argument_group("quantization (overrides the recipe)")
    method.add_argument("--recipe", type=Path, help="YAML or TOML file")
    method.add_argument("--preset", choices=tuple(PRESETS), help="start from a published method (default repquant)")
    method.add_argument("--wbits", type=int, help="bits of weights, 2 to 8 (default 8)")
    method.add_argument("--abits", type=int, help="bits of activations, 2 to 8 (default 8)")
    method.add_argument("--input-bits", type=int, help="bits of the model's input (default 8)")

    words = {"norm": "scales of norm activations", "softmax": "grid of softmax activations", "softmax_scale": "how its scale is chosen",
             "clipping": "per-channel dual clipping of norm activations", "activations": "range of all other activations",
             "weights": "range of weights"}
    for name, choices in CHOICES.items():
        method.add_argument(f"--{name.replace('_', '-')}", choices=choices, help=f"{words[name]} (default {choices[0]})")
    method.add_argument("--percentile", type=float, help="for --activations percentile (default 99.99)")
    method.add_argument("--correction", action=argparse.BooleanOptionalAction, default=None,
                        help="least-squares correction towards the float model's outputs (default on)")
    method.add_argument("--absorb", type=_kinds, metavar="KIND,...", help="where else channel scales move into constants: values, query_key, "
                        "linear, or none (default: values,linear)")
    method.add_argument("--gptq", action=argparse.BooleanOptionalAction, default=None, help="error-compensating weight rounding (default on)")
    method.add_argument("--gptq-damping", type=float, help="share of the mean diagonal added to the Hessian (default 0.01)")
    method.add_argument("--gptq-block", type=int, help="columns updated at once (default 128)")
    method.add_argument("--gptq-activation-order", action=argparse.BooleanOptionalAction, default=None,
                        help="sweep columns by decreasing input energy (default on)")
    command.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                         help="compare ONNX Runtime with the FX reference (default on)")


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_evaluate)
    _add_source(command)
    command.add_argument("--data", required=True, help="class folders of images, a text, or sentence pairs (.csv, .tsv, .jsonl)")
    command.add_argument("--metric", choices=("accuracy", "perplexity", "similarity", "zero-shot"), help="deduced from the data by default")
    command.add_argument("--batch-size", type=int, help="default 64; of windows of text 1")
    command.add_argument("--limit", type=int, help="evaluate a random subset of this size; of a text, the first windows")
    command.add_argument("--threads", type=int, help="threads of the runtime")
    text = command.add_argument_group("text")
    text.add_argument("--tokenizer", metavar="DIR", help="directory of a transformers tokenizer (default: beside the model)")
    text.add_argument("--seq-len", type=int, help="tokens of a window, of a sentence or of a prompt (default: as long as the model takes, "
                      "at most 2048)")
    text.add_argument("--stride", type=int, help="tokens from one window to the next (default: half a window)")
    text.add_argument("--separator", metavar="TEXT", help="what stands between the documents of a text, such as '<|endoftext|>'")
    text.add_argument("--prompts", metavar="FILE|TEMPLATE", help="for zero-shot: JSON {class folder: [prompt, ...]}, or 'a photo of a {}'")


def recipe_from(options: argparse.Namespace) -> Any:
    """The recipe file or preset, with the switches given on the command line on top.

    Raises:
        RecipeError: invalid values, or both a recipe and a preset.
    """
    from dataclasses import fields, replace

    from repquant_fx.recipe import PRESETS, Recipe

    given = {f.name: getattr(options, f.name) for f in fields(Recipe) if getattr(options, f.name, None) is not None}
    if options.recipe is not None:
        if options.preset is not None:
            raise RecipeError("give --recipe or --preset, not both")
        return replace(Recipe.from_file(options.recipe), **given)
    bits = {name: given.pop(name, 8) for name in ("wbits", "abits")}
    preset: Any = PRESETS[options.preset or "repquant"]
    return preset(**bits, **given)


def run_compile(options: argparse.Namespace) -> int:
    recipe = recipe_from(options)  # cheap checks first: nothing is loaded for a wrong option or an output that cannot be written
    shape = _shape(options.input_shape)
    from repquant_fx.files import check_writable

    check_writable(options.out, options.force)
    if options.report is not None:
        check_writable(options.report, options.force)
        if options.report.resolve() == options.out.resolve():
            raise InputError("--out and --report name the same file")
    from repquant_fx import report
    from repquant_fx.compiler import compile

    compiled = compile(options.model, recipe, calibration=options.calib, samples=options.calib_samples, batch_size=options.batch_size,
                       seed=options.seed, arch=options.arch, input_shape=shape, allow_pickle=options.allow_pickle, check=options.check,
                       task=options.task, seq_len=options.seq_len, tokenizer=options.tokenizer)
    compiled.save(options.out, force=options.force, report=options.report)
    print(report.summary(compiled.report), file=sys.stderr)
    print(f"wrote {options.out} ({compiled.report['file_bytes'] / 1e6:.2f} MB)", file=sys.stderr)
    if options.json:
        print(json.dumps({"out": str(options.out), **compiled.report}))
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from repquant_fx.evaluation import evaluate

    result = evaluate(options.model, options.data, metric=options.metric, arch=options.arch, allow_pickle=options.allow_pickle,
                      batch_size=options.batch_size, limit=options.limit, threads=options.threads, seed=options.seed,
                      tokenizer=options.tokenizer, seq_len=options.seq_len, stride=options.stride, separator=options.separator,
                      prompts=options.prompts)
    print(json.dumps({"model": options.model, **asdict(result)}) if options.json else result)
    return 0


def _kinds(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


def _shape(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        sizes = [int(part) for part in text.lower().replace("x", ",").split(",")]
    except ValueError:
        sizes = []
    if not sizes or any(s < 1 for s in sizes):
        raise InputError(f"--input-shape takes positive sizes such as 3,224,224; found {text!r}")
    return sizes


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"repquant-fx: warning: {message}", file=sys.stderr)
