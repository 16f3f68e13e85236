"""What to quantize, with how many bits, by which method. Read strictly from YAML or TOML; every field has a CLI
switch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from repquant_fx.errors import InputError, RecipeError
from repquant_fx.recipe_reading import MOST_BYTES, parse
from repquant_fx.recipe_settings import FLOAT, bits, bits_or_none, nearest, setting, settings_of

MANY_BITS = 8  # of an activation whose error is so small that no operator is added to lessen it
_FORMER = {"absorb": "equalize"}  # names that settings had in files written before
GROUP_SIZES = (0, 16, 32, 64, 128, 256)  # those that ONNX Runtime's MatMulNBits takes


@dataclass(frozen=True)
class LayerRule:
    """Overrides for the layers whose module path matches the glob `match`. The last matching rule wins, field by field.

    Attributes:
        match: glob of module paths, such as "blocks.*.mlp.fc2".
        wbits: bits of the layer's weights; the recipe's where left out.
        abits: bits of the activations it reads, `none` to leave them in float; the recipe's where left out.
        gptq: false rounds its weights to nearest.
        skip: true leaves it in float.
    """

    match: str
    wbits: int | None = bits()
    abits: int | None = bits_or_none()
    gptq: bool | None = setting(None, bool)
    skip: bool | None = setting(None, bool)

    def __post_init__(self) -> None:
        object.__setattr__(self, "abits", settings_of(LayerRule)["abits"].read(self.abits))


@dataclass(frozen=True)
class LayerPlan:
    """Effective settings of one layer; `abits` is `FLOAT` where its activations stay in float."""

    wbits: int
    abits: int
    gptq: bool
    skip: bool

    @property
    def weight_only(self) -> bool:
        """Whether its activations stay in float."""
        return self.abits == FLOAT


@dataclass(frozen=True)
class Recipe:
    """A whole quantization recipe. The defaults are RepQuant at W8A8.

    Attributes:
        wbits: bits of weights.
        abits: bits of activations; `none` leaves them in float and quantizes weights alone.
        group_size: how many inputs of a layer share a scale and a zero point of each of its outputs, where its
            activations stay in float; 0 for all of them.
        input_bits: bits of the model input where a layer reads it directly (the patch embedding), 8 in the paper's
            code.
        norm: norm activations per channel and reparameterized (the method), `layerwise` (one scale, no rewriting),
            `channelwise` (per-channel scales kept in the file: slow, for comparison) or `smooth` (SmoothQuant's factors
            instead).
        balance: of the differences between the channels of a norm only so much moves into the weights as lessens the
            error of the products (beyond the paper, which moves all); for `reparameterize`.
        softmax: logarithmic, reparameterized to shifts: `log_sqrt2` with two codes per octave is the published method,
            `log` (the default) chooses 1, 2, 4 or 8 by the error; plain `log2`; or `uniform`.
        softmax_scale: `output` minimises the error of the MatMul's result on a sample, `percentile` that of the values
            over three percentiles.
        normalize_rows: rows of probabilities of fewer than 8 bits are divided by their sum where that lessens the error
            of the product by a fifth or more (beyond the paper).
        clipping: per-channel dual clipping of norm activations by exact `search`, by the paper's `adam`, or `none`
            (min-max).
        activations: bounds of all other activations: `mse`, `percentile`, `minmax`.
        percentile: the percentile used where asked for.
        weights: weight range by `mse` search or `minmax`.
        correction: least-squares correction of weights and biases towards the float model's outputs (beyond the paper).
        equalize: where else per-channel scales move into constants, exactly (beyond the paper): `values` of attention,
            `linear` to linear through ReLU or a gate, `keys` (what all of them have in common, which a Softmax cannot
            see), and `query_key` (opposite factors as well), which gained nothing on the models measured and is off.
            Empty for none.
        symmetric: grids of activations symmetric about zero, so that a code is a signed integer without a zero point,
            which some kernels need (OpenVINO's products of queries and keys). Free behind a norm; elsewhere a range
            that is not symmetric is widened, but for one that lies on one side of zero, as behind GELU.
        activation_affine: a factor and a shift per channel behind GELU, SiLU and their kin (beyond the paper), so that
            what Linears with activations of fewer than 8 bits read of them has scales per channel as the output of a
            norm has; two more element-wise operators each.
        rotate: which channel vectors may be rotated, exactly (beyond the paper): the `residual` stream, and the `heads`
            of attention. Each rotation is tried on calibration data and made where products get less noise; where all
            that reads and writes the vectors has 8 bits, none is. Empty for none.
        reconstruct: steps of block reconstruction (beyond the paper): weights, biases, gains and scales are learned
            from the float model, block by block; 0 for none.
        gptq: error-compensating rounding; else round to nearest.
        gptq_damping: share of the mean diagonal that is added to the Hessian.
        gptq_block: columns that are updated at once.
        gptq_activation_order: columns in the order of decreasing input energy.
        container: how the file holds codes of up to 4 bits: `int8` (activations in bytes, weights packed and unpacked
            when a session is created: what ONNX Runtime runs fast on a CPU) or `int4` (UINT4 and INT4 Q/DQ for tool
            chains of accelerators).
        cache: how the file of a causal language model takes and gives the keys and values of earlier tokens: as the
            `codes` that its products read, a byte each, or in `float`.
        layers: overrides by module path.

    Example (YAML)::

        wbits: 4
        abits: 4
        layers:
          - {match: "head", wbits: 8, abits: 8}
          - {match: "blocks.*.mlp.fc2", abits: 6}
    """

    wbits: int = bits(8)
    abits: int = bits_or_none(8)
    group_size: int = setting(0, numbers=GROUP_SIZES)
    input_bits: int = bits(8)
    norm: str = setting("reparameterize", choices=("reparameterize", "layerwise", "channelwise", "smooth"))
    balance: bool = setting(True)
    softmax: str = setting("log", choices=("log", "log_sqrt2", "log2", "uniform"))
    softmax_scale: str = setting("output", choices=("output", "percentile"))
    normalize_rows: bool = setting(True)
    clipping: str = setting("search", choices=("search", "adam", "none"))
    activations: str = setting("mse", choices=("mse", "percentile", "minmax"))
    percentile: float = setting(99.99, low=50.0, high=100.0)
    weights: str = setting("mse", choices=("mse", "minmax"))
    correction: bool = setting(True)
    equalize: tuple[str, ...] = setting(("values", "linear", "keys"), choices=("values", "linear", "keys", "query_key"))
    symmetric: bool = setting(False)
    activation_affine: bool = setting(True)
    rotate: tuple[str, ...] = setting(("heads",), choices=("residual", "heads"))
    reconstruct: int = setting(0, low=0, high=100_000, alone=400)
    gptq: bool = setting(True)
    gptq_damping: float = setting(0.01, low=0.0, high=10.0)
    gptq_block: int = setting(128, low=1)
    gptq_activation_order: bool = setting(True)
    container: str = setting("int8", choices=("int8", "int4"))
    cache: str = setting("codes", choices=("codes", "float"))
    layers: tuple[LayerRule, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, limits in settings_of(Recipe).items():
            object.__setattr__(self, name, limits.read(getattr(self, name)))
            limits.check(name, getattr(self, name))
        for name in ("equalize", "rotate"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for index, rule in enumerate(self.layers):
            for name, limits in settings_of(LayerRule).items():
                if getattr(rule, name) is not None:
                    limits.check(f"layers[{index}].{name}", getattr(rule, name))

    def check_together(self) -> None:
        """
        Raises:
            RecipeError: two settings that do not go together.
        """
        some_float = self.weight_only or any(rule.abits == FLOAT for rule in self.layers)
        if self.group_size and not some_float:
            raise RecipeError(f"group_size {self.group_size} needs activations in float (abits none): products of "
                              "integers have one scale per output channel")
        if self.reconstruct and some_float:
            raise RecipeError("reconstruct learns where activations are quantized: give all of them bits, or leave it "
                              "out")

    @property
    def weight_only(self) -> bool:
        """Whether activations stay in float, but where a rule gives them bits."""
        return self.abits == FLOAT

    @property
    def bits(self) -> str:
        """As the field writes it: `W4A8`; `W4A32g128` where groups of 128 weights share a scale."""
        return f"W{self.wbits}A{self.abits}" + (f"g{self.group_size}" if self.group_size else "")

    def layer(self, path: str) -> LayerPlan:
        """Effective settings of the layer at module path `path`."""
        plan = LayerPlan(self.wbits, self.abits, self.gptq, False)
        for rule in self.layers:
            if fnmatch.fnmatchcase(path, rule.match):
                changes = {k: v for k, v in asdict(rule).items() if k != "match" and v is not None}
                plan = replace(plan, **changes)
        return plan

    def few_bits(self, path: str) -> bool:
        """Whether what the layer at module path `path` reads gets so few bits that operators may be added for it."""
        plan = self.layer(path)
        return plan.abits < MANY_BITS and not plan.skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back to an equal recipe."""
        data = _written(Recipe, asdict(self))
        data["equalize"], data["rotate"] = list(self.equalize), list(self.rotate)
        data["layers"] = [
            _written(LayerRule, {k: v for k, v in asdict(rule).items() if v is not None}) for rule in self.layers
        ]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Strict: an unknown key is an error that suggests the nearest one.

        Raises:
            RecipeError: unknown key, wrong type, value out of range.
        """
        values = _under_current_names(data, where)
        _check_keys(values, cls, where)
        rules = values.pop("layers", ())
        if not isinstance(rules, (list, tuple)):
            raise RecipeError(f"{where}: layers must be a list of tables, each with a `match` glob")
        parsed = []
        for index, rule in enumerate(rules):
            if isinstance(rule, LayerRule):
                parsed.append(rule)
                continue
            _check_keys(rule, LayerRule, f"{where}: layers[{index}]")
            if not isinstance(rule.get("match"), str):
                raise RecipeError(f"{where}: layers[{index}] needs `match`, a glob on the module path")
            parsed.append(LayerRule(**rule))
        try:
            return cls(**values, layers=tuple(parsed))
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any] | str | Path | None) -> Recipe:
        """A recipe however it is given: as it is, as a mapping, as a file, or None for the default.

        Raises:
            RecipeError: none of these, or invalid.
        """
        if given is None:
            return cls()
        if isinstance(given, Recipe):
            return given
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        if isinstance(given, (str, Path)):
            return cls.from_file(given)
        raise RecipeError(f"a recipe is a Recipe, a mapping, or a file; found {type(given).__name__}")

    def unmatched(self, paths: Collection[str]) -> list[str]:
        """A sentence for each rule that fits none of the module paths, with the nearest path."""
        sentences = []
        for index, rule in enumerate(self.layers):
            if not any(fnmatch.fnmatchcase(path, rule.match) for path in paths):
                sentences.append(f"layers[{index}]: {rule.match!r} matches no layer{nearest(rule.match, paths)}")
        return sentences

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read `.yaml`, `.yml` or `.toml`, or the effective recipe in the metadata of an exported `.onnx`.

        Raises:
            RecipeError: unreadable, not a table, or invalid.
        """
        path = Path(path)
        if (path / "model.onnx").is_file():  # a directory that `compile` wrote
            path = path / "model.onnx"
        if path.suffix.lower() == ".onnx":
            return cls.from_dict(_stored(path), f"recipe stored in {path}")
        try:
            with path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
            text = data.decode("utf-8")
        except (OSError, ValueError) as error:
            raise RecipeError(f"cannot read recipe {path}: {error}") from error
        if len(data) > MOST_BYTES:
            raise RecipeError(f"recipe {path} is larger than {MOST_BYTES >> 10} KiB; that is no recipe")
        try:
            parsed = parse(text, path.suffix.lower())
        except RecipeError:
            raise
        except Exception as error:
            raise RecipeError(
                f"recipe {path} is not valid {path.suffix[1:].upper()}: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from error
        if parsed is None:
            parsed = {}
        if not isinstance(parsed, dict):
            raise RecipeError(f"recipe {path} must be a table of settings, not a {type(parsed).__name__}")
        return cls.from_dict(parsed, f"recipe {path}")


CHOICES = {name: limits.choices for name, limits in settings_of(Recipe).items() if limits.kind is str}
EQUALIZE, ROTATE = settings_of(Recipe)["equalize"].choices, settings_of(Recipe)["rotate"].choices


def literal(path: str) -> str:
    """A glob that matches this path alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def repq_vit(wbits: int, abits: int, **changes: Any) -> Recipe:
    """The predecessor (arXiv 2212.08254) in our terms: reparameterization and log-sqrt2, no clipping, no GPTQ,
    percentiles.
    """
    settings: dict[str, Any] = {
        "clipping": "none",
        "correction": False,
        "equalize": (),
        "activation_affine": False,
        "balance": False,
        "rotate": (),
        "normalize_rows": False,
        "gptq": False,
        "activations": "percentile",
        "softmax": "log_sqrt2",
        "softmax_scale": "percentile",
    }
    return Recipe(wbits=wbits, abits=abits, **{**settings, **changes})


def smoothquant(wbits: int, abits: int, **changes: Any) -> Recipe:
    """SmoothQuant (arXiv 2211.10438) with static per-tensor activations: smoothed norms, min-max everywhere, nearest
    rounding.
    """
    return rtn(wbits, abits, **{"norm": "smooth", **changes})


def fast(wbits: int, abits: int, **changes: Any) -> Recipe:
    """What integer kernels run fastest: symmetric grids, and a uniform one for Softmax, so that the second product of
    attention is an integer one too.
    """
    return Recipe(wbits=wbits, abits=abits, **{"symmetric": True, "softmax": "uniform", **changes})


def rtn(wbits: int, abits: int, **changes: Any) -> Recipe:
    """What common tools do: one min-max scale per tensor, uniform everywhere, weights rounded to nearest."""
    settings: dict[str, Any] = {
        "norm": "layerwise",
        "softmax": "uniform",
        "clipping": "none",
        "activations": "minmax",
        "weights": "minmax",
        "correction": False,
        "equalize": (),
        "activation_affine": False,
        "balance": False,
        "rotate": (),
        "normalize_rows": False,
        "gptq": False,
    }
    return Recipe(wbits=wbits, abits=abits, **{**settings, **changes})


RecipeLike = Recipe | Mapping[str, Any] | str | Path
PRESETS = {"repquant": Recipe, "repq-vit": repq_vit, "smoothquant": smoothquant, "rtn": rtn, "fast": fast}


def _stored(path: Path) -> Any:
    from repquant_fx.exporters.reading import read_onnx

    try:
        metadata = read_onnx(path).metadata
        metadata.version()
        stored = metadata.recipe()
    except InputError as error:
        raise RecipeError(f"cannot read the recipe of {path}: {error}") from error
    if stored is None:
        raise RecipeError(f"cannot read the recipe of {path}: it holds none")
    return stored


def _written(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that have a word as the word."""
    limits = settings_of(cls)
    return {name: limits[name].written(value) if name in limits else value for name, value in values.items()}


def _under_current_names(data: Any, where: str) -> Any:
    """The settings with those in `_FORMER` renamed."""
    if not isinstance(data, Mapping):
        return data
    for former, current in _FORMER.items():
        if former in data and current in data:
            raise RecipeError(f"{where}: {former!r} is the former name of {current!r}; give one of them")
    return {_FORMER.get(name, name): value for name, value in data.items()}


def _check_keys(data: Any, target: type, where: str) -> None:
    names = [f.name for f in fields(target)]
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} must be a table, found {type(data).__name__}")
    for key in data:
        if key not in names:
            raise RecipeError(f"{where}: unknown setting {key!r}{nearest(key, names)}")
