"""Whatever the metadata of a file or a report says: it is shown, or refused with one line that names the field."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from compiled import PLAIN, compiled, inputs
from helpers import vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repquant_fx import Recipe, compile
from repquant_fx.calibration.images import ImageReader, image_size
from repquant_fx.cli import main
from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.evaluation import preprocessing_from_onnx
from repquant_fx.html.stored import read_report
from repquant_fx.security.schema import DEEPEST, Misfit, parse

DEEP = "[" * 100_000 + "]" * 100_000


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command; the law holds for both."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments), "--quiet"])
    lines = err.getvalue().removesuffix("\n").split("\n")
    assert (code, lines) == (0, [""]) or (code == 2 and len(lines) == 1 and lines[0].isprintable()), (
        code,
        err.getvalue()[:2000],
    )
    assert all(line.isprintable() for line in out.getvalue().split("\n"))
    out.getvalue().encode()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def _no_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime sees none of this; without it a file is read in milliseconds."""
    monkeypatch.setitem(sys.modules, "repquant_fx.audit", None)


@functools.cache
def metadata() -> dict[str, str]:
    return {entry.key: entry.value for entry in compiled("vit", 4).proto.metadata_props}


def write(path: Path, key: str, text: str) -> Path:
    """The file with another text under a key."""
    proto = onnx.ModelProto()
    proto.CopyFrom(compiled("vit", 4).proto)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, metadata() | {f"repquant_fx.{key}": text})
    path.write_bytes(proto.SerializeToString())
    return path


# ---- named fields --------------------------------------------------------------------------------------------------


def set_at(document: Any, way: str, value: Any) -> str:
    """JSON text of the document with a value at `a.0.b`; text that is no JSON value stands for itself."""
    document = json.loads(json.dumps(document))
    target: Any = document
    *keys, last = [int(key) if key.isdigit() else key for key in way.split(".")]
    for key in keys:
        target = target[key]
    target[last] = "@@"
    return json.dumps(document).replace('"@@"', value)


@pytest.mark.parametrize(
    "way, value, words",
    [
        ("layers.0.sites.0.grid", "5", "layers[0].sites[0].grid must be text; found 5"),
        ("layers.0.sites.0.grid", DEEP, "nested deeper"),
        ("layers.0.rewritten", '"ab"', "layers[0].rewritten must be a list"),
        ("layers.0.rewritten", "[{}]", "layers[0].rewritten[0] must be text; found a JSON object"),
        ("layers.0.path", "null", "layers[0].path must be text; found null"),
        ("layers.0.sites.0.bits", '"8"', "layers[0].sites[0].bits must be an integer"),
        (
            "layers.0.sites.0.bits",
            "1" * 400,
            "layers[0].sites[0].bits must be an integer from 2 to 32; found a huge number",
        ),
        ("layers.0.sites.0.bits", "9" * 5000, "cannot be read"),
        ("layers.0.sites.0.bits", "true", "must be an integer; found True"),
        ("layers.0.sites.0.zero_code", "-1", "layers[0].sites[0].zero_code must be an integer from 0 to 255; found -1"),
        ("layers.0.sites.0.zero_code", "[1]", "zero_code must be an integer or null; found a list"),
        ("layers.0.weight.bits", "NaN", "the number NaN"),
        ("layers.0.weight.bits", "1e999", "1e999"),
        ("layers.0.weight", "{}", "layers[0].weight.bits is missing"),
        ("layers", "{}", "layers must be a list; found a JSON object"),
        ("left_alone", "3", "left_alone must be a list; found 3"),
    ],
)
def test_a_misfit_of_the_record_names_its_field(way: str, value: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "layers", set_at(json.loads(metadata()["repquant_fx.layers"]), way, value))
    code, _, err = run("inspect", path)
    assert code == 2 and words in err and "repquant_fx.layers" in err


def test_names_are_shown_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal cuts long names
    document = json.loads(metadata()["repquant_fx.layers"])
    text = set_at(document, "layers.0.sites.0.name", json.dumps("a\x1b[2J\nb\ud800\u202e"))
    path = write(tmp_path / "m.onnx", "layers", text)
    assert r"a\x1b[2J\nb\ud800\u202e" in run("inspect", path)[1]
    assert json.loads(run("inspect", path, "--json")[1])["rows"][0]["site"] == "a\x1b[2J\nb\ud800\u202e"
    assert run("inspect", path, "--html", tmp_path / "p.html")[0] == 0
    assert (tmp_path / "p.html").read_bytes().decode()


@pytest.mark.parametrize("key", ["layers", "recipe", "preprocessing"])
@pytest.mark.parametrize("text", ["", "{", DEEP, '{"a":' * 50_000, "[1]", '"a"', "NaN", '{"wbits": Infinity}'])
def test_text_that_is_no_document(key: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", key, text)
    if key == "preprocessing":
        with pytest.raises(ModelFileError, match=r"repquant_fx\.preprocessing cannot be read"):
            preprocessing_from_onnx(path)
    else:
        code, _, err = run(*(("inspect",) if key == "layers" else ("recipe", "show")), path)
        assert code == 2 and f"repquant_fx.{key}" in err


def test_metadata_that_is_no_text_or_is_given_twice(tmp_path: Path) -> None:
    data = compiled("vit", 4).to_bytes()
    (tmp_path / "m.onnx").write_bytes(data.replace(b'{"layers":[{"path"', b'{"layers":[{"p\xff\xffh"'))
    assert "repquant_fx.layers is not UTF-8 text" in run("inspect", tmp_path / "m.onnx")[2]
    proto = onnx.ModelProto.FromString(data)
    proto.metadata_props.add(key="repquant_fx.version", value="9")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert "repquant_fx.version is given twice" in run("inspect", tmp_path / "m.onnx")[2]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.dims.insert(0, 1) or t.dims.insert(0, 1), "must hold one or a list of finite numbers"),
        (lambda t: t.CopyFrom(onnx.helper.make_tensor(t.name, onnx.TensorProto.STRING, [], [b"a"])), "finite numbers"),
        (
            lambda t: t.CopyFrom(onnx.helper.make_tensor(t.name, onnx.TensorProto.FLOAT, [], [math.nan])),
            "finite numbers",
        ),
    ],
)
def test_a_scale_that_is_none(change: Callable[[Any], object], words: str, tmp_path: Path) -> None:
    proto = onnx.ModelProto.FromString(compiled("vit", 4).to_bytes())
    change(next(t for t in proto.graph.initializer if t.name == "blocks.0.attn.qkv.input_scale"))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    code, _, err = run("inspect", tmp_path / "m.onnx")
    assert code == 2 and words in err and "'blocks.0.attn.qkv.input_scale'" in err


@pytest.mark.parametrize(
    "value, words",
    [
        ('{"input_size": [3, 1e9, 2]}', r"input_size\[1\] must be an integer"),
        ('{"input_size": [3, 1000000000, 2]}', "from 1 to 16384"),
        ('{"mean": ["a"]}', r"mean\[0\] must be a finite number"),
        ('{"crop_pct": 1e-9}', "crop_pct must be"),
        ('{"crop_mode": []}', "crop_mode"),
    ],
)
def test_preprocessing(value: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=words):
        preprocessing_from_onnx(write(tmp_path / "m.onnx", "preprocessing", value))


def test_depth_is_bounded_where_python_would_read_on() -> None:
    parse("[" * DEEPEST + "]" * DEEPEST)
    with pytest.raises(Misfit, match="deeper"):
        parse("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))


# ---- reports -------------------------------------------------------------------------------------------------------


@functools.cache
def report() -> dict[str, Any]:
    recipe = Recipe(wbits=4, **PLAIN | {"gptq": True})
    return dict(json.loads(compile(vit(depth=1), inputs("vit"), recipe, batch_size=8, statistics=True).report_json()))


def test_a_whole_report_fits(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(report()))
    assert read_report(tmp_path / "r.json") == report() and report()["statistics"]["weights"]


def test_a_key_is_read_under_its_former_name(tmp_path: Path) -> None:
    text = json.dumps(report())
    assert "codes_per_octave" in text
    (tmp_path / "r.json").write_text(text.replace("codes_per_octave", "codes_an_octave"))
    assert read_report(tmp_path / "r.json") == report()


@pytest.mark.parametrize(
    "way, value, words",
    [
        ("kernels", "[3]", "kernels[0] must be a JSON object; found 3"),
        ("kernels.0.integer", "1", "kernels[0].integer must be true or false"),
        ("parity.quantizers", "[]", "parity.quantizers must be a JSON object"),
        ("recipe", "[1]", "recipe must be a JSON object or null"),
        ("recipe", DEEP, "nested deeper"),
        ("layers.0.inputs.0.scale", '["a"]', "layers[0].inputs[0].scale[0] must be a finite number"),
        ("layers.0.inputs.0.scale", "NaN", "NaN"),
        ("calibration.samples", '"a"', "calibration.samples must be an integer"),
        ("calibration", "4", "calibration must be a JSON object or null"),
        ("layers.0.sqnr_db", '"a"', "layers[0].sqnr_db must be a finite number"),
        ("layers.0", "[]", "layers[0] must be a JSON object"),
        ("statistics.weights", "[]", "statistics.weights must be a JSON object"),
        ("left_alone", '"a"', "left_alone must be a list"),
        ("layers", "{}", "not a report"),
    ],
)
def test_a_misfit_of_a_report_names_its_field(way: str, value: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(compiled("vit", 4).to_bytes())
    (tmp_path / "r.json").write_text(set_at(report(), way, value))
    code, _, err = run("inspect", tmp_path / "m.onnx", "--html", tmp_path / "p.html", "--report", tmp_path / "r.json")
    assert code == 2 and words in err and not (tmp_path / "p.html").exists()


def test_a_report_cannot_end_the_script_or_break_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--\u2028\ud800${title}$title"
    changed = json.loads(json.dumps(report()))
    changed |= {"source": evil, "extra": {evil: [evil]}}
    changed["recipe"][evil] = evil
    changed["layers"][0] |= {"path": evil, "rewritten": [evil]}
    (tmp_path / "m.onnx").write_bytes(compiled("vit", 4).to_bytes())
    (tmp_path / "r.json").write_text(json.dumps(changed))
    assert run("inspect", tmp_path / "m.onnx", "--html", tmp_path / "p.html", "--report", tmp_path / "r.json")[0] == 0
    text = (tmp_path / "p.html").read_bytes().decode()
    assert "<script>alert" not in text and "${title}$title" in text


# ---- anything, anywhere --------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        math.nan,
        math.inf,
        10**400,
        -1,
        2**63,
        1e308,
        "\ud800",
        "\x1b[2J\nb",
        "\u202e",
        "</script>",
        "a" * 50_000,
        "",
        True,
        None,
        [],
        {},
        [[[[[[[1]]]]]]],
        {"a": {"b": {"c": {}}}},
        [None] * 1000,
    ]
)
JSON = st.recursive(
    ODD | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def few(examples: int) -> Callable[[Any], Any]:
    """The same examples in each run; the one folder of a test serves them all."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.large_base_example,
            HealthCheck.data_too_large,
        ],
    )


def place(draw: st.DataObject, document: Any) -> tuple[Any, Any]:
    """A container in the document and one of its keys, as likely near the top as deep inside."""
    while True:
        key = draw.draw(st.sampled_from(list(document) if isinstance(document, dict) else range(len(document))))
        if not (isinstance(document[key], (dict, list)) and document[key] and draw.draw(st.booleans())):
            return document, key
        document = document[key]


def mutated(draw: st.DataObject, document: Any) -> str:
    """Text of the document with one to three values replaced, deleted, doubled or nested deep."""
    document = json.loads(json.dumps(document))
    for _ in range(draw.draw(st.integers(1, 3))):
        if not document:
            break
        target, key = place(draw, document)
        kind = draw.draw(st.sampled_from(["replace", "replace", "delete", "deep", "twice"]))
        if kind == "delete":
            del target[key]
        elif kind == "twice" and isinstance(target[key], list):
            target[key] = target[key] * 2
        else:
            target[key] = "@@" if kind == "deep" else copy.deepcopy(draw.draw(JSON))
    return json.dumps(document).replace('"@@"', "[" * 2000 + "]" * 2000)


def check_metadata(draw: st.DataObject, folder: Path) -> None:
    key = draw.draw(st.sampled_from(["layers", "layers", "recipe", "preprocessing"]))
    path = write(folder / "m.onnx", key, mutated(draw, json.loads(metadata()[f"repquant_fx.{key}"])))
    if key == "preprocessing":
        with contextlib.suppress(InputError):
            found = preprocessing_from_onnx(path)
            ImageReader(found, image_size((None, 3, 16, 16), found))
        return
    if key == "recipe":
        run("recipe", "show", path)
    run("inspect", path, *draw.draw(st.sampled_from([(), ("--json",), ("--html", folder / "p.html", "--force")])))


def check_report(draw: st.DataObject, folder: Path) -> None:
    (folder / "r.json").write_text(mutated(draw, report()))
    (folder / "m.onnx").write_bytes(compiled("vit", 4).to_bytes())
    run("inspect", folder / "m.onnx", "--html", folder / "p.html", "--force", "--report", folder / "r.json")


@few(100)
@given(draw=st.data())
def test_any_metadata_is_shown_or_refused(draw: st.DataObject, tmp_path: Path) -> None:
    check_metadata(draw, tmp_path)


@few(60)
@given(draw=st.data())
def test_any_report_is_drawn_or_refused(draw: st.DataObject, tmp_path: Path) -> None:
    check_report(draw, tmp_path)


@pytest.mark.slow
@few(3000)
@given(draw=st.data())
def test_any_metadata_and_report_at_length(draw: st.DataObject, tmp_path: Path) -> None:
    (check_metadata if draw.draw(st.booleans()) else check_report)(draw, tmp_path)
