"""Models that the fuzzer found, each of which once ended in something other than a file or a refusal.

Long because it is a list that grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repquant_fx import Recipe, compile
from repquant_fx.compiler import CompiledModel
from repquant_fx.errors import InputError
from repquant_fx.recorder import Recorder


class Around(nn.Module):
    """A Linear and any use of it; `extra` is a layer for `use` to call."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Any], extra: nn.Module | None = None) -> None:
        super().__init__()
        self.use, self.fc, self.extra = use, nn.Linear(4, 4), extra
        self.table = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def compiled(model: nn.Module, recipe: Recipe | None = None, shape: tuple[int, ...] = (4,)) -> CompiledModel:
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    return compile(model, [x], recipe or Recipe(), example_inputs=[x[:2]])


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: (x, m.fc(x)),
        lambda m, x: (m.fc(x), x, x),
        lambda m, x: (m.fc(x), m.table),
        lambda m, x: (lambda y: (y, y))(m.fc(x)),
        lambda m, x: (lambda y: (y, y[:, 0], y.T))(m.fc(x)),
    ],
    ids=["input", "input twice", "parameter", "twice", "views"],
)
def test_outputs_that_are_no_results_of_their_own(use: Callable[[nn.Module, Tensor], Any]) -> None:
    result = compiled(Around(use))
    x = torch.randn(3, 4)
    found = result.session().run(None, {"x": x.numpy()})
    expected = result.graph_module(x)
    assert len(found) == len(expected) and len({o.name for o in result.proto.graph.output}) == len(found)
    assert all(torch.allclose(torch.from_numpy(f), e, atol=1e-5) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: torch.addmm(m.fc(x), x, m.extra.weight),
        lambda m, x: torch.addmm(m.extra.bias, m.fc(x), m.extra.weight),
        lambda m, x: torch.addmm(m.extra.weight[:1], m.fc(x), m.extra.weight),
        lambda m, x: torch.addmm(m.extra.weight[0, 0], m.fc(x), m.extra.weight),
        lambda m, x: torch.addmm(m.fc(x), x, m.extra.weight, beta=2),
    ],
    ids=["residual", "bias", "row", "scalar", "factor"],
)
def test_what_an_addmm_adds(use: Callable[[nn.Module, Tensor], Any]) -> None:
    """A bias where it has one value per output channel, else what is added to the product."""
    result = compiled(Around(use, nn.Linear(4, 4)))
    assert [entry["operator"] for entry in result.report["layers"]].count("linear") in (1, 2)


def test_patches_of_one_sample() -> None:
    result = compiled(Around(lambda m, x: (m.fc(x), torch.nn.functional.unfold(m.fc(x), (2, 2)))), shape=(3, 4))
    assert result.parity is not None


def test_a_layer_of_no_channels_behind_a_reshape() -> None:
    empty = nn.Linear(4, 0)
    result = compiled(Around(lambda m, x: (m.fc(x), m.extra(x).flatten(1)), empty), shape=(3, 4))
    assert result.parity is not None


def test_a_layer_of_no_channels() -> None:
    assert compiled(
        Around(lambda m, x: torch.cat([m.fc(x), m.extra(x)], -1), nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 2)))
    ).parity


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: (m.fc(x), m.extra(x).double() @ m.extra.weight.double()),
        lambda m, x: (m.fc(x), x.long() @ x.long().T),
        lambda m, x: m.fc(x).double().sum(-1),
    ],
    ids=["float64", "integers", "float64 output"],
)
def test_what_is_not_float32_is_left_alone(use: Callable[[nn.Module, Tensor], Any]) -> None:
    report = compiled(Around(use, nn.Linear(4, 4))).report
    assert all(entry["operator"] == "linear" for entry in report["layers"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_precision_is_compiled_in_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(8, 4).to(dtype)
    assert compile(model, [x], example_inputs=[x[:2]]).parity is not None and model[0].weight.dtype == dtype


def test_a_keyword_as_a_name_is_refused() -> None:
    model = nn.Sequential()
    model.add_module("class", nn.Linear(4, 4))
    with pytest.raises(InputError, match="Python keyword 'class'"):
        compiled(model)


def test_infinite_outputs_agree() -> None:
    assert compiled(Around(lambda m, x: m.fc(x).masked_fill(x > 0, float("-inf")))).parity


def test_an_rms_norm_of_a_number() -> None:
    """Written out, of a value without axes: no norm, but no failure."""
    assert compiled(
        Around(lambda m, x: (lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))(m.fc(x).mean()))
    ).parity


def test_a_layer_that_only_a_check_reads() -> None:
    """`nonzero` brings checks of its size, which keep alive what no output needs."""
    report = compiled(Around(lambda m, x: (m.fc(x), m.extra(m.fc(x)).nonzero())[0], nn.Linear(4, 3))).report
    assert [entry["path"] for entry in report["layers"]] == ["fc"]


def test_a_result_of_unknown_size_still_has_its_check() -> None:
    result = compiled(Around(lambda m, x: (m.fc(x), (x > 0).nonzero())))
    assert [o.name for o in result.proto.graph.output] == ["output_0", "output_1"]


@pytest.mark.parametrize(
    "layer, shape",
    [(nn.Conv2d(3, 4, 2), (3, 8, 8)), (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8)), (nn.Conv1d(3, 4, 2), (3, 8))],
)
def test_a_convolution_without_a_batch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    result = compile(layer, [(x,)], example_inputs=[x])
    assert result.parity is not None and len(result.report["layers"]) == 1


class Attention(nn.Module):
    """Without a tensor of its own: the graph has no module of its name."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-2, -1), -1) @ x


def test_a_module_without_tensors_that_is_called_as_the_slots_are() -> None:
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 4))
    model.add_module("quantizers", Attention())
    assert compiled(model, shape=(3, 4)).parity


def test_layers_in_double_precision_take_in_nothing() -> None:
    """Beside layers that do."""

    def use(m: nn.Module, x: Tensor) -> Any:
        first, second = (layer.weight.double() for layer in m.extra)
        y = nn.functional.linear(torch.relu(nn.functional.linear(x.double(), first)), second)
        return m.extra[0](torch.relu(m.fc(x))), y

    report = compiled(Around(use, nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))).report
    assert [entry["path"] for entry in report["layers"]] == ["fc", "extra.0"]


def test_a_scale_of_more_axes_is_not_folded() -> None:
    """Into the Linear before it: its output would lose them."""

    def use(m: nn.Module, x: Tensor) -> Any:
        linear, norm = m.extra
        return linear(norm(m.fc(x) + m.table[0] * linear(norm(m.fc(x)))))

    model = Around(use, nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]))
    model.table = nn.Parameter(torch.rand(1, 1, 1, 1, 4) + 0.5)
    result = compiled(model, Recipe(rotate=("residual", "heads")), (3, 4))
    assert result.parity and result.graph_module(torch.randn(2, 3, 4)).shape == (1, 2, 3, 4)


def test_probabilities_that_are_all_zero() -> None:
    """What is cut out of a Softmax may be."""
    offset = torch.tensor([0.0, 0.0, 1e4, 0.0])
    assert compiled(Around(lambda m, x: torch.softmax(m.fc(x) + offset, -1)[..., :2] @ x[:, :2]), shape=(3, 4)).parity


def test_the_encoder_layer_of_torch_is_quantized_in_its_parts() -> None:
    """For inference torch runs it as one operator, which has no counterpart in ONNX."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    report = compiled(layer, shape=(3, 4)).report
    assert [entry["operator"] for entry in report["layers"]].count("linear") == 4
    assert [entry["operator"] for entry in report["layers"]].count("matmul") == 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_has_no_counterpart_in_onnx_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot be written as ONNX.*bessel_j0"):
        compiled(Around(lambda m, x: torch.special.bessel_j0(m.fc(x))))


def test_a_layer_of_no_channels_behind_a_norm() -> None:
    layers = nn.ModuleList([nn.LayerNorm(4), nn.Linear(4, 0), nn.Linear(4, 2)])

    def use(m: nn.Module, x: Tensor) -> Tensor:
        y = m.extra[0](m.fc(x))
        return torch.cat([m.extra[1](y), m.extra[2](y)], -1)

    report = compiled(Around(use, layers)).report
    assert [entry["path"] for entry in report["layers"]] == ["fc", "extra.2"]


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[..., :1].mul_(2)], ids=["all of it", "a part"])
def test_a_model_that_writes_into_its_input(write: Callable[[Tensor], Any]) -> None:
    """Its file does not, nor does compiling it change what is given."""
    model = Around(lambda m, x: (write(x), m.fc(x))[1]).eval()
    x = torch.randn(8, 4)
    given, batch = x[:2].clone(), x.clone()
    result = compile(model, [batch], example_inputs=[given])
    assert torch.equal(given, x[:2]) and torch.equal(batch, x)
    expected = result.graph_module(batch)
    assert torch.equal(batch, x) and torch.allclose(expected, model(batch), atol=0.1)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.complex64])
def test_an_output_of_a_type_that_no_array_has_is_refused(kind: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"output output_1 is {str(kind)[6:]}"):
        compiled(Around(lambda m, x: (m.fc(x), m.fc(x).to(kind))))


@pytest.mark.parametrize("value", [0.0, 1e-20])
def test_a_bias_far_above_the_steps_of_its_product(value: float) -> None:
    """Activations constant on the calibration data, or a weight of tiny numbers: ONNX Runtime makes an int32 of
    a bias in float, too, and lets it saturate.
    """
    x = torch.full((8, 4), value)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert compile(model, [x], example_inputs=[x[:2]]).parity
    with torch.no_grad():
        model[0].weight.mul_(1e-20)
    assert compiled(model).parity


def test_as_many_outputs_as_values_chosen() -> None:
    """Quantized, another number of them."""
    assert compiled(Around(lambda m, x: (lambda y: (y, y[y > 0]))(m.fc(x))), Recipe(wbits=2, abits=2)).parity


@pytest.mark.parametrize("batch", [1, 8])
def test_a_bilinear_layer(batch: int) -> None:
    """Torch cannot trace it with a batch of any size."""
    model, x = Around(lambda m, x: m.extra(m.fc(x), x), nn.Bilinear(4, 4, 3)), torch.randn(8, 4)
    result = compile(model, [x], example_inputs=[x[:batch]])
    expected = model(x[:batch])
    assert (result.graph_module(x[:batch]) - expected).norm() < 0.3 * expected.norm()
    assert [entry["operator"] for entry in result.report["layers"]] == ["linear", "linear"]


def test_a_number_copied_into_a_matrix() -> None:
    result = compiled(Around(lambda m, x: m.fc(m.extra(x).clone().copy_(x.mean().double())), nn.Linear(4, 4)))
    assert [entry["path"] for entry in result.report["layers"]] == ["fc"]
    assert [item["path"] for item in result.report["left_alone"]] == ["extra"]
    assert result.session().run(None, {"x": torch.randn(3, 4).numpy()})[0].shape == (3, 4)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(correction=False), Recipe(gptq=False)])
def test_calibration_data_far_from_zero(recipe: Recipe) -> None:
    """Their variance is below the resolution of their squares in float32."""
    x = torch.randn(20, 4) * 2e-3 + 1e3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    result = compile(model, [x], recipe, example_inputs=[x[:2]])
    assert result.parity and not result.parity.problems()
    assert (result.graph_module(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_how_many_values_are_chosen_may_turn_on_rounding() -> None:
    """The last bits of an exponential are those of its implementation."""
    assert compiled(Around(lambda m, x: (m.fc(x).exp() % 1e-6 > 5e-7).nonzero()), shape=(200, 4)).parity


@pytest.mark.parametrize("round_it", [torch.round, torch.floor, torch.ceil, torch.trunc])
def test_integers_are_round(round_it: Callable[[Tensor], Tensor]) -> None:
    model = Around(lambda m, x: (lambda y: (y, round_it((10 * y).long())))(m.fc(x)))
    assert compiled(model).parity


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int32])
def test_an_einsum_of_narrow_integers(kind: torch.dtype) -> None:
    """It wraps around as torch's does."""
    def outer(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        small = (x > 0).to(kind) * 100
        return m.fc(x), torch.einsum("bi,bj->bij", small, small)

    result, x = compiled(Around(outer)), torch.randn(3, 4)
    found = result.session().run(None, {"x": x.numpy()})[1]
    assert torch.equal(torch.from_numpy(found), Around(outer)(x)[1])


def test_values_chosen_of_a_constant() -> None:
    """How many is not known when rotations are looked for."""
    def chosen(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        table = m.extra.view(4, 4)
        return m.fc(x) + table[table > 0].sum(), table[table > 0]

    model = Around(chosen, nn.Parameter(torch.randn(2, 8)))
    assert compiled(model, Recipe(rotate=("residual",))).parity


def test_a_number_of_chosen_values_that_the_program_was_traced_for() -> None:
    """With no value chosen from the example torch traces a program that holds for none."""
    def few(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = x[x > 5]
        torch._check(chosen.shape[0] == 0)
        return m.fc(x), chosen

    model, x = Around(few), torch.zeros(8, 4)
    assert compile(model, [x], example_inputs=[x[:2]]).parity
    for recipe in (Recipe(), Recipe(rotate=("residual",))):
        with pytest.raises(InputError, match=r"captured for one size alone \(Eq\(u0, 0\)") as caught:
            compile(model, [x + 9], recipe, example_inputs=[x[:2]])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("squeeze", [lambda x: x.squeeze(0), lambda x: x.squeeze(), lambda x: x.squeeze((0, 2))])
def test_a_squeeze_of_an_axis_that_is_longer(squeeze: Callable[[Tensor], Tensor]) -> None:
    """Torch leaves it, ONNX does not; the batch may be 1 in the file."""
    model = Around(lambda m, x: (m.fc(x), squeeze(x)))
    result = compiled(model, shape=(1, 1, 4))
    assert result.parity
    for count in (1, 3):
        x = torch.randn(count, 1, 1, 4)
        with torch.no_grad():
            expected = result.graph_module(x)[1]
        assert tuple(result.session().run(None, {"x": x.numpy()})[1].shape) == expected.shape


@pytest.mark.parametrize("recipe", [Recipe(rotate=("residual", "heads")), Recipe(equalize=("values", "query_key"))])
def test_an_overflow_is_named_by_whatever_sees_it_first(recipe: Recipe) -> None:
    def overflowing(m: nn.Module, x: Tensor) -> Tensor:
        v = m.fc(x).half().float()
        return m.extra(nn.functional.scaled_dot_product_attention(v, v, v))

    x = torch.randn(8, 3, 4) * 1e6
    with pytest.raises(InputError, match="is not finite on the calibration data"):
        compile(Around(overflowing, nn.Linear(4, 4)), [x], recipe, example_inputs=[x[:2]])


def test_logits_that_float32_cannot_tell_apart() -> None:
    """Of 1e12 the last bit is 1e5: which probability is the largest turns on the order of a sum."""
    def attention(m: nn.Module, x: Tensor) -> Tensor:
        q = m.fc(x)
        return m.extra(nn.functional.scaled_dot_product_attention(q, q, q))

    torch.manual_seed(0)
    x = torch.randn(40, 16, 4) * 6e6
    recipe = Recipe(wbits=2, abits=4, softmax="log2", equalize=("query_key",), correction=False)
    assert compile(Around(attention, nn.Linear(4, 4)), [x], recipe, example_inputs=[x[:2]]).parity


def test_one_tensor_given_for_two_inputs() -> None:
    """Torch traced it as one, and the model read its second input twice."""
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x) - 2 * y

    model, x = Two(), torch.randn(2, 4)
    data, exported = [(torch.randn(8, 4), torch.randn(8, 4))], torch.export.export(model, (x, x.clone()))
    for source, batches in ((model, data), (exported, [tuple(t[:2] for t in data[0])])):
        result = compile(source, batches, example_inputs=(x, x))
        assert result.parity and not result.parity.problems()
        a, b = batches[0]
        assert (result.graph_module(a, b) - model(a, b)).norm() < 0.1 * model(a, b).norm()


def test_a_norm_over_no_channels_beside_a_linear() -> None:
    model = Around(lambda m, x: (m.fc(x), nn.functional.layer_norm(x[..., :0], (0,))))
    assert compiled(model).parity


def test_fewer_samples_than_the_model_needs() -> None:
    """A row is chosen that no batch of the calibration data has."""
    model, x = Around(lambda m, x: m.fc(x) * x[torch.tensor([20])].mean()), torch.randn(32, 4)
    with pytest.raises(InputError, match=r"does not run on calibration data of shape \(6, 4\)"):
        compile(model, [x[:8]], Recipe(rotate=("residual",)), example_inputs=[x])


def test_an_einsum_that_broadcasts_what_it_sums() -> None:
    for wide, narrow in (((4, 8), (1, 5)), ((4, 1), (8, 5))):
        weight = nn.Parameter(torch.randn(narrow))
        model = Around(lambda m, x, w=weight, n=wide[1]: torch.einsum("bi,ij->bj", m.fc(x).repeat(1, 2)[:, :n], w))
        model.weight = weight
        assert compiled(model).parity


def test_what_is_decided_from_floats_may_turn_on_rounding() -> None:
    """Hardswish is 0 up to -3, and there the last bit decides; a decision that is clear is judged."""
    def decide(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.fc(x)
        return y, (nn.functional.hardswish(y - y.detach() - 3) > 0) & (y > 0)

    assert compiled(Around(decide), shape=(64, 4)).parity


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(rotate=("residual",), equalize=())])
def test_an_index_in_the_data_that_leads_outside(recipe: Recipe) -> None:
    """It is named by the data's shape, and in one of several batches of a shape by the operator."""
    def look_up(m: nn.Module, x: Tensor) -> Tensor:
        return m.fc(x) + torch.gather(x, -1, x[:, :1].long().abs()).sum()

    x = torch.rand(8, 4)
    far = torch.cat([x[:1] + 9, x[1:]])
    with pytest.raises(InputError, match=r"does not run on calibration data .*out of bounds"):
        compile(Around(look_up), [far, x, x, x], recipe, example_inputs=[x[:2]])
    graph_module = compiled(Around(lambda m, x: m.fc(torch.gather(x, -1, x.long().abs() % 4)))).graph_module
    (node,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.remainder.Scalar)
    node.update_arg(1, 99)
    with pytest.raises(InputError, match=r"gather\w* does not run on this data: .*out of bounds"):
        Recorder(graph_module, []).run(far)


@pytest.mark.parametrize("rotate", ["residual", "heads"])
def test_rotations_of_what_has_no_channels_or_no_batch_axis(rotate: str) -> None:
    """A product of no columns; attention from sample to sample, whose batches cannot be joined."""
    def empty(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.fc(x), m.fc(x) @ torch.zeros(4, 0)

    def across(m: nn.Module, x: Tensor) -> Tensor:
        y = m.fc(x)
        return torch.softmax(y @ y.mT, -1) @ y

    for function in (empty, across):
        result = compile(Around(function), [torch.randn(n, 4) for n in (8, 8, 6)], Recipe(rotate=(rotate,)),
                         example_inputs=[torch.randn(2, 4)])
        assert result.parity and not result.parity.problems()


@pytest.mark.parametrize(("equal", "factor", "drawn"), [(3, 1e3, 1), (7, 1e5, 1), (11, 1e3, 0)])
def test_a_norm_of_values_that_are_equal_but_for_their_last_bits(equal: int, factor: float, drawn: int) -> None:
    """Its sign is that of a rounding error, which ONNX Runtime makes elsewhere."""
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.read = nn.Linear(4, 1), nn.RMSNorm(1), nn.Linear(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            alike = (factor * self.fc(x)).expand(-1, equal).unsqueeze(1)
            return self.read(self.norm(nn.functional.group_norm(alike, 1).mT))

    torch.manual_seed(drawn)
    x, model = torch.randn(8, 4), Signs()
    recipe = Recipe(abits=2, gptq=False, correction=False, clipping="none")
    parity = compile(model, [x], recipe, example_inputs=[x[:2]]).parity
    assert parity and not parity.problems()


def test_a_norm_of_no_channels_that_is_written_out() -> None:
    """ONNX Runtime recognises it too, and refuses it."""
    def norm(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ torch.zeros(4, 0)
        return m.fc(x), y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * m.extra

    result, x = compiled(Around(norm, nn.Parameter(torch.ones(0)))), torch.randn(3, 4)
    assert [value.shape for value in result.session().run(None, {"x": x.numpy()})] == [(3, 4), (3, 0)]


@pytest.mark.parametrize("power", [2, 3, 0.5])
def test_powers_of_booleans(power: float) -> None:
    result, x = compiled(Around(lambda m, x: (m.fc(x), (x > 0) ** power))), torch.randn(3, 4)
    found = result.session().run(None, {"x": x.numpy()})[1]
    torch.testing.assert_close(torch.from_numpy(found), (x > 0) ** power)


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.float64, torch.uint8, torch.float32])
def test_where_numbers_are_not_zero(kind: torch.dtype) -> None:
    result, x = compiled(Around(lambda m, x: (m.fc(x), (2 * x).to(kind).nonzero()))), torch.randn(3, 4).abs()
    found = result.session().run(None, {"x": x.numpy()})[1]
    assert torch.equal(torch.from_numpy(found), (2 * x).to(kind).nonzero())


def test_an_rms_norm_of_float64_with_a_weight_of_float32() -> None:
    def norm(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.fc(x), nn.functional.rms_norm((2 * x).double(), (4,), m.extra, 1e-3)

    weight = nn.Parameter(torch.rand(4))
    result, x = compiled(Around(norm, weight)), torch.randn(3, 4)
    found = torch.from_numpy(result.session().run(None, {"x": x.numpy()})[1])
    torch.testing.assert_close(found, nn.functional.rms_norm((2 * x).double(), (4,), weight.double(), 1e-3))
