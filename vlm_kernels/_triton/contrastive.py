"""clip_loss and siglip_loss in Triton: the ops of csrc/ops/contrastive.cpp once more, the same
schemas in the namespace `vlm_kernels_triton`.

Forward of InfoNCE: `stats_kernel` walks the similarity once and leaves partial statistics of rows
and columns, `merge_kernel` merges them in a fixed order. Gradients: blocks of G that fit the
workspace are written by a kernel and multiplied by torch (dX += G Y, dY += G^T X, fp32 sums), so
that nothing is N x M and nothing needs an atomic. What is O(N + M) is torch code. Nothing is read
back to the host.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.contrastive import register_fakes
from . import _contrastive_kernels as kernels
from . import _tiles
from ._compat import INTERPRET

NAMESPACE = "vlm_kernels_triton"
_MEAN, _NONE = 0, 2
_NEED_IMAGE, _NEED_TEXT, _NEED_SCALE, _NEED_BIAS = 1, 2, 4, 8
_BOTH = kernels.ROWS | kernels.COLUMNS
_BLOCK = 4096  # rows and columns of a block of G: 32 MiB in 16 bits
_PROGRAMS = 1024  # of the forward, where the matrix has as many tiles
_MERGE = 128
# G is at most about 4 in size. In fp16 it is stored this much larger, away from the subnormals.
_BOOST = {torch.float16: 4096.0}

_PAIRS = "Tensor? image_ids, Tensor? text_ids, Tensor? labels, Tensor? row_weight, Tensor? "
_PAIRS += "col_weight, "
SCHEMAS = {
    "clip_loss_fwd": "(Tensor image, Tensor text, Tensor? logit_scale, float scale, "
    + _PAIRS
    + "float label_smoothing, bool ignore_same_ids, int directions, int reduction, "
    "int workspace_mb, SymInt kept_panels, bool metrics) -> (Tensor, Tensor, Tensor, Tensor)",
    "clip_loss_bwd": "(Tensor grad, Tensor image, Tensor text, Tensor? logit_scale, float scale, "
    + _PAIRS
    + "float label_smoothing, bool ignore_same_ids, int directions, int reduction, "
    "int workspace_mb, Tensor stats, Tensor kept, int needs) -> (Tensor, Tensor, Tensor)",
    "clip_loss_one_way_fwd": "(Tensor image, Tensor text, Tensor? logit_scale, float scale, "
    + _PAIRS
    + "float label_smoothing, bool ignore_same_ids, int directions, int reduction, "
    "int workspace_mb, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    "clip_loss_one_way_bwd": "(Tensor grad, Tensor? logit_scale, float scale, Tensor formed_image, "
    "Tensor formed_text, Tensor sums, int needs) -> (Tensor, Tensor, Tensor)",
    "siglip_loss_fwd": "(Tensor image, Tensor text, Tensor? logit_scale, float scale, "
    "Tensor? logit_bias, float bias, "
    + _PAIRS
    + "bool ignore_same_ids, int reduction, int workspace_mb, int needs, bool metrics) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "siglip_loss_bwd": "(Tensor grad, Tensor image, Tensor text, Tensor? logit_scale, float scale, "
    "Tensor? logit_bias, float bias, "
    + _PAIRS
    + "bool ignore_same_ids, int reduction, int workspace_mb, Tensor formed_image, "
    "Tensor formed_text, Tensor sums, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
}


class _Pairs:
    """Which pairs are positives: the kernels' ids, and the counts of rows and columns."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        labels: Tensor | None,
        ignore_same_ids: bool,
    ) -> None:
        self.n, self.m = image.shape[0], text.shape[0]
        self.device = image.device
        self.kind = kernels.DIAGONAL
        self.image_ids = self.text_ids = image  # not read
        if labels is not None:  # one that is no row of text matches none
            labels = labels.to(torch.int64)
            self.kind = kernels.IDS
            self.image_ids = torch.where(labels < self.m, labels, -1).to(torch.int32)
            self.text_ids = torch.arange(self.m, dtype=torch.int32, device=self.device)
        elif image_ids is not None and text_ids is not None:
            # their ranks: int64 would cost the kernels twice the registers
            self.kind = kernels.IGNORE_SAME if ignore_same_ids else kernels.IDS
            ids = torch.cat([image_ids.to(torch.int64), text_ids.to(torch.int64)])
            ranks = torch.searchsorted(ids.sort().values, ids, out_int32=True)
            self.image_ids, self.text_ids = ranks[: self.n], ranks[self.n :]

    @functools.cached_property
    def _same(self) -> Tensor:
        """Of each row and column, how many of the other side have its id: (N + M,) int64."""
        sides = (self.image_ids, self.text_ids)
        counts = []
        for ids, others in (sides, sides[::-1]):
            ordered = others.sort().values
            upto = torch.searchsorted(ordered, ids, right=True)
            counts.append(upto - torch.searchsorted(ordered, ids))
        return torch.cat(counts)

    @functools.cached_property
    def positives(self) -> Tensor:
        """(N + M,) fp64."""
        if self.kind == kernels.IDS:
            return self._same.double()
        both = min(self.n, self.m)
        index = torch.cat([torch.arange(k, device=self.device) for k in (self.n, self.m)])
        return (index < both).double()

    @functools.cached_property
    def kept(self) -> Tensor:
        """Entries of each row and column that take part: (N + M,) fp64."""
        n, m = self.n, self.m
        everything = torch.full((n + m,), m, dtype=torch.float64, device=self.device)
        everything[n:] = n
        if self.kind != kernels.IGNORE_SAME:
            return everything
        both = min(n, m)
        on_diagonal = torch.zeros(n + m, dtype=torch.int64, device=self.device)
        equal = self.image_ids[:both] == self.text_ids[:both]
        on_diagonal[:both] = equal
        on_diagonal[n : n + both] = equal
        return everything - self._same + on_diagonal


class _Call:
    """The arguments of one op, as the kernels read them."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | None,
        scale: float,
        pairs: _Pairs,
        workspace_mb: int,
    ) -> None:
        self.image, self.text = _rows_contiguous(image), _rows_contiguous(text)
        (self.n, self.d), self.m = image.shape, text.shape[0]
        self.scale = _scalar(logit_scale, scale, image)
        self.pairs = pairs
        self.budget = workspace_mb << 20
        self.tile = _tiles.choose(
            _tiles.architecture(image.device), image.element_size(), self.n * self.m
        )
        self.boost = _BOOST.get(image.dtype, 1.0)

    @property
    def empty(self) -> bool:
        return self.n == 0 or self.m == 0

    @property
    def sign(self) -> Tensor:
        return torch.where(self.scale < 0, -1.0, 1.0)

    def f32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.image.device)

    def swapped(self) -> _Call:
        """The same similarity with rows and columns exchanged."""
        other = object.__new__(_Call)
        other.__dict__.update(self.__dict__)
        other.image, other.text, other.n, other.m = self.text, self.image, self.m, self.n
        pairs = object.__new__(_Pairs)
        pairs.__dict__.update(self.pairs.__dict__)
        pairs.image_ids, pairs.text_ids = self.pairs.text_ids, self.pairs.image_ids
        other.pairs = pairs
        return other

    def options(self) -> dict[str, Any]:
        """What every kernel that forms similarity is compiled with."""
        tile = self.tile
        return {
            "D": self.d,
            "PRECISION": _precision(),
            "BM": tile.rows,
            "BN": tile.cols,
            "BK": tile.depth,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.text, self.scale

    def sizes(self) -> tuple[int, ...]:
        return self.n, self.m, self.image.stride(0), self.text.stride(0)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _scalar(x: Tensor | None, value: float, like: Tensor) -> Tensor:
    """() fp32 on the device of the features."""
    if x is None:
        return torch.full((), value, dtype=torch.float32, device=like.device)
    return x.detach().to(torch.float32).reshape(())


def _precision() -> str:
    """Of products of fp32: torch's own setting."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# --- products ---


@functools.cache
def _adds_in_fp32(device: torch.device) -> bool:
    """Whether torch.addmm of 16-bit operands adds to an fp32 tensor (before 2.10 it did not)."""
    half = torch.zeros(1, 1, dtype=torch.bfloat16, device=device)
    total = torch.zeros(1, 1, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, half, half, torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _multiply(out: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """out = a @ b, or out += a @ b unless `fresh`; `out` is fp32 and so are the sums."""
    if a.dtype != torch.float32 and not out.is_cuda:
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out) if fresh else out.addmm_(a, b)
    elif fresh:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    elif _adds_in_fp32(out.device):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out += torch.ops.aten.mm.dtype(a, b, torch.float32)


class _Products:
    """dX = factor * G Y and dY = factor * G^T X, block by block."""

    def __init__(self, call: _Call, image: Tensor, text: Tensor, rows: int) -> None:
        self.call, self.image, self.text = call, image, text
        self.of_image, self.of_text = image.dim() == 2, text.dim() == 2
        self.rows = call.f32(rows if self.of_image and image.dtype != torch.float32 else 0, call.d)
        whole = self.of_text and text.dtype != torch.float32
        self.sums = call.f32(call.m, call.d) if whole else text

    def _row_sums(self, row: int, end: int) -> Tensor:
        if self.image.dtype == torch.float32:
            return self.image[row:end]
        return self.rows[: end - row]

    def add(self, grads: Tensor, row: int, col: int) -> None:
        """Takes the block of G that begins at (row, col)."""
        call, (rows, cols) = self.call, grads.shape
        if self.of_image:
            out = self._row_sums(row, row + rows)
            _multiply(out, grads, call.text[col : col + cols], col == 0)
        if self.of_text:
            out = self.sums[col : col + cols]
            _multiply(out, grads.T, call.image[row : row + rows], row == 0)

    def close_rows(self, row: int, end: int, factor: Tensor) -> None:
        """After the last block of these rows."""
        if self.of_image:
            torch.mul(self._row_sums(row, end), factor, out=self.image[row:end])

    def close(self, factor: Tensor) -> None:
        """After the last block."""
        if self.of_text:
            torch.mul(self.sums, factor, out=self.text)


def _block(call: _Call) -> tuple[int, int]:
    """Rows and columns of a block of G, in whole tiles; with its sums it fits the workspace."""
    tile, item = call.tile, call.image.element_size()
    rows = min(_BLOCK, triton.cdiv(call.n, tile.rows) * tile.rows)
    cols = min(_BLOCK, triton.cdiv(call.m, tile.cols) * tile.cols)
    while rows * (cols * item + 4 * call.d) > call.budget and (rows, cols) > (tile.rows, tile.cols):
        if cols > max(rows, tile.cols) or rows == tile.rows:
            cols = triton.cdiv(cols // 2, tile.cols) * tile.cols
        else:
            rows = triton.cdiv(rows // 2, tile.rows) * tile.rows
    return rows, cols


def _blocks(n: int, m: int, rows: int, cols: int) -> Iterator[tuple[int, int, int, int]]:
    for row in range(0, n, rows):
        for col in range(0, m, cols):
            yield row, col, min(rows, n - row), min(cols, m - col)


# --- statistics ---


def _stats(
    call: _Call,
    stats: Tensor,
    directions: int,
    metrics: bool,
    first: int = 0,
    rows: int | None = None,
    similarity: Tensor | None = None,
) -> None:
    """Fills stats (fields, N + M); of `rows` rows from `first` on only those rows, their x too."""
    tile, fields = call.tile, stats.shape[0]
    tiles_across = triton.cdiv(call.m, tile.cols)
    end = call.n if rows is None else first + rows
    by_columns = bool(directions & kernels.COLUMNS)
    most = triton.cdiv(end - first, tile.rows)
    if by_columns:
        most = max(1, min(most, call.budget // (4 * fields * call.m)))
    splits = min(tiles_across, triton.cdiv(_PROGRAMS, most))
    share = triton.cdiv(tiles_across, splits)
    splits = triton.cdiv(tiles_across, share)
    row_parts = call.f32(splits, fields, most * tile.rows)
    col_parts = call.f32(most if by_columns else 0, fields, call.m)
    keep = similarity is not None
    held = similarity if similarity is not None else row_parts
    smoothing = int(fields > 3)

    def merge(parts: Tensor, count: int, out: Tensor, fresh: bool) -> None:
        grid = (triton.cdiv(out.shape[1], _MERGE),)
        kernels.merge_kernel[grid](
            parts, out, call.scale, count, out.shape[1], parts.shape[2], out.stride(0), fields,
            int(fresh), smoothing, METRICS=metrics, B=_MERGE, num_warps=4,
        )  # fmt: skip

    for row in range(first, end, most * tile.rows):
        until = min(row + most * tile.rows, end)
        count = triton.cdiv(until - row, tile.rows)
        kernels.stats_kernel[count, splits](
            *call.operands(), call.pairs.image_ids, call.pairs.text_ids, row_parts, col_parts, held,
            *call.sizes(), held.stride(0), row, row_parts.shape[2], share, call.pairs.kind,
            smoothing, fields,
            DIRECTIONS=directions, METRICS=metrics, KEEP=keep, **call.options(),
        )  # fmt: skip
        if directions & kernels.ROWS:
            merge(row_parts, splits, stats[:, row:until], True)
        if by_columns:
            merge(col_parts, count, stats[:, call.n :], row == first)


class _Sides:
    """Weights and counts of all rows and columns as vectors (N + M,) of fp64."""

    def __init__(
        self,
        pairs: _Pairs,
        row_weight: Tensor | None,
        col_weight: Tensor | None,
        directions: int,
        smoothing: float,
    ) -> None:
        self.pairs, self.n, self.smoothing = pairs, pairs.n, smoothing
        self.share = 0.5 if directions == _BOTH else 1.0
        parts = []
        for bit, length, weight in (
            (kernels.ROWS, pairs.n, row_weight),
            (kernels.COLUMNS, pairs.m, col_weight),
        ):
            if weight is None:
                weight = torch.ones(length, dtype=torch.float64, device=pairs.device)
            parts.append(weight.detach().double() * bool(directions & bit))
        # 0 for a row without a positive, and for a direction that nobody wants
        self.weight = torch.cat(parts) * (pairs.positives > 0)

    def targets(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What each positive and each kept entry of a row gets of the weight of the row."""
        positive = weights * (1 - self.smoothing) / self.pairs.positives.clamp(min=1)
        kept = weights * self.smoothing / self.pairs.kept.clamp(min=1)
        return positive, kept

    def losses(self, stats: Tensor, scale: Tensor) -> Tensor:
        """The weighted loss of each row and column: log-sum-exp minus the mean logit of the
        target, both above the maximum; (N + M,) fp64."""
        ones = torch.ones_like(self.weight)
        positive, kept = self.targets(ones)
        top = stats[0].double()
        below = positive * stats[2].double() - (1 - self.smoothing) * top
        if self.smoothing > 0:
            below += kept * stats[3].double() - self.smoothing * top
        loss = self.weight * (stats[1].double().log() - scale.double().abs() * below)
        return torch.where(self.weight != 0, loss, 0.0)

    def by_side(self, vector: Tensor) -> Tensor:
        """(2,): sums over the rows and over the columns."""
        return torch.stack([vector[: self.n].sum(), vector[self.n :].sum()])

    def shares(self, reduction: int) -> Tensor:
        """(2,): what the summed loss of a side counts for in the loss."""
        if reduction != _MEAN:
            return torch.full_like(self.by_side(self.weight), self.share)
        total = self.by_side(self.weight)
        return torch.where(total != 0, self.share / torch.where(total != 0, total, 1.0), 0.0)

    def spread(self, by_side: Tensor) -> Tensor:
        """(N + M,) from (2,)."""
        m = self.pairs.m
        return torch.cat([by_side[0].expand(self.n), by_side[1].expand(m)])


def _unit(vector: Tensor, boost: float) -> Tensor:
    """What to divide G's coefficients by so that no dtype of G flushes or overflows."""
    largest = vector.abs().amax()
    return torch.where(largest > 0, largest, 1.0) / boost


def _coefficients(sides: _Sides, weights: Tensor, stats: Tensor) -> Tensor:
    """(4, N + M) fp32, as `clip_grads_kernel` reads them."""
    positive, kept = sides.targets(weights)
    softmax = torch.where(weights != 0, weights / stats[1].double(), 0.0)
    return torch.stack([stats[0].double(), softmax, positive, kept]).float()


def _clip_grads(
    call: _Call,
    coefs: Tensor,
    directions: int,
    smoothing: float,
    grads: Tensor,
    sums: Tensor,
    row: int,
    col: int,
    similarity: Tensor | None = None,
) -> None:
    tile, (rows, cols) = call.tile, grads.shape
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(cols, tile.cols))
    held = similarity if similarity is not None else coefs
    kernels.clip_grads_kernel[grid](
        *call.operands(), call.pairs.image_ids, call.pairs.text_ids, coefs, coefs[:, call.n :],
        held, grads, sums, *call.sizes(), held.stride(0), coefs.stride(0), grads.stride(0),
        sums.stride(-2), row, col, call.pairs.kind, int(smoothing > 0),
        DIRECTIONS=directions, KEEP=similarity is not None, **call.options(),
    )  # fmt: skip


def _tile_sums(call: _Call, planes: int) -> Tensor:
    """(planes, row tiles, column tiles) fp32: one partial sum a tile."""
    tile = call.tile
    return call.f32(planes, triton.cdiv(call.n, tile.rows), triton.cdiv(call.m, tile.cols))


# --- metrics ---


def _metrics(call: _Call, sides: _Sides, stats: Tensor) -> Tensor:
    """(10,) fp32, in the order of csrc/ops/contrastive.cpp."""
    n = call.n
    magnitude = call.scale.double().abs()
    top, total, positive, kept, entropy, best, other = stats.double().unbind()
    positives, all_kept = sides.pairs.positives, sides.pairs.kept
    hits = (best > other) & (positives > 0) & (magnitude > 0)
    with_positive = sides.by_side((positives > 0).double())
    top1 = sides.by_side(hits.double()) / with_positive.clamp(min=1)
    nats = torch.where(all_kept > 0, total.log() - entropy / total, 0.0)
    lengths = sides.by_side(torch.ones_like(top)).clamp(min=1)
    mean_entropy = sides.by_side(nats) / lengths
    count = positives[:n].sum()
    negatives = all_kept[:n].sum() - count
    of_positives = magnitude * positive[:n].sum() / count.clamp(min=1)
    of_negatives = magnitude * (kept[:n].sum() - positive[:n].sum()) / negatives.clamp(min=1)
    logits = torch.stack([of_positives * (count > 0), of_negatives * (negatives > 0)])
    found = torch.stack([count > 0, negatives > 0]).double()
    mean_entropy = mean_entropy.float().double()
    return torch.cat([top1, logits, mean_entropy, mean_entropy.exp(), found]).float()


def _no_metrics(like: Tensor, metrics: bool) -> Tensor:
    """The metrics of an empty matrix, or none."""
    values = torch.zeros(10 if metrics else 0, dtype=torch.float32, device=like.device)
    values[6:8] = 1.0  # the perplexities of nothing
    return values


# --- ops ---


def clip_loss_fwd(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | None,
    scale: float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    label_smoothing: float,
    ignore_same_ids: bool,
    directions: int,
    reduction: int,
    workspace_mb: int,
    kept_panels: int,
    metrics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss () or (N + M,), stats (3 | 4 | 7, N + M), (0,), metrics (10,) or (0,)."""
    pairs = _Pairs(image, text, image_ids, text_ids, labels, ignore_same_ids)
    call = _Call(image, text, logit_scale, scale, pairs, workspace_mb)
    length = call.n + call.m
    fields = 7 if metrics else 4 if label_smoothing > 0 else 3
    kept = call.f32(0)
    if call.empty:
        loss = torch.zeros((length,) if reduction == _NONE else (), device=image.device)
        return loss, call.f32(fields, length).zero_(), kept, _no_metrics(image, metrics)
    walked = _BOTH if metrics else directions
    stats = call.f32(fields, length)
    if walked != _BOTH:
        stats.zero_()
    _stats(call, stats, walked, metrics)
    sides = _Sides(pairs, row_weight, col_weight, directions, label_smoothing)
    losses = sides.losses(stats, call.scale)
    if reduction == _NONE:
        loss = losses.float()
    else:
        loss = (sides.by_side(losses) * sides.shares(reduction)).sum().float()
    measured = _metrics(call, sides, stats) if metrics else call.f32(0)
    return loss, stats, kept, measured


def clip_loss_bwd(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | None,
    scale: float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    label_smoothing: float,
    ignore_same_ids: bool,
    directions: int,
    reduction: int,
    workspace_mb: int,
    stats: Tensor,
    kept: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of image, text, logit_scale; (0,) where not needed."""
    pairs = _Pairs(image, text, image_ids, text_ids, labels, ignore_same_ids)
    call = _Call(image, text, logit_scale, scale, pairs, workspace_mb)
    grad_image = _grad_like(image, needs & _NEED_IMAGE)
    grad_text = _grad_like(text, needs & _NEED_TEXT)
    if call.empty:
        zero = torch.zeros((), device=image.device)
        by_scale = _scalar_grad(logit_scale, needs & _NEED_SCALE, image, zero)
        return grad_image.zero_(), grad_text.zero_(), by_scale
    sides = _Sides(pairs, row_weight, col_weight, directions, label_smoothing)
    if reduction == _NONE:
        incoming = grad.double()
    else:
        incoming = sides.spread(sides.shares(reduction) * grad.double())
    weights = sides.weight * incoming
    unit = _unit(weights, call.boost)
    coefs = _coefficients(sides, weights / unit, stats)
    factor = unit * call.scale.double()
    sums = _tile_sums(call, 1)
    rows, cols = _block(call)
    block = torch.empty(rows, cols, dtype=image.dtype, device=image.device)
    products = _Products(call, grad_image, grad_text, rows)
    for row, col, r, c in _blocks(call.n, call.m, rows, cols):
        grads = block[:r, :c]
        _clip_grads(call, coefs, directions, label_smoothing, grads, sums, row, col)
        products.add(grads, row, col)
        if col + c == call.m:
            products.close_rows(row, row + r, factor)
    products.close(factor)
    by_scale = call.sign * unit * sums.sum(dtype=torch.float64)
    return grad_image, grad_text, _scalar_grad(logit_scale, needs & _NEED_SCALE, image, by_scale)


def clip_loss_one_way_fwd(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | None,
    scale: float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    label_smoothing: float,
    ignore_same_ids: bool,
    directions: int,
    reduction: int,
    workspace_mb: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction, "mean" or "sum", its gradients formed in the same pass: the similarity of some
    whole rows (columns) is kept until their softmax is known.

    -> loss (), gradients with respect to the similarity of image (N, D) and text (M, D), and fp64
    sums (2,): of G * x, and the divisor that none of them has seen.
    """
    pairs = _Pairs(image, text, image_ids, text_ids, labels, ignore_same_ids)
    call = _Call(image, text, logit_scale, scale, pairs, workspace_mb)
    formed_image = _formed_like(image, needs & _NEED_IMAGE)
    formed_text = _formed_like(text, needs & _NEED_TEXT)
    if call.empty:
        loss = torch.zeros((), device=image.device)
        sums = torch.zeros(2, dtype=torch.float64, device=image.device)
        return loss, formed_image.zero_(), formed_text.zero_(), sums
    sides = _Sides(pairs, row_weight, col_weight, directions, label_smoothing)
    unit = _unit(sides.weight, call.boost)
    own, outputs = slice(0, call.n), (formed_image, formed_text)
    if directions == kernels.COLUMNS:
        own, outputs = slice(call.n, call.n + call.m), outputs[::-1]
        call = call.swapped()
    # statistics and coefficients of both sides, of which this direction writes and reads its own
    stats = torch.zeros(
        4 if label_smoothing > 0 else 3, call.n + call.m, dtype=torch.float32, device=image.device
    )
    tile, item = call.tile, image.element_size()
    rows = call.budget // (call.m * (4 + item) + 4 * call.d) // tile.rows * tile.rows
    rows = max(tile.rows, min(rows, triton.cdiv(call.n, tile.rows) * tile.rows))
    block = torch.empty(rows, call.m, dtype=image.dtype, device=image.device)
    similarity = call.f32(rows, call.m)
    tile_sums = _tile_sums(call, 1)
    products = _Products(call, *outputs, rows)
    positive, kept = (part[own] for part in sides.targets(sides.weight / unit))
    weights = sides.weight[own] / unit
    coefs = torch.zeros(4, call.n + call.m, dtype=torch.float32, device=image.device)
    coefs[2, : call.n], coefs[3, : call.n] = positive, kept
    for row in range(0, call.n, rows):
        end = min(row + rows, call.n)
        _stats(call, stats, kernels.ROWS, False, row, end - row, similarity)
        coefs[0, row:end] = stats[0, row:end]
        softmax = weights[row:end] / stats[1, row:end]
        coefs[1, row:end] = torch.where(weights[row:end] != 0, softmax, 0.0)
        grads = block[: end - row]
        _clip_grads(
            call, coefs, kernels.ROWS, label_smoothing, grads, tile_sums, row, 0, similarity
        )
        products.add(grads, row, 0)
        products.close_rows(row, end, unit)
    products.close(unit)
    whole = torch.zeros(stats.shape[0], call.n + call.m, dtype=torch.float32, device=image.device)
    whole[:, own] = stats[:, : call.n]
    total = sides.losses(whole, call.scale).sum()
    divisor = sides.weight.sum() if reduction == _MEAN else torch.ones_like(total)
    loss = torch.where(divisor != 0, total / torch.where(divisor != 0, divisor, 1.0), 0.0)
    by_similarity = unit * tile_sums.sum(dtype=torch.float64)
    return loss.float(), formed_image, formed_text, torch.stack([by_similarity, divisor])


def clip_loss_one_way_bwd(
    grad: Tensor,
    logit_scale: Tensor | None,
    scale: float,
    formed_image: Tensor,
    formed_text: Tensor,
    sums: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of image, text, logit_scale; (0,) where not needed."""
    by_similarity, divisor = sums.unbind()
    incoming = grad.double().reshape(())
    factor = torch.where(divisor != 0, incoming / torch.where(divisor != 0, divisor, 1.0), 0.0)
    value = _scalar(logit_scale, scale, formed_image).double()
    by_scale = torch.where(value < 0, -factor, factor) * by_similarity
    return (
        formed_image * (factor * value),
        formed_text * (factor * value),
        _scalar_grad(logit_scale, needs & _NEED_SCALE, formed_image, by_scale),
    )


def _sigmoid(
    call: _Call,
    bias: Tensor,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    image: Tensor,
    text: Tensor,
    grads: bool,
) -> tuple[Tensor, Tensor]:
    """-> row losses (N,) fp32 and fp64 sums (2,): of G * x and of G. Writes dLoss/dx Y and the like
    to `image` and `text` where those have two dimensions."""
    weighted = row_weight is not None or col_weight is not None or call.boost != 1.0
    unit = torch.ones((), dtype=torch.float64, device=call.image.device)
    row, col = call.scale, call.scale  # not read
    if weighted:
        row = _weights(row_weight, call.n, call.scale)
        col = _weights(col_weight, call.m, call.scale)
        of_rows, of_cols = _unit(row, call.boost), _unit(col, 1.0)
        row, col = (row / of_rows).float(), (col / of_cols).float()
        unit = of_rows * of_cols
    rows, cols = _block(call)
    tile = call.tile
    dtype = call.image.dtype
    block = torch.empty(rows, cols if grads else 0, dtype=dtype, device=unit.device)
    parts = call.f32(triton.cdiv(cols, tile.cols), rows)
    losses = torch.zeros(call.n, dtype=torch.float32, device=unit.device)
    sums = _tile_sums(call, 2)
    products = _Products(call, image, text, rows)
    for at, across, r, c in _blocks(call.n, call.m, rows, cols):
        tiles = triton.cdiv(c, tile.cols)
        kernels.sigmoid_kernel[triton.cdiv(r, tile.rows), tiles](
            *call.operands(), bias, call.pairs.image_ids, call.pairs.text_ids, row, col, parts,
            block, sums, *call.sizes(), parts.stride(0), block.stride(0), sums.stride(1), at,
            across, call.pairs.kind, int(weighted), GRADS=grads, **call.options(),
        )  # fmt: skip
        losses[at : at + r] += parts[:tiles, :r].sum(0)
        if grads:
            products.add(block[:r, :c], at, across)
            if across + c == call.m:
                products.close_rows(at, at + r, unit)
    if grads:
        products.close(unit)
        totals = unit * sums.sum((1, 2), dtype=torch.float64)
    else:
        totals = torch.zeros(2, dtype=torch.float64, device=unit.device)
    return (losses * unit).float(), totals


def _weights(weight: Tensor | None, length: int, like: Tensor) -> Tensor:
    if weight is None:
        return torch.ones(length, dtype=torch.float64, device=like.device)
    return weight.detach().double()


def siglip_loss_fwd(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | None,
    scale: float,
    logit_bias: Tensor | None,
    bias: float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    ignore_same_ids: bool,
    reduction: int,
    workspace_mb: int,
    needs: int,
    metrics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss () or (N,), gradients with respect to the similarity of image and text, fp64 sums of
    G * x and of G (2,) or (0,), metrics (10,) or (0,)."""
    pairs = _Pairs(image, text, image_ids, text_ids, labels, ignore_same_ids)
    call = _Call(image, text, logit_scale, scale, pairs, workspace_mb)
    now = 0 if reduction == _NONE else needs
    formed_image = _formed_like(image, now & _NEED_IMAGE)
    formed_text = _formed_like(text, now & _NEED_TEXT)
    sums = torch.zeros(2 if now else 0, dtype=torch.float64, device=image.device)
    if call.empty:
        loss = torch.zeros((call.n,) if reduction == _NONE else (), device=image.device)
        measured = _no_metrics(image, metrics)
        return loss, formed_image.zero_(), formed_text.zero_(), sums, measured
    offset = _scalar(logit_bias, bias, image)
    rows, totals = _sigmoid(
        call, offset, row_weight, col_weight, formed_image, formed_text, bool(now)
    )
    measured = call.f32(0)
    if metrics:
        stats = call.f32(7, call.n + call.m)
        _stats(call, stats, _BOTH, True)
        measured = _metrics(call, _Sides(pairs, None, None, _BOTH, 0.0), stats)
    if reduction != _NONE:
        divisor = _divisor(call, row_weight, reduction)
        total = rows.sum(dtype=torch.float64)
        rows = torch.where(divisor != 0, total / torch.where(divisor != 0, divisor, 1.0), 0.0)
    return rows.float(), formed_image, formed_text, totals if now else sums, measured


def siglip_loss_bwd(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | None,
    scale: float,
    logit_bias: Tensor | None,
    bias: float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    ignore_same_ids: bool,
    reduction: int,
    workspace_mb: int,
    formed_image: Tensor,
    formed_text: Tensor,
    sums: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of image, text, logit_scale, logit_bias; (0,) where not needed."""
    pairs = _Pairs(image, text, image_ids, text_ids, labels, ignore_same_ids)
    call = _Call(image, text, logit_scale, scale, pairs, workspace_mb)
    factor = torch.ones((), dtype=torch.float64, device=image.device)
    if call.empty:
        formed_image = _grad_like(image, needs & _NEED_IMAGE).zero_()
        formed_text = _grad_like(text, needs & _NEED_TEXT).zero_()
        totals = torch.zeros(2, dtype=torch.float64, device=image.device)
    elif reduction == _NONE:
        formed_image = _formed_like(image, needs & _NEED_IMAGE)
        formed_text = _formed_like(text, needs & _NEED_TEXT)
        own = grad.double() * (1.0 if row_weight is None else row_weight.detach().double())
        offset = _scalar(logit_bias, bias, image)
        _, totals = _sigmoid(call, offset, own, col_weight, formed_image, formed_text, True)
    else:
        divisor = _divisor(call, row_weight, reduction)
        incoming = grad.double().reshape(())
        factor = torch.where(divisor != 0, incoming / torch.where(divisor != 0, divisor, 1.0), 0.0)
        totals = factor * sums
    of_features = factor * call.scale.double()
    return (
        (formed_image * of_features).to(image.dtype),
        (formed_text * of_features).to(text.dtype),
        _scalar_grad(logit_scale, needs & _NEED_SCALE, image, call.sign * totals[0]),
        _scalar_grad(logit_bias, needs & _NEED_BIAS, image, totals[1]),
    )


def _divisor(call: _Call, row_weight: Tensor | None, reduction: int) -> Tensor:
    if reduction == _MEAN and row_weight is not None:
        return row_weight.detach().double().sum()
    value = float(call.n) if reduction == _MEAN else 1.0
    return torch.full((), value, dtype=torch.float64, device=call.image.device)


def _grad_like(x: Tensor, needed: int) -> Tensor:
    return torch.empty(x.shape if needed else (0,), dtype=x.dtype, device=x.device)


def _formed_like(x: Tensor, needed: int) -> Tensor:
    """Gradients that have seen neither 1 / N nor the incoming gradient: they wait in fp32 where
    fp16 would flush them."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.empty(x.shape if needed else (0,), dtype=dtype, device=x.device)


def _scalar_grad(x: Tensor | None, needed: int, features: Tensor, value: Tensor) -> Tensor:
    if not needed or x is None:
        return torch.empty(0, dtype=torch.float32, device=features.device)
    return value.to(x.dtype).reshape(x.shape).clone()


# --- registration ---

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _guarded(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        with _on(next(x for x in args if isinstance(x, Tensor))):
            return fn(*args)

    return run


for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _guarded(globals()[_name]), "CPU" if INTERPRET.value else "CUDA")
register_fakes(NAMESPACE)
