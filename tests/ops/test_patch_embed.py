"""patch_embed: backends against fp64, pixels and layouts that are hard, autograd, determinism."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference
from vlm_kernels.testing.specs import patch_embed as spec
from vlm_kernels.testing.specs.patch_embed import EVERYTHING, PLAIN, QWEN, Case, Variant
from vlm_kernels.testing.tolerances import assert_close

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
dtypes = pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CPU = partial(vlm_kernels.patch_embed, backend="cpu")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def evaluate(case: Case, fn: Callable[..., Tensor] = CPU) -> dict[str, Tensor]:
    return spec.evaluate(fn, case.inputs(), case.keywords())


# --- accuracy ---


@pytest.fixture
def isas() -> Iterator[Callable[[], Iterator[str]]]:
    """A function that goes through the instruction sets that this CPU has."""
    extension = importlib.import_module("vlm_kernels._C")
    before = extension.cpu_isa()

    def each() -> Iterator[str]:
        for name in extension.cpu_isas():
            extension.set_cpu_isa(name)
            assert extension.cpu_isa() == name
            yield name

    yield each
    extension.set_cpu_isa(before)


@needs_cpu
@pytest.mark.parametrize("case", spec.cases(), ids=str)
def test_accuracy(case: Case, isas: Callable[[], Iterator[str]]) -> None:
    """With each instruction set."""
    for _ in isas():
        spec.check(case, CPU)


@pytest.mark.parametrize("case", spec.cases()[::7], ids=str)
def test_accuracy_of_the_reference(case: Case) -> None:
    spec.check(case, partial(vlm_kernels.patch_embed, backend="reference"))


@pytest.mark.parametrize("case", spec.cases()[::3], ids=str)
def test_truth_is_that_of_a_convolution(case: Case) -> None:
    """torch's own Conv2d and Conv3d in fp64, fed with normalised images."""
    inputs, keywords = case.inputs().to(torch.float64), case.keywords()
    torch.testing.assert_close(
        spec.call(reference.patch_embed, inputs, keywords),
        # fp32 is what it normalises in
        spec.call(spec.conv, inputs, keywords),
        rtol=0,
        atol=1e-5 / min(map(abs, keywords.get("std", (1,)))),
    )


def definition(case: Case) -> Tensor:
    """Tokens one by one, in loops over Python numbers, for small cases."""
    inputs, v = case.inputs().to(torch.float64), case.variant
    norm = {"mean": (0,) * case.c, "std": (1,) * case.c, "rescale": 1 / 255, **spec.NORMS[v.norm]}
    images = inputs.images.movedim(-1, -3) if spec.is_nhwc(v.layout) else inputs.images
    images = images if v.frames else images[:, None].expand(-1, v.temporal, -1, -1, -1)
    scale = norm["rescale"] if images.dtype == torch.uint8 else 1.0
    (py, px), (sy, sx) = case.patch, case.stride
    frames, rows, columns = case.grid
    offsets = list(product(range(case.c), range(v.temporal), range(py), range(px)))
    if v.k_order == "yxc":
        offsets = [
            (c, t, y, x) for t, y, x, c in product(*map(range, (v.temporal, py, px, case.c)))
        ]
    weight = inputs.weight.flatten(1)

    def pixel(image: Tensor, c: int, t: int, y: int, x: int) -> float:
        inside = y < case.h and x < case.w
        if not inside and v.pad == "normalised":
            return 0.0
        raw = image[t, c, y, x].item() * scale if inside else 0.0
        return (raw - norm["mean"][c]) / norm["std"][c]

    def token(image: Tensor, frame: int, row: int, column: int) -> Tensor:
        at = [(c, frame * v.temporal + t, row * sy + y, column * sx + x) for c, t, y, x in offsets]
        patch = torch.tensor([pixel(image, *place) for place in at], dtype=torch.float64)
        return weight @ patch + (0 if inputs.bias is None else inputs.bias)

    def of(x: Tensor, b: int) -> Tensor:
        return x if x.dim() == 2 else x[b % len(x)]

    m, out = v.merge, []
    for b in range(case.b):
        tokens: list[Tensor] = []
        prefix = [] if inputs.prefix is None else list(of(inputs.prefix, b))
        pos = None if inputs.pos is None else of(inputs.pos, b)
        places = product(range(frames), range(rows // m), range(columns // m), range(m), range(m))
        for i, (frame, block_row, block_column, y, x) in enumerate(places):
            column = block_column * m + x
            one = token(images[b], frame, block_row * m + y, column)
            if pos is not None:
                one = one + pos[i + v.prefix * v.pos_prefixed]
            tokens.append(one)
            if inputs.newline is not None and column == columns - 1:
                tokens.append(inputs.newline)
        if pos is not None and v.pos_prefixed:
            prefix = [one + pos[i] for i, one in enumerate(prefix)]
        out.append(torch.stack([*prefix, *tokens]))
    return torch.stack(out)


@pytest.mark.parametrize(
    "case",
    [
        spec.even(Case(2, 7, 9, (3, 2), 4, torch.float64, variant))
        for variant in (*spec.covering_variants()[::4], EVERYTHING, QWEN)
    ],
    ids=str,
)
def test_reference_is_the_definition(case: Case) -> None:
    case = replace(
        case, variant=replace(case.variant, step=tuple(s // 3 for s in case.variant.step))
    )
    case = spec.even(case)
    inputs = case.inputs().to(torch.float64)
    got = spec.call(reference.patch_embed, inputs, case.keywords())
    torch.testing.assert_close(got, definition(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", [EVERYTHING, replace(QWEN, frames=4), Variant()], ids=str)
def test_gradients_of_the_reference(variant: Variant) -> None:
    variant = replace(variant, pixels="fp32", step=(-1, 0), pad="normalised")
    case = spec.even(Case(2, 7, 6, (3, 2), 3, variant=variant))
    inputs = case.inputs().to(torch.float64)
    leaves = inputs.map(lambda t: t.contiguous().requires_grad_())
    names = list(leaves.named())

    def fn(*tensors: Tensor) -> Tensor:
        return spec.call(reference.patch_embed, spec.Inputs(**dict(zip(names, tensors))), keywords)

    keywords = case.keywords()
    assert torch.autograd.gradcheck(fn, tuple(leaves.named().values()), fast_mode=True)


@needs_cpu
@dtypes
def test_a_still_image_is_its_own_next_frame(dtype: torch.dtype) -> None:
    still = Case(2, 30, 44, (8, 8), 40, dtype, replace(QWEN, frames=0, merge=1))
    inputs, keywords = still.inputs(), still.keywords()
    video = inputs.images[:, None].expand(-1, 2, -1, -1, -1)
    exact = spec.truth(still)["out"]
    twice = spec.call(CPU, inputs._replace(images=video), keywords)
    eager = spec.call(spec.linear, inputs, keywords)
    assert_close("twice the frame", twice, eager, exact)
    assert_close("once, with the sum", spec.call(CPU, inputs, keywords), eager, exact)


@needs_cpu
@dtypes
@pytest.mark.parametrize("layout", spec.LAYOUTS[:-1])
@pytest.mark.parametrize("pixels", ["u8", "fp32"])
def test_a_layout_changes_no_bit(layout: str, pixels: str, dtype: torch.dtype) -> None:
    """But the order of a patch's pixels, and so that of its sums, which runs as memory does."""
    case = Case(2, 43, 30, (14, 14), 40, dtype, Variant("nchw", pixels))
    planar = ("nchw", "gaps", "planes")
    like = replace(case, variant=Variant("nchw" if layout in planar else "nhwc", pixels))
    ours = evaluate(replace(case, variant=Variant(layout, pixels)))
    for name, value in evaluate(like).items():
        got = ours[name]
        if name == "images.grad" and spec.is_nhwc(layout) != spec.is_nhwc(like.variant.layout):
            got = got.movedim(-1, -3) if spec.is_nhwc(layout) else got.movedim(-3, -1)
        assert torch.equal(got, value), name


@needs_cpu
@dtypes
def test_an_image_does_not_know_its_neighbours(dtype: torch.dtype) -> None:
    """Blocks of tokens run over the ends of images: bitwise the same, alone or in a batch."""
    for variant in (Variant(pixels="fp32"), EVERYTHING, replace(QWEN, frames=2)):
        case = spec.even(Case(5, 40, 44, (8, 8), 40, dtype, variant))
        inputs, keywords = case.inputs(), case.keywords()
        whole = spec.call(CPU, inputs, keywords)
        for i in range(case.b):
            one = [
                x if x is None or x.dim() < 3 or len(x) != case.b else x[i : i + 1]
                for x in (inputs.images, None, None, inputs.pos, inputs.prefix, None)
            ]
            one[1], one[2], one[5] = inputs.weight, inputs.bias, inputs.newline
            assert torch.equal(spec.call(CPU, spec.Inputs(*one), keywords), whole[i : i + 1])


@needs_cpu
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_bad_pixel_spoils_its_patches_only(layout: str, value: float) -> None:
    case = Case(2, 24, 40, (8, 8), 20, variant=Variant(layout, "fp32"))
    inputs = case.inputs()
    place = (1, 9, 17, 2) if layout == "nhwc" else (1, 2, 9, 17)
    inputs.images[place] = value
    out = spec.call(CPU, inputs, case.keywords())
    spoiled = ~out.isfinite().all(-1)
    assert spoiled.nonzero().tolist() == [[1, 1 + 1 * 5 + 2]]


@needs_cpu
def test_nothing_outside_is_read() -> None:
    """Images whose last pixel is the last byte of their storage; what is there before is NaN."""
    for layout, c in product(("nchw", "nhwc"), (1, 3)):
        case = Case(
            1, 16, 24, (8, 8), 20, variant=replace(PLAIN, layout=layout, pixels="fp32"), c=c
        )
        inputs = case.inputs()
        storage = torch.full((7 + inputs.images.numel(),), math.nan)
        images = storage[7:].view(inputs.images.shape).copy_(inputs.images)
        got = spec.call(CPU, inputs._replace(images=images), case.keywords())
        assert torch.equal(got, spec.call(CPU, inputs, case.keywords()))


@needs_cpu
def test_uninitialized_memory_is_not_used() -> None:
    """With NaN in every allocation; gradients of pixels between patches are 0."""
    case = Case(2, 30, 44, (8, 8), 40, variant=Variant(pixels="fp32", step=(3, 5)))
    wanted = evaluate(case)
    torch.use_deterministic_algorithms(True)  # and fill_uninitialized_memory, which is the default
    try:
        vlm_kernels.empty_cache()
        same(evaluate(case), wanted)
    finally:
        torch.use_deterministic_algorithms(False)
    gap = wanted["images.grad"][:, :, 8:11]
    assert not gap.any()
    assert wanted["images.grad"][:, :, :8, :8].all()


@backends
@dtypes
def test_empty(dtype: torch.dtype, backend: str) -> None:
    fn = partial(vlm_kernels.patch_embed, backend=backend)
    for variant in (Variant(pixels="fp32"), replace(QWEN, frames=2)):
        case = Case(0, 16, 16, (8, 8), 20, dtype, variant)
        results = evaluate(case, fn)
        assert results["out"].shape == (0, case.tokens, 20)
        for name, grad in results.items():
            assert not grad.any()
            if name != "out":
                assert grad.shape == case.inputs().named()[name.removesuffix(".grad")].shape
    # no frames
    case = Case(2, 16, 16, (8, 8), 20, dtype, replace(QWEN, frames=2, prefix=1, bias=False))
    inputs = case.inputs()
    inputs = inputs._replace(images=inputs.images[:, :0])
    results = spec.evaluate(fn, inputs, case.keywords())
    assert torch.equal(results["out"], inputs.prefix.expand(2, 1, 20))
    assert not results["weight.grad"].any()


# --- autograd ---


LEAVES = spec.Inputs._fields
ALL = replace(EVERYTHING, pixels="fp32")


@backends
@pytest.mark.parametrize(
    "wanted",
    [(name,) for name in LEAVES] + [LEAVES[1:3], LEAVES[::2], LEAVES[3:], ("images", "weight")],
    ids="+".join,
)
def test_only_some_gradients(wanted: tuple[str, ...], backend: str) -> None:
    """As with a locked stem, or one whose pixels are learnt."""
    case = Case(2, 30, 44, (8, 8), 40, variant=ALL)
    inputs = case.inputs()
    for name, leaf in inputs.named().items():
        leaf.requires_grad_(name in wanted)
    out = spec.call(partial(vlm_kernels.patch_embed, backend=backend), inputs, case.keywords())
    out.backward(spec.gradient(out.detach()))
    for name, leaf in inputs.named().items():
        if name in wanted:
            assert leaf.grad is not None
            spec.check_result(case, f"{name}.grad", leaf.grad)
        else:
            assert leaf.grad is None


@backends
def test_no_gradient_wanted(backend: str) -> None:
    fn = partial(vlm_kernels.patch_embed, backend=backend)
    case = Case(2, 16, 16, (8, 8), 20)
    plain = spec.call(fn, case.inputs(), case.keywords())
    assert not plain.requires_grad
    leaves = case.inputs().leaves()
    assert spec.call(fn, leaves, case.keywords()).requires_grad
    with torch.no_grad():
        without = spec.call(fn, leaves, case.keywords())
    with torch.inference_mode():
        inference = spec.call(fn, leaves, case.keywords())
    assert not without.requires_grad
    assert inference.is_inference()
    for value in (without, inference):
        assert torch.equal(value.clone(), plain)


@backends
@dtypes
def test_backward_twice_is_the_same(dtype: torch.dtype, backend: str) -> None:
    case = Case(2, 30, 44, (8, 8), 40, dtype, ALL)
    leaves = case.inputs().leaves()
    out = spec.call(partial(vlm_kernels.patch_embed, backend=backend), leaves, case.keywords())
    wanted = list(leaves.named().values())
    first = torch.autograd.grad(out.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(out.sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@needs_cpu
def test_gradients_of_tokens_in_any_layout() -> None:
    """Of a slice of a wider tensor, and the expanded one of a sum."""
    case = Case(2, 30, 44, (8, 8), 40)
    leaves = case.inputs().leaves()
    wanted = [leaves.weight, leaves.bias, leaves.pos, leaves.prefix]
    out = spec.call(CPU, leaves, case.keywords())
    wide = torch.randn(2, case.tokens, 100)
    for grad in (wide[..., 7:47], wide[..., :80:2], wide[:1, :1, :1].expand(out.shape)):
        given = torch.autograd.grad(out, wanted, grad, retain_graph=True)
        plain = torch.autograd.grad(out, wanted, grad.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(given, plain, strict=True))


@needs_cpu
def test_input_changed_between_forward_and_backward() -> None:
    leaves = (case := Case(1, 16, 16, (8, 8), 8, variant=Variant(pixels="fp32"))).inputs()
    leaves.weight.requires_grad_()
    out = spec.call(CPU, leaves, case.keywords())
    leaves.images.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


@needs_cpu
def test_two_graphs_alive() -> None:
    """What a forward keeps for its backward must outlive another forward."""
    case = Case(2, 30, 44, (8, 8), 40, variant=ALL)
    keywords = case.keywords()
    wanted = [spec.evaluate(CPU, case.inputs(seed), keywords) for seed in range(2)]
    leaves = [case.inputs(seed).leaves() for seed in range(2)]
    outs = [spec.call(CPU, each, keywords) for each in leaves]
    for i in (1, 0):
        outs[i].backward(spec.gradient(outs[i].detach()))
    for i in range(2):
        for name, leaf in leaves[i].named().items():
            assert torch.equal(leaf.grad, wanted[i][f"{name}.grad"]), name


@needs_cpu
def test_fp64_runs_on_the_reference_and_explain_says_why() -> None:
    case = Case(1, 16, 16, (8, 8), 8, torch.float64)
    inputs, keywords = case.inputs(), case.keywords()
    out = spec.call(vlm_kernels.patch_embed, inputs, keywords)
    assert out.dtype == torch.float64
    assert torch.equal(out, spec.call(reference.patch_embed, inputs, keywords))
    with pytest.raises(RuntimeError, match=r"weight is torch\.float64; the kernels take float32"):
        spec.call(CPU, inputs, keywords)
    with pytest.raises(RuntimeError, match=r"images is torch\.float64; the kernels take uint8"):
        CPU(torch.zeros(1, 3, 8, 8, dtype=torch.float64), inputs.weight.float(), patch_size=8)
    text = vlm_kernels.explain("patch_embed", *inputs[:2], patch_size=8)
    assert "auto runs reference" in text
    text = vlm_kernels.explain("patch_embed", *inputs.to(torch.float32)[:2], patch_size=8)
    assert "auto runs cpu" in text


# --- determinism, threads, instruction sets ---

# Blocks of tokens over several images, features of several tiles, patches that overlap, gaps.
TELLING = [
    Case(7, 72, 72, (8, 8), 129),
    Case(7, 72, 72, (8, 8), 129, torch.bfloat16, Variant("nhwc", "fp32")),
    Case(3, 61, 95, (30, 30), 200, torch.float16, Variant("crop", "bf16", newline=True)),
    Case(3, 50, 50, (9, 7), 70, torch.bfloat16, ALL),
    Case(3, 50, 50, (9, 7), 70, variant=replace(ALL, step=(1, 2))),
    Case(2, 56, 56, (14, 14), 130, torch.bfloat16, replace(QWEN, frames=4, pixels="fp32")),
]
telling = pytest.mark.parametrize("case", TELLING, ids=str)


@needs_cpu
@telling
def test_bitwise_repeat_on_any_number_of_threads(case: Case) -> None:
    results = []
    for count in (1, 1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(evaluate(case))
    for other in results[1:]:
        same(results[0], other)


@needs_cpu
@telling
def test_each_way_to_split_the_work(case: Case, isas: Callable[[], Iterator[str]]) -> None:
    for _ in isas():
        spec.check(case, CPU)


@needs_cpu
@telling
def test_calls_from_several_threads(case: Case) -> None:
    """They must not share scratch."""
    inputs, keywords = [case.inputs(seed) for seed in range(3)], case.keywords()

    def run(each: spec.Inputs) -> dict[str, Tensor]:
        return spec.evaluate(CPU, each, keywords)

    wanted = [run(each) for each in inputs]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(run, inputs * 2))
    for i, results in enumerate(got):
        same(results, wanted[i % 3])


# --- wrong input ---

IMAGES = torch.zeros(2, 3, 16, 24)
WEIGHT = torch.zeros(5, 3 * 64)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"images": [1.0]}, TypeError, "images and weight are list and Tensor"),
    "bias not a tensor": ({"bias": 1.0}, TypeError, "bias is float, expected a tensor"),
    "pos not a tensor": ({"pos": [1.0]}, TypeError, "pos is list, expected a tensor"),
    "dims": ({"images": IMAGES[0]}, ValueError, r"shape .?3, 16, 24.*expected"),
    "pixels of int64": ({"images": IMAGES.long()}, (TypeError, RuntimeError), "Long|int64"),
    "pixels of bool": ({"images": IMAGES.bool()}, (TypeError, RuntimeError), "Bool|bool"),
    "complex": ({"images": IMAGES.cfloat()}, (TypeError, RuntimeError), "Complex|complex"),
    "weight of uint8": (
        {"weight": WEIGHT.byte()},
        (TypeError, RuntimeError),
        "weight.*(Byte|uint8)",
    ),
    "too small": ({"images": IMAGES[..., :7, :]}, ValueError, "7 x 24 pixels, smaller.*8 x 8"),
    "too narrow": ({"images": IMAGES[..., :5]}, ValueError, "16 x 5 pixels, smaller.*8 x 8"),
    "the other layout": ({"layout": "nhwc"}, ValueError, "3 x 16 pixels.*layout"),
    "channels": ({"images": IMAGES[:, :2]}, ValueError, r"weight.*5, 192.*128"),
    "columns": ({"weight": WEIGHT[:, 1:]}, ValueError, r"weight.*5, 191.*192"),
    "weight of one dimension": ({"weight": WEIGHT[0]}, ValueError, r"weight.*192"),
    "patch": ({"patch_size": 16}, ValueError, r"weight.*5, 192.*768"),
    "native": ({"weight": WEIGHT.view(5, 3, 4, 16)}, ValueError, r"weight.*5, 3, 4, 16"),
    "native in yxc": (
        {"weight": WEIGHT.view(5, 8, 8, 3), "k_order": "yxc"},
        ValueError,
        "weight.*5, 8, 8, 3",
    ),
    "mean": ({"mean": (0.5, 0.5)}, ValueError, "mean.*(2|0.5, 0.5).*3"),
    "std": ({"std": (0.5,) * 4}, ValueError, "std.*(4|0.5).*3"),
    "std of 0": ({"std": (0.5, 0.0, 0.5)}, ValueError, "std.*0"),
    "mean of nan": ({"mean": (0.5, math.nan, 0.5)}, ValueError, "mean.*nan"),
    "mean as a tensor": ({"mean": torch.zeros(3)}, TypeError, "mean is Tensor.*tolist"),
    "mean as a number": ({"mean": 0.5}, TypeError, "mean is float.*sequence"),
    "rescale": ({"rescale": 0.0}, ValueError, "rescale.*0"),
    "rescale of inf": ({"rescale": math.inf}, ValueError, "rescale.*inf"),
    "rescale as text": ({"rescale": "1"}, TypeError, "rescale is str, expected a number"),
    "patch of 0": ({"patch_size": 0}, ValueError, "patch_size.*0"),
    "patch of three": ({"patch_size": (2, 8, 8)}, ValueError, r"patch_size is \(2, 8, 8\)"),
    "patch of a float": ({"patch_size": 8.0}, ValueError, "patch_size is 8.0"),
    "patch of floats": ({"patch_size": (8.0, 8.0)}, TypeError, r"patch_size\[0\] is float"),
    "stride of 0": ({"stride": (0, 8)}, ValueError, "stride.*0, 8"),
    "layout": ({"layout": "hwc"}, ValueError, "layout is 'hwc'.*'nchw', 'nhwc'"),
    "k_order": ({"k_order": "cxy"}, ValueError, "k_order is 'cxy'"),
    "pad_space": ({"pad_space": "normalized"}, ValueError, "pad_space is 'normalized'"),
    "merge": ({"merge": 0}, ValueError, "merge.*0"),
    "merge of rows": ({"merge": 3}, ValueError, "2 x 3 patches.*merge = 3"),
    "merge as text": ({"merge": "2"}, TypeError, "merge is str"),
    "temporal": ({"temporal": 0}, ValueError, "temporal.*0"),
    "temporal weight": ({"temporal": 2}, ValueError, "weight.*5, 192.*384"),
    "frames": (
        {
            "images": torch.zeros(1, 3, 3, 16, 24),
            "weight": torch.zeros(5, 384),
            "temporal": 2,
        },
        ValueError,
        "3 frames.*temporal = 2",
    ),
    "bias": ({"bias": torch.zeros(6)}, ValueError, r"bias has shape .?6.*\(5,\)"),
    "bias of integers": ({"bias": torch.zeros(5).int()}, TypeError, "bias is (Int|torch.int32)"),
    "newline": ({"newline": torch.zeros(1, 5)}, ValueError, r"newline has shape .?1, 5.*\(5,\)"),
    "newline and merge": (
        {"newline": torch.zeros(5), "merge": 2, "images": torch.zeros(2, 3, 16, 16)},
        ValueError,
        "newline came with merge = 2",
    ),
    "prefix": ({"prefix": torch.zeros(5)}, ValueError, "prefix has shape .?5"),
    "prefix's batch": ({"prefix": torch.zeros(3, 1, 5)}, ValueError, "prefix.*3, 1, 5"),
    "pos": ({"pos": torch.zeros(7, 5)}, ValueError, "pos has shape .?7, 5.*6"),
    "pos without a prefix": ({"pos": torch.zeros(8, 5)}, ValueError, "pos has shape .?8, 5"),
    "pos of E": ({"pos": torch.zeros(6, 4)}, ValueError, "pos has shape .?6, 4"),
    "pos's batch": ({"pos": torch.zeros(3, 6, 5)}, ValueError, "pos has shape .?3, 6, 5"),
    "pos of integers": ({"pos": torch.zeros(6, 5).long()}, TypeError, "pos is (Long|torch.int64)"),
    "backend": ({"backend": "tpu"}, ValueError, "backend 'tpu'"),
}


@backends
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_clear_error(name: str, backend: str) -> None:
    given, error, words = WRONG[name]
    # RuntimeError: a backend that was asked for and says why it cannot.
    arguments = {"images": IMAGES, "weight": WEIGHT, "patch_size": 8, "backend": backend}
    with pytest.raises(error, match=words) as caught:
        vlm_kernels.patch_embed(**{**arguments, **given})
    assert str(caught.value).startswith("patch_embed")


@needs_cpu
def test_other_devices_are_named() -> None:
    other = torch.zeros(5, device="meta")
    with pytest.raises(ValueError, match="bias is on meta"):
        vlm_kernels.patch_embed(IMAGES, WEIGHT, other, patch_size=8, backend="reference")
    with pytest.raises(RuntimeError, match="weight is on meta"):
        CPU(IMAGES, WEIGHT.to("meta"), patch_size=8)


def test_what_the_yardstick_holds_ours_to_is_no_accident() -> None:
    """A token too far to the right, a channel's mean taken twice, a bias left out: all are seen."""
    case = Case(2, 30, 44, (8, 8), 40, torch.bfloat16)
    wrong: dict[str, Callable[[spec.Inputs, dict[str, Any]], Tensor]] = {
        "shifted": lambda i, k: spec.call(spec.linear, i, k).roll(1, 1),
        "mean": lambda i, k: spec.call(spec.linear, i, {**k, "mean": (0.49, 0.458, 0.408)}),
        "bias": lambda i, k: spec.call(spec.linear, i._replace(bias=None), k),
        "pad": lambda i, k: spec.call(spec.linear, i, {**k, "pad_space": "normalised"}),
    }
    for fn in wrong.values():
        out = fn(case.inputs(), case.keywords())
        with pytest.raises(AssertionError, match="limit"):
            spec.check_result(case, "out", out)


def test_flops_and_bytes() -> None:
    case = Case(16, 224, 224, (16, 16), 768)
    assert spec.flops(case, "fwd") == 2 * 16 * 196 * 768 * 768
    assert spec.flops(case, "full") == 2 * spec.flops(case, "fwd")
    floating = replace(case, variant=Variant(pixels="fp32"))
    assert spec.flops(floating, "full") == 3 * spec.flops(case, "fwd")
    video = Case(1, 28, 28, (14, 14), 8, variant=replace(QWEN, frames=4))
    assert spec.flops(video, "fwd") == 2 * 8 * (2 * 3 * 14 * 14) * 8
    still = replace(video, variant=replace(QWEN, frames=0))
    assert spec.flops(still, "fwd") == 2 * 4 * (3 * 14 * 14) * 8
    moved = 16 * 3 * 224 * 224 + 4 * (768 * 768 + 196 * 768 + 16 * 197 * 768)
    assert spec.bytes_moved(case, "fwd") == moved
    assert (
        F.conv2d(torch.zeros(1, 3, 224, 224), torch.zeros(1, 3, 16, 16), stride=16).numel() == 196
    )
