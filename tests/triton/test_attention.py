"""The forward of attention's Triton backend in the interpreter, against fp64.

A covering subset: each length, each head dim and each variant once. Gradients are in
test_attention_bwd.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_kernels
from vlm_kernels import _backends, _load, reference
from vlm_kernels._triton import _attention_intervals as intervals
from vlm_kernels._triton import _attention_kernels as kernels
from vlm_kernels._triton import _attention_tiles as tiles
from vlm_kernels._triton import attention as backend
from vlm_kernels._triton._attention_call import Call, pieces
from vlm_kernels._triton._compat import INTERPRET
from vlm_kernels.reference.attention import _visible
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import AnyCase, Case, Variant, VarlenCase

attention = partial(vlm_kernels.attention, backend="triton", return_lse=True)
attention_varlen = partial(vlm_kernels.attention_varlen, backend="triton", return_lse=True)
EVERYTHING = Variant("causal_window", "additive", "1hqk", 0.2, 4.0, "half", "rms", True, "gaps")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def forward(case: AnyCase) -> tuple[Tensor, Tensor]:
    fn = attention if case.op == "attention" else attention_varlen
    out, lse = spec.call(fn, case.inputs(), case.keywords())
    return out, lse


def check(case: AnyCase) -> None:
    """The rule of accuracy, and exact zeros for queries that see no key."""
    out, lse = forward(case)
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
    with torch.enable_grad():  # the yardsticks have gradients too
        spec.check_result(case, "out", out)
        spec.check_result(case, "lse", lse)
        empty = spec.truth(case).exact["lse"] == -torch.inf
    assert not out[empty.mT if case.op == "attention_varlen" else empty].any()


def test_this_is_the_interpreter() -> None:
    assert INTERPRET.value


# --- accuracy ---


def shape_cases() -> Iterator[Case]:
    """Each length as that of the queries or of the keys, each head dim, in turns."""
    for i, d in enumerate(spec.DIMS):
        n = spec.LENGTHS[i % len(spec.LENGTHS)]
        nq, nk = (n, n) if n < 100 else (n, 7) if i % 2 else (19, n)
        layout = spec.LAYOUTS[i % len(spec.LAYOUTS)]
        yield Case(1, 1, nq, nk, d, spec.DTYPES[i % 3], Variant(layout=layout))
    for i, (d, dv) in enumerate(((24, 56), (80, 5), (7, 100))):
        yield Case(2, 4, 20, 33, d, spec.DTYPES[i], Variant("causal"), kv_heads=i % 2 + 1, dv=dv)


@pytest.mark.parametrize("case", list(shape_cases()), ids=str)
def test_each_shape(case: Case) -> None:
    check(case)


def variant_cases() -> Iterator[Case]:
    for i, variant in enumerate(spec.covering_variants()):
        yield Case(2, 2, 16, 80, 24, spec.DTYPES[i % 3], variant, kv_heads=1 if i % 4 else None)
    for i, keys in enumerate(("causal", "window", "image_blocks", "range")):
        yield Case(1, 1, 70, 200, 24, spec.DTYPES[i % 3], Variant(keys))


@pytest.mark.parametrize("case", list(variant_cases()), ids=str)
def test_each_variant(case: Case) -> None:
    check(case)


def test_masks_of_broadcast_shapes() -> None:
    for i, shape in enumerate(spec.MASK_SHAPES[::2]):
        variant = Variant(mask=("bool", "additive_inf")[i // 2 % 2], mask_shape=shape)
        check(Case(2, 2, 5, 7, 16, spec.DTYPES[i % 3], variant))


SEGMENTS = ((33, 65), (0, 4), (7, 0), (3, 3), (5, 9), (1, 70))


def varlen_cases() -> Iterator[VarlenCase]:
    for i, variant in enumerate(spec.covering_variants("attention_varlen")):
        # the query of a rotated segment is at the place of one of its keys
        fit = SEGMENTS if variant.rope == "none" else tuple(s for s in SEGMENTS if s[0] <= s[1])
        index = (torch.int32, torch.int64)[i % 2]
        yield VarlenCase(
            fit, 2, 24, spec.DTYPES[i % 3], variant, kv_heads=1 + i % 2, outside=i % 3, index=index
        )
    for i, segments in enumerate((((1, 1),), ((0, 0),), (), ((64, 64), (64, 64), (2, 2)))):
        yield VarlenCase(segments, 2, 80, spec.DTYPES[i % 3], outside=i % 3)
    yield VarlenCase(((1, 70), (1, 33), (0, 2)), 4, 24, torch.bfloat16, kv_heads=1, outside=1)


@pytest.mark.parametrize("case", list(varlen_cases()), ids=str)
def test_packed(case: VarlenCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", spec.DTYPES, ids=str)
def test_huge_logits(dtype: torch.dtype) -> None:
    for variant in (Variant(), Variant("causal", scale=-1.0), Variant(softcap=50.0)):
        check(Case(1, 1, 20, 90, 32, dtype, variant, logit=1000.0))


@pytest.mark.parametrize("dtype", spec.DTYPES, ids=str)
def test_lowest_number_as_mask(dtype: torch.dtype) -> None:
    """No -inf: a row of nothing else is a plain average."""
    q, k, v, *_ = spec.make_inputs(1, 1, 6, 70, 16, dtype)
    mask = torch.zeros(6, 70, dtype=dtype)
    mask[:3] = mask[3:, 9:] = torch.finfo(dtype).min
    out, _ = attention(q, k, v, mask)
    exact = reference.attention(*(t.double() for t in (q, k, v)), mask.double())
    eager = reference.attention(q, k, v, mask)
    vlm_kernels.testing.tolerances.assert_close("out", out, eager, exact)


# --- keys shared by programs ---

SHARED = [
    Case(1, 1, 1, 520, 40, torch.bfloat16),
    Case(1, 2, 16, 300, 64, torch.float16, Variant("range_heads"), kv_heads=1),
    Case(1, 1, 5, 520, 24, torch.float32, replace(EVERYTHING, keys="range_each")),
    Case(1, 1, 17, 300, 7, torch.bfloat16, Variant(layout="bhnd", mask="bool")),
    VarlenCase(((3, 400), (2, 5), (1, 300)), 1, 24, torch.bfloat16, Variant("causal"), outside=2),
]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_few_queries_and_many_keys(case: AnyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with one multiprocessor and with many."""
    grids, combine = [], kernels.combine_kernel

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return combine[grid]

    monkeypatch.setattr(kernels, "combine_kernel", Spy())
    for count in (1, 132):
        monkeypatch.setattr(tiles, "multiprocessors", lambda _device, count=count: count)
        check(case)
        assert len(grids) == (count > 1)


# --- repeats, memory that nobody wrote, what is not seen ---

TELLING = [
    Case(1, 2, 70, 129, 40, torch.bfloat16, Variant("causal")),
    Case(1, 1, 5, 300, 72, torch.float32, EVERYTHING),
    VarlenCase(SEGMENTS[:4], 2, 24, torch.float16, outside=3),
]
telling = pytest.mark.parametrize("case", TELLING, ids=str)


@telling
def test_bitwise_repeat(case: AnyCase) -> None:
    for first, second in zip(forward(case), forward(case), strict=True):
        assert torch.equal(first, second)


@telling
def test_uninitialised_memory_is_not_read(case: AnyCase) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        check(case)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", spec.DTYPES, ids=str)
def test_what_is_not_seen_has_no_effect(dtype: torch.dtype) -> None:
    """NaN among the keys, and among the values of keys that no query of the tile sees."""
    q, k, v, *_ = spec.make_inputs(1, 2, 20, 150, 16, dtype)
    kv_range = torch.tensor([30, 130], dtype=torch.int32).expand(1, 1, 20, 2)
    out, lse = attention(q, k, v, kv_range=kv_range)
    for x in (k, v):
        x[:, :, :30] = x[:, :, 130:] = torch.nan
    k[:, :, 40] = torch.nan
    again, lse_again = attention(q, k, v, kv_range=kv_range)
    assert again.isnan().all()
    assert lse_again.isnan().all()
    k[:, :, 40] = 0
    again, lse_again = attention(q, k, v, kv_range=kv_range)
    assert again.isfinite().all()
    k[:, :, 40] = spec.make_inputs(1, 2, 20, 150, 16, dtype).key[:, :, 40]
    again, lse_again = attention(q, k, v, kv_range=kv_range)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


def test_a_bad_query_spoils_its_row_only() -> None:
    q, k, v, *_ = spec.make_inputs(1, 1, 5, 20, 16)
    q[0, 0, 2, 3] = torch.nan
    out, _ = attention(q, k, v)
    assert out.isnan().any(-1)[0, 0].tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)], ids=str)
def test_empty(shape: tuple[int, int, int, int]) -> None:
    b, h, nq, nk = shape
    q, k, v = (torch.randn(b, h, n, 8) for n in (nq, nk, nk))
    out, lse = torch.ops.vlm_kernels_triton.attention_fwd(
        *(q, k, v, None, None, None, None, True, -1, -1, None, 0.0, None, None, False),
        *(None, None, 0.0, False) * 2,
    )
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_layout_of_the_result(layout: str) -> None:
    """(B, N, H, D) data for such."""
    case = Case(2, 3, 5, 6, 8, torch.bfloat16, Variant(layout=layout, rope="half"))
    out, lse = forward(replace(case, nk=9))
    rows = out if layout == "bhnd" else out.transpose(1, 2)
    assert rows.is_contiguous()
    assert lse.is_contiguous()


# --- intervals ---


def test_intervals_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for keys, (nq, nk) in product(spec.KEYS, ((9, 14), (17, 8), (1, 1))):
        keywords = spec.KEYS[keys](2, 3, nq, nk, generator)
        is_causal, kv_range = keywords.get("is_causal", False), keywords.get("kv_range")
        left, right = window = keywords.get("window", (-1, -1))
        rows, _ = intervals.intervals(
            nq, nk, torch.device("cpu"), is_causal, left, right, kv_range, None, None
        )
        shape = torch.zeros(1, 1, nq, 1), torch.zeros(1, 1, nk, 1)
        exact = _visible(*shape, 0, is_causal, window, kv_range)
        if rows is None:
            assert exact is None or exact.all()
            continue
        assert rows.dtype == torch.int32
        assert rows.is_contiguous()
        begin, end = rows.unbind(-1)
        assert ((begin >= 0) & (begin <= end) & (end <= nk)).all()
        assert not rows[begin == end].any()
        j = torch.arange(nk)
        seen = (begin[..., None] <= j) & (j < end[..., None])
        assert exact is not None
        assert torch.equal(*torch.broadcast_tensors(seen, exact))


@pytest.mark.parametrize(
    "offsets", [(3, -7, 2**40, 1), (0, 0, 0, 0), (11, 5, 2, 0), (-9, 99, -9, 99), (0,)], ids=str
)
def test_any_offsets_stay_within_the_rows(offsets: tuple[int, ...]) -> None:
    """On a device they are not checked."""
    cu = torch.tensor(offsets)
    for window in ((-1, -1), (2, 1)):
        rows, places = intervals.intervals(11, 6, cu.device, True, *window, None, cu, cu.flip(0))
        assert rows is not None
        assert places is not None
        begin, end = rows.unbind(-1)
        assert ((begin >= 0) & (begin <= end) & (end <= 6)).all()
        assert ((places >= 0) & (places < 6)).all()


class Waits(TorchDispatchMode):
    """Raises where the host would wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        assert func.overloadpacket.__name__ not in waiting
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    cu = torch.tensor([0, 3, 9])
    q, table = torch.randn(9, 2, 8), torch.ones(9, 4)
    norms = (torch.ones(8), None, 1e-6, False) * 2
    kv_range = torch.tensor([2, 7], dtype=torch.int32).expand(1, 1, 9, 2)
    dense = q.transpose(0, 1)[None]
    with Waits():
        Call(q, q, q, None, None, cu, cu, True, 2, -1, None, 0.0, table, table, False, *norms)
        Call(
            *(dense, dense, dense, torch.ones(9, 9) > 0, kv_range, None, None, True, 2, -1, None),
            *(0.0, table, table, False, *norms),
        )


# --- tiles ---


def test_pieces_cover_a_head_dim() -> None:
    known = {64: (64,), 72: (64, 16), 80: (64, 16), 88: (64, 32), 96: (64, 32), 128: (128,)}
    known |= {104: (64, 32, 16), 112: (64, 32, 16), 1: (16,), 17: (32,), 200: (128, 64, 16)}
    for dim in range(1, 257):
        found = pieces(dim)
        assert dim <= sum(found) < dim + 32
        assert list(found) == sorted(found, reverse=True)
        assert all(size == 0 or (size >= 16 and size.bit_count() == 1) for size in found)
        if dim in known:
            assert found[: len(known[dim])] == known[dim]
            assert sum(found) == sum(known[dim])


@pytest.mark.parametrize("arch", [80, 90])
def test_every_tile_is_one_of_those_that_ship(arch: int) -> None:
    for size, dim, masked in product((2, 4), (16, 80, 256), (False, True)):
        shipped = tiles.shipped(arch, size, dim, masked)
        for queries, heads in product((1, 16, 17, 64, 197, 257, 1024), (1, 16, 4096)):
            tile = tiles.choose(arch, size, dim, masked, queries, heads, 132)
            assert tile in shipped
            assert tile.queries == 16 or queries > tile.queries // 2


# --- the op ---


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == backend.NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


OP_CASES = [
    Case(1, 1, 5, 9, 8, torch.bfloat16, replace(EVERYTHING, norm="layer")),
    Case(1, 2, 5, 9, 8, variant=Variant("range", layout="bhnd"), dv=3),
    VarlenCase(((3, 4), (2, 2)), 1, 8, torch.float16, Variant("causal", rope="half")),
]


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck(case: AnyCase) -> None:
    with Recorder() as recorder:
        forward(case)
    ((func, args),) = recorder.calls
    torch.library.opcheck(func, args)


def test_opcheck_with_gradients() -> None:
    """The node at the Autograd key, seen by AOTAutograd."""
    with Recorder() as recorder:
        forward(Case(1, 1, 3, 5, 8, torch.float32, Variant(mask="additive", mask_shape="h1k")))
    ((func, args),) = recorder.calls
    wanted = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    ]
    with torch.enable_grad():
        torch.library.opcheck(func, tuple(wanted))


def test_one_derivative() -> None:
    x = torch.randn(1, 1, 3, 8, requires_grad=True)
    with torch.enable_grad():
        out, _ = attention(x, x, x)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="attention has no second derivative"):
            torch.autograd.grad(grad.sum(), x)


@pytest.mark.skipif(_load._C is None, reason="vlm_kernels._C is not built")
@pytest.mark.parametrize("name", backend.SCHEMAS)
def test_schema_is_that_of_the_extension(name: str) -> None:
    ours, other = (
        getattr(getattr(torch.ops, space), name) for space in (backend.NAMESPACE, "vlm_kernels")
    )
    text = str(other.default._schema).removeprefix("vlm_kernels::")
    assert str(ours.default._schema) == f"{backend.NAMESPACE}::{text}"


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_compiles_without_graph_breaks(case: AnyCase) -> None:
    fn = attention if case.op == "attention" else attention_varlen
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    found = spec.call(compiled, case.inputs(), case.keywords())
    torch._dynamo.reset()
    for ours, eager in zip(found, forward(case), strict=True):
        assert torch.equal(ours, eager)


# --- the choice ---


def test_a_fresh_process_finds_every_op() -> None:
    """Triton and our kernels are imported where they are asked for."""
    code = (
        "import sys, torch, vlm_kernels as v\n"
        "assert 'triton' not in sys.modules\n"
        "q, c = torch.ones(1, 1, 2, 8), torch.tensor([0, 2])\n"
        "v.attention(q, q, q, backend='triton')\n"
        "v.attention_varlen(q[0], q[0], q[0], c - c, c - c, backend='triton')\n"
        "x = torch.eye(4, 8)\n"
        "for loss in (v.clip_loss, v.siglip_loss): loss(x, x, 1.0, backend='triton')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", spec.OPS)
def test_can_run_says_why_not(op: str) -> None:
    x = torch.ones(1, 1, 3, 8)
    assert _backends.can_run(op, "triton", x, x, x)
    assert "triton     can run" in vlm_kernels.explain(op, x, x, x)
    for q, k, why in (
        (x.double(), x, r"query is torch\.float64"),
        (x, x.to("meta"), "key is on meta; Triton runs on cpu in the interpreter"),
        (x, x.repeat(1, 1, 1, 33), "key has a head dim of 264; the kernels take up to 256"),
    ):
        with pytest.raises(RuntimeError, match=why):
            _backends.can_run(op, "triton", q, k, x, raise_error=True)


def test_elsewhere_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 1, 3, 8)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "query is on cpu; Triton runs on cuda" in _backends.explain("attention", x, x, x)


def test_wrong_input() -> None:
    x, weight = torch.randn(2, 4, 6, 8), torch.ones(7)
    for error, args, keywords in (
        (ValueError, (x, x[..., :4], x), {}),
        (TypeError, (x, x, x.half()), {}),
        (ValueError, (x, x[:, :2], x[:, :2]), {}),
        (ValueError, (x, x, x), {"window": (1, -3)}),
        (ValueError, (x, x, x), {"softcap": math.nan}),
        (TypeError, (x, x, x), {"attn_mask": torch.ones(6, 6, dtype=torch.int64)}),
        (TypeError, (x, x, x), {"kv_range": torch.ones(1, 1, 6, 2)}),
        (ValueError, (x, x, x), {"q_norm": (weight, None, 1e-6, "rms")}),
    ):
        with pytest.raises(error, match="attention"):
            attention(*args, **keywords)
    for offsets in ([0, 7, 4], [1, 6], [0, 7]):
        cu = torch.tensor(offsets)
        with pytest.raises(ValueError, match="attention_varlen"):
            attention_varlen(x[0].mT[:6], x[0].mT[:6], x[0].mT[:6], cu, cu)
