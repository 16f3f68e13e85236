"""`python mutants.py SEED COUNT`: programs with random changes are loaded and run; each ends well or is refused.

The last line tells how many did which. A crash leaves the number of the mutant as the last line that was printed.
"""

from __future__ import annotations

import collections
import json
import random
import sys
import warnings
from typing import Any

import torch
from attacks import archive_of, records_of
from programs import MODEL, WEIGHTS, as_bytes, nodes, program, saved
from torch import Tensor, nn

from repquant_fx.errors import InputError
from repquant_fx.frontends.capture import capture
from repquant_fx.frontends.exported import load_exported

NUMBERS = (-1 << 40, -7, -1, 0, 1, 2, 3, 5, 64, 1 << 20, 1 << 33, (1 << 62) + 1, 2**63 - 1)
TARGETS = """relu.default add.Tensor max_pool2d_with_indices_backward.default index_put_.default gather.default
    embedding.default native_layer_norm.default native_group_norm.default
    _native_batch_norm_legit_no_training.default batch_norm.default as_strided.default expand.default repeat.default
    full.default arange.start_step cat.default convolution.default conv2d.default linear.default
    upsample_bilinear2d.default grid_sampler_2d.default scaled_dot_product_attention.default slice.Tensor select.int
    view.default permute.default index.Tensor index_select.default scatter.src topk.default roll.default
    im2col.default col2im.default max_pool2d.default avg_pool2d.default pixel_shuffle.default
    reflection_pad2d.default sort.default cumsum.default""".split()


class Mixed(nn.Module):
    """Layers whose kernels read weights, indices and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.groups = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.layer, self.linear, self.table = nn.LayerNorm(4), nn.Linear(4, 4), nn.Embedding(5, 4)
        self.register_buffer("rows", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.groups(self.norm(self.conv(x)).relu()), 2)
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear").flatten(2).transpose(1, 2)
        x = self.layer(x) + self.table(self.rows).repeat(4, 1)
        x = nn.functional.scaled_dot_product_attention(x, x, x)
        return self.linear(x).roll(1, 1).index_select(1, self.rows).softmax(-1)


def honest(count: int) -> list[bytes]:
    """What is changed: operators that take indices, layers as decomposed and, for more than a sample, as exported."""
    torch.manual_seed(0)
    x, indices = torch.randn(2, 2, 4, 4), torch.tensor([[0, 1], [1, 0]])
    sources = [
        program(lambda x, i: x.gather(1, i).cumsum(1) + x[i[0]][:, :2], indices),
        as_bytes(torch.export.export(Mixed().eval(), (x,)).run_decompositions()),
    ]
    return sources if count < 100 else [*sources, saved(Mixed(), x), saved(Mixed(), x, dynamic=True)]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of each number and text in a document."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    found = [(value, key) for key, item in items if isinstance(item, (int, float, str)) and key != "stack_trace"]
    return found + [place for key, item in items if key != "metadata" for place in places(item)]


def mutant(data: bytes, draw: random.Random) -> bytes:
    """The program with one to three changes."""
    records = records_of(data)
    document, weights = json.loads(records[MODEL]), json.loads(records[WEIGHTS])
    graph = document["graph_module"]["graph"]
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(
            ["target", "argument", "argument", "input", "order", "sizes", "weight", "payload", "anything"]
        )
        node = draw.choice(nodes(document))
        if kind == "target":
            node["target"] = f"torch.ops.aten.{draw.choice(TARGETS)}"
        elif kind == "order" and node["inputs"]:
            draw.shuffle(node["inputs"])
        elif kind == "input":
            tensors = [
                place
                for place in places(node["inputs"])
                if place[1] == "name" and place[0].get("name") in graph["tensor_values"]
            ]
            for owner, key in draw.sample(tensors, min(1, len(tensors))):
                owner[key] = draw.choice(list(graph["tensor_values"]))
        elif kind == "payload":
            name = draw.choice([record for record in records if "/weight_" in record])
            content = bytearray(records[name])
            for _ in range(8):
                content[draw.randrange(len(content))] = draw.randrange(256)
            records[name] = bytes(content)
        else:
            where = {"argument": node["inputs"], "sizes": graph["tensor_values"], "weight": weights["config"]}.get(
                kind, document
            )
            owner, key = draw.choice(places(where) or places(graph))
            if type(owner[key]) is int:
                owner[key] = draw.choice(NUMBERS)
            elif type(owner[key]) is float:
                owner[key] = draw.choice([0.0, -1.0, 1e300, 1e-300, "NaN", "Infinity"])
            elif kind == "anything":
                owner[key] = draw.choice(["x", "", "linear", "t0", 3, None, "torch.ops.aten.relu.default"])
    return archive_of({**records, MODEL: json.dumps(document).encode(), WEIGHTS: json.dumps(weights).encode()})


def captured(program: torch.export.ExportedProgram, inputs: tuple[Tensor, ...]) -> str:
    """How the capture of a program that was loaded ends."""
    try:
        capture(program, inputs)
    except InputError as error:
        assert "\n" not in str(error), error
        return "refused"
    return "captured"


def main(seed: int, count: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    draw, sources = random.Random(seed), honest(count)
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(count):
        print(number, flush=True)
        data = mutant(draw.choice(sources), draw) if number else sources[0]
        try:
            program, inputs, _ = load_exported(data, "mutant.pt2")
        except InputError as error:
            assert number, error
            assert "\n" not in str(error), error
            outcomes["refused"] += 1
            continue
        if number % 8 == 0:
            outcomes[captured(program, inputs)] += 1
            continue
        try:
            with torch.no_grad():
                program.module(check_guards=False)(*inputs)
            outcomes["loaded"] += 1
        except Exception:  # a kernel that checks its indices; capture turns it into a refusal
            outcomes["failed"] += 1
    print(f"outcomes {dict(outcomes)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
