"""The checkers themselves: what they must accept, and above all what they must refuse."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_kernels import reference
from vlm_kernels.testing import timing, tolerances
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Case, Variant
from vlm_kernels.testing.tolerances import TABLE, ULP, assert_close, relative_error

EXACT = torch.linspace(-1, 1, 1000, dtype=torch.float64)


def off_by(error: float, exact: Tensor = EXACT) -> Tensor:
    """`exact` with a relative error of this size in every element."""
    sign = 1 - 2 * (torch.arange(exact.numel()) % 2)
    return exact + error * torch.linalg.vector_norm(exact) / math.sqrt(exact.numel()) * sign


@pytest.mark.parametrize("kind", TABLE)
def test_limit(kind: str) -> None:
    """Just inside and just outside of factor x eager + a few ulp."""
    eager, rule = 1e-4, TABLE[kind]
    limit = rule.factor * eager + rule.ulps * ULP
    assert_close("x", off_by(0.999 * limit), off_by(eager), EXACT, kind)
    assert_close("x", off_by(0.999 * limit), eager, EXACT, kind)
    with pytest.raises(AssertionError, match=r"x \(" + kind):
        assert_close("x", off_by(1.001 * limit), off_by(eager), EXACT, kind)


def test_floor_where_eager_is_exact() -> None:
    assert_close("x", off_by(3.9 * ULP), EXACT, EXACT)
    with pytest.raises(AssertionError):
        assert_close("x", off_by(4.1 * ULP), EXACT, EXACT)


def test_message_has_both_errors_and_the_first_bad_index() -> None:
    ours = EXACT.reshape(10, 100).clone()
    ours[3, 7] += 1
    ours[5, 0] += 2
    with pytest.raises(AssertionError) as caught:
        assert_close("grad", ours, off_by(1e-5).reshape(10, 100), EXACT.reshape(10, 100), "bwd")
    message = str(caught.value)
    assert "grad (bwd)" in message
    assert "error 1.2" in message  # sqrt(5) over the norm of EXACT, sqrt(1000 / 3)
    assert "eager 1.000e-05" in message
    assert "first bad index (3, 7)" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    ours = EXACT.clone()
    ours[4] = value
    with pytest.raises(AssertionError, match=r"first bad index \(4,\)"):
        assert_close("x", ours, 1e-3, EXACT)
    with pytest.raises(AssertionError, match=r"first bad index \(\)"):
        assert_close("x", ours[4], 1e-3, EXACT[4])
    for eager in (ours, value):
        with pytest.raises(ValueError, match="eager value of x is not finite"):
            assert_close("x", ours, eager, EXACT)
    with pytest.raises(ValueError, match="exact value of x is not finite"):
        assert_close("x", EXACT, 1e-3, ours)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="forward"):
        assert_close("x", EXACT, EXACT, EXACT, "forward")


def test_shapes_do_not_broadcast() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close("x", EXACT[:1], EXACT, EXACT)
    with pytest.raises(ValueError, match="shape"):
        relative_error(EXACT[:1], EXACT)


def test_relative_error() -> None:
    assert relative_error(EXACT, EXACT) == 0
    assert relative_error(off_by(0.25), EXACT) == pytest.approx(0.25)
    assert relative_error(2 * EXACT, EXACT) == pytest.approx(1)
    assert relative_error(EXACT.new_zeros(0), EXACT.new_zeros(0)) == 0
    assert math.isnan(relative_error(EXACT / 0, EXACT))
    # bf16 against fp64: half an ulp at most.
    assert 0 < relative_error(EXACT.bfloat16(), EXACT) < 2**-8


def test_error_is_absolute_where_nothing_is_expected() -> None:
    zero, ours = EXACT.new_zeros(4), EXACT.new_tensor([0.0, 3.0, 4.0, 0.0])
    assert relative_error(ours, zero) == pytest.approx(5)
    assert_close("x", 1e-8 * ours, zero, zero)
    with pytest.raises(AssertionError):
        assert_close("x", 1e-6 * ours, zero, zero)


def test_terms_that_cancel_give_the_unit() -> None:
    exact = torch.tensor(1e-6, dtype=torch.float64)
    ours = exact + 100 * ULP
    with pytest.raises(AssertionError):
        assert_close("loss", ours, exact, exact)
    assert_close("loss", ours, exact, exact, terms=100.0)
    # They only ever make the unit larger.
    assert relative_error(off_by(0.25), EXACT, terms=1e-3) == pytest.approx(0.25)


def test_one_rule() -> None:
    """Two and three times eager's error: DESIGN's numbers, and no field that a test could set."""
    assert {kind: rule.factor for kind, rule in TABLE.items()} == {"fwd": 2, "bwd": 3}
    assert all(rule.ulps <= 4 for rule in TABLE.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE["fwd"].factor = 10  # type: ignore[misc]


# --- the spec's check must find the mistakes that kernels have had ---


def half_the_scale_gradient(*args: Tensor, **keywords: object) -> Tensor:
    image, text, scale, *bias = args
    return reference.clip_loss(image, text, scale / 2 + scale.detach() / 2, *bias, **keywords)


def rounds_logits(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, **_: object) -> Tensor:
    return spec.open_clip_loss(image.bfloat16(), text.bfloat16(), scale, bias).float()


def forgets_the_last_row(*args: Tensor, **keywords: object) -> Tensor:
    image, text, *rest = args
    keep = torch.ones_like(image)
    keep[-1] = 0
    return reference.clip_loss(image * keep + (image * (1 - keep)).detach(), text, *rest)


def flushes_small_gradients(*args: Tensor, **keywords: object) -> Tensor:
    image, text, *rest = args
    flush = lambda g: torch.where(g.abs() < 2e-5, 0, g)  # noqa: E731
    if image.requires_grad:
        image = image * 1
        image.register_hook(flush)
    return reference.siglip_loss(image, text, *rest)


def of_similarity(change: Callable[[Tensor], Tensor], op: str = "clip_loss") -> Any:
    """The loss with one change to the products of the features."""

    def loss(image: Tensor, text: Tensor, *rest: Tensor, **_: object) -> Tensor:
        similarity = change(image.float() @ text.float().T)
        # Times the identity, which is exact, because the reference takes features only.
        return getattr(reference, op)(similarity, torch.eye(len(text)), *rest)

    loss.__name__ = change.__name__
    return loss


@of_similarity
def rounds_one_logit(similarity: Tensor) -> Tensor:
    rounded = similarity.clone()
    rounded[1, 1] = similarity[1, 1].bfloat16()
    return rounded


@of_similarity
def drops_six_bits_of_logits(similarity: Tensor) -> Tensor:
    step = 2.0**-18 * similarity.detach().abs().max()
    return similarity + ((similarity / step).round() * step - similarity).detach()


@of_similarity
def doubles_the_gradient_of_a_row(similarity: Tensor) -> Tensor:
    row = torch.arange(len(similarity))[:, None] == 1
    return torch.where(row, 2 * similarity - similarity.detach(), similarity)


@of_similarity
def rounds_gradients_with_their_divisor(similarity: Tensor) -> Tensor:
    """As small as for N = 30 000, they are less than fp16 has."""
    similarity = similarity * 1
    similarity.register_hook(lambda grad: (grad / 1e4).half().float() * 1e4)
    return similarity


def products_in_tf32(image: Tensor, text: Tensor, *rest: Tensor, **_: object) -> Tensor:
    def cut(x: Tensor) -> Tensor:  # to 11 bits, which fp16 has as well
        return x + (x.half().float() - x).detach()

    return reference.clip_loss(cut(image), cut(text), *rest)


def shares_one_shift(image: Tensor, text: Tensor, scale: Tensor, *_: object) -> Tensor:
    """One maximum for all rows and columns: the sum of an opposed one underflows."""
    logits = image @ text.T * scale
    shift = logits.detach().max()
    e = (logits - shift).exp()
    tiny = torch.finfo(torch.float32).tiny
    row, column = (shift + e.sum(dim).clamp(min=tiny).log().mean() for dim in (1, 0))
    return (row + column) / 2 - logits.diag().mean()


def adds_one_before_the_log(image: Tensor, text: Tensor, *rest: Tensor, **_: object) -> Tensor:
    """log(1 + e), not log1p(e), of negatives."""
    scale, bias = rest
    return (1 + (image @ text.T * scale + bias).exp()).log().sum() / len(image)


SQUARE = Case(64, 64, 32)
TINY = Case(4, 4, 127, data="opposed_column")  # the norm of its gradients averages nothing
FP16 = Case(300, 300, 16, torch.float16, scale=14.3)
NEGATIVES = Variant("siglip_loss", "no_positive")


@pytest.mark.parametrize(
    ("wrong", "case"),
    [
        (half_the_scale_gradient, SQUARE),
        (rounds_logits, SQUARE),
        (rounds_logits, TINY),
        (rounds_one_logit, TINY),
        (drops_six_bits_of_logits, SQUARE),
        (drops_six_bits_of_logits, Case(300, 300, 16)),
        (doubles_the_gradient_of_a_row, Case(300, 300, 16)),
        (doubles_the_gradient_of_a_row, Case(300, 300, 16, torch.bfloat16)),
        (doubles_the_gradient_of_a_row, TINY),
        (rounds_gradients_with_their_divisor, FP16),
        (products_in_tf32, SQUARE),
        (products_in_tf32, TINY),
        (shares_one_shift, replace(SQUARE, data="opposed_row")),
        (shares_one_shift, TINY),
        (adds_one_before_the_log, Case(64, 64, 32, torch.float32, NEGATIVES, 10.0, -16.5)),
        (forgets_the_last_row, Case(300, 300, 16)),
        (forgets_the_last_row, Case(300, 300, 16, torch.bfloat16)),
        (forgets_the_last_row, TINY),
        (flushes_small_gradients, Case(64, 64, 32, torch.float16, NEGATIVES, 10.0, -10.0)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_check_refuses(wrong: Any, case: Case) -> None:
    right = getattr(reference, case.op)
    spec.check(case, right)
    with pytest.raises(AssertionError, match="limit"):
        spec.check(case, lambda *args, **_: wrong(*args))


def test_truth_is_found_once_and_leaves_the_threads_alone() -> None:
    case = Case(20, 20, 8)
    torch.set_num_threads(2)
    assert spec.truth(case) is spec.truth(case)
    assert torch.get_num_threads() == 2
    assert spec.truth(case)["loss"].exact.dtype == torch.float64


def test_scalars_are_judged_by_the_worst_of_the_seeds() -> None:
    case = Case(20, 20, 8)
    exact, lucky, terms = spec.truth(case)["loss"]
    worst = max(spec.truth(case, seed)["loss"].eager for seed in range(tolerances.SEEDS))
    assert worst > lucky
    limit = TABLE["fwd"].factor * worst + TABLE["fwd"].ulps * ULP
    size = max(exact.item(), terms)
    spec.check_result(case, "loss", exact + 0.99 * limit * size)
    with pytest.raises(AssertionError):
        spec.check_result(case, "loss", exact + 1.01 * limit * size)


def test_tensors_with_much_to_average_are_judged_alike_by_all_seeds() -> None:
    """So that the largest error of the seeds is no looser for them than one."""
    case = Case(300, 300, 64, scale=14.3)
    for name in ("image_features.grad", "text_features.grad"):
        errors = [spec.truth(case, seed)[name].eager for seed in range(tolerances.SEEDS)]
        assert max(errors) < 1.1 * min(errors)


def test_the_limit_is_that_of_the_largest_error() -> None:
    errors = [1e-5, 3e-5, 2e-5]
    limit = 2 * 3e-5 + TABLE["fwd"].ulps * ULP
    assert_close("x", off_by(0.999 * limit), iter(errors), EXACT)
    with pytest.raises(AssertionError, match=r"eager 3\.000e-05"):
        assert_close("x", off_by(1.001 * limit), iter(errors), EXACT)


def test_no_seed_more_than_needed() -> None:
    errors = iter([1e-5, 3e-5])
    assert_close("x", off_by(1e-5), errors, EXACT)
    assert list(errors) == [3e-5]


def test_the_error_of_a_product_does_not_depend_on_the_number_of_rows() -> None:
    """As it does in eager, for which the results of few rows would set the limit."""
    x, y, *_ = spec.make_inputs(64, 64, 300)
    few = spec.product_in_order(x[:3], y.T)
    assert torch.equal(few, spec.product_in_order(x, y.T)[:3])
    exact = x[:3].double() @ y.T.double()
    assert 0 < relative_error(few, exact) < spec.DEPTH * ULP


def test_cases_cover_each_choice_with_each_dtype() -> None:
    for op in spec.OPS:
        found = spec.cases(op)
        assert {(c.n, c.dtype) for c in found} >= {(n, t) for n in spec.ROWS for t in spec.DTYPES}
        assert {(c.d, c.dtype) for c in found} >= {(d, t) for d in spec.DIMS for t in spec.DTYPES}
        used = {(c.scale, c.bias, c.dtype) for c in found}
        assert used >= {(*s, t) for s in spec.SCALES for t in spec.DTYPES}
        assert {c.variant for c in found} == set(spec.covering_variants(op))
        assert set(spec.covering_variants(op)) <= set(spec.all_variants(op))
        assert len(set(map(str, spec.all_variants(op)))) == len(spec.all_variants(op))


def test_inputs_look_like_those_of_a_trained_model() -> None:
    image, text, scale, bias = spec.make_inputs(500, 400, 512, scale=14.3, bias=-2.0)
    cosines = image @ text.T
    assert (image.norm(dim=1) - 1).abs().max() < 1e-5
    assert cosines.diag().mean() == pytest.approx(0.3, abs=0.01)
    rest = cosines[~torch.eye(500, 400, dtype=torch.bool)]
    assert rest.mean() == pytest.approx(0.1, abs=0.01)
    assert rest.std() == pytest.approx(0.044, abs=0.01)
    assert (scale.item(), bias.item() if bias is not None else None) == (pytest.approx(14.3), -2.0)


def test_costs() -> None:
    assert spec.flops("clip_loss", 10, 20, 30) == 36_000
    assert spec.flops("siglip_loss", 10, 20, 30, "fwd") == 12_000
    assert spec.bytes_moved("clip_loss", 10, 20, 30, torch.bfloat16) == 3_600
    assert spec.bytes_moved("clip_loss", 10, 20, 30, torch.float32, "fwd") == 3_600


# --- timing ---


def test_interleaved_turns_the_order() -> None:
    order: list[str] = []
    fns = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.interleaved(fns, rounds=3, warmup=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert all(len(t.seconds) == 3 for t in times.values())


def test_interleaved_measures_and_stops() -> None:
    calls = []
    fns = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    times = timing.interleaved(
        fns, min_rounds=3, budget_s=0.2, before=lambda: calls.append(time.sleep(0.01))
    )
    slow, fast = times["slow"], times["fast"]
    assert 0.02 <= slow.p20 <= slow.median <= slow.p80
    assert fast.median < 0.01
    assert 3 <= len(slow.seconds) <= 10
    assert len(calls) == 2 * (2 + len(slow.seconds))


def test_quantiles() -> None:
    times = timing.Timing([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (times.p20, times.median, times.p80) == (2.0, 3.5, 5.0)


SETUP = "import torch; torch.ones(2000, 2000) @ torch.ones(2000, 2000)"


def test_peak_rss_sees_memory_that_is_gone_again() -> None:
    peak = timing.peak_rss_delta(SETUP, "x = torch.ones(64 << 18); del x")
    assert 60 << 20 < peak < 72 << 20


def test_peak_rss_of_nothing() -> None:
    assert timing.peak_rss_delta(SETUP, "pass") < 1 << 20


def test_peak_rss_says_what_failed() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        timing.peak_rss_delta("pass", "1 / 0")


def test_the_table_is_the_only_place_of_tolerances() -> None:
    """Nobody overrides the rule by handing in another one."""
    names = assert_close.__code__.co_varnames[: assert_close.__code__.co_argcount]
    assert names == ("name", "ours", "eager", "exact", "kind")
    assert tolerances.SEEDS == 8
