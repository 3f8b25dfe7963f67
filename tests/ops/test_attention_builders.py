"""Builders of kv_range and of rotary tables against the systems they are named after."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels.ops import _kv_range as kv
from vlm_kernels.ops import _rope as rope

PUBLIC = {
    kv: [
        "causal",
        "causal_lower_right",
        "sliding_window",
        "prefix_lm",
        "image_blocks",
        "per_image_cross_attention",
        "padding",
        "from_cu_seqlens",
        "intersect",
        "to_mask",
    ],
    rope: ["rope_1d", "rope_2d", "mrope", "grid_positions"],
}
SIZES = [(1, 1), (5, 5), (4, 7), (7, 4), (0, 3), (3, 0)]
IMAGE = 9  # the token that stands for an image, or for a part of one
# Text, an image, text, two images that touch, an image at the end; the second begins with an image.
IMAGE_IDS = torch.tensor(
    [
        [-1, -1, 0, 0, 0, -1, 1, 1, 2, 2, -1, 3],
        [5, 5, -1, -1, 5, 5, 5, -1, -1, -1, -1, -1],
    ]
)


@pytest.fixture
def hf() -> ModuleType:
    return pytest.importorskip(
        "transformers", minversion="5.23", reason="needs transformers >= 5.23"
    )


def dense(kv_range: Tensor, num_keys: int) -> Tensor:
    """By the definition, one interval at a time: (B, Nq, Nk)."""
    assert kv_range.dtype == torch.int32
    assert kv_range.shape[1] == 1
    mask = torch.zeros(kv_range.shape[0], kv_range.shape[2], num_keys, dtype=torch.bool)
    for b, rows in enumerate(kv_range[:, 0].tolist()):
        for i, (begin, end) in enumerate(rows):
            mask[b, i, begin : max(begin, end)] = True
    return mask


def mask_of(
    batch: int, queries: int, keys: int, allowed: Callable[[int, int, int], bool]
) -> Tensor:
    rows = [[[allowed(b, i, j) for j in range(keys)] for i in range(queries)] for b in range(batch)]
    return torch.tensor(rows, dtype=torch.bool).reshape(batch, queries, keys)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert torch.equal(ours, theirs.expand_as(ours)), (
        f"ours:\n{ours.int()}\ntheirs:\n{theirs.int()}"
    )


def hf_mask(function: Any, batch: int, queries: int, keys: int) -> Tensor:
    """A mask function of transformers at every index."""
    return mask_of(
        batch,
        queries,
        keys,
        lambda b, i, j: bool(function(b, 0, torch.tensor(i), torch.tensor(j))),
    )


# Masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_causal(queries: int, keys: int) -> None:
    ones = torch.ones(queries, keys, dtype=torch.bool)
    same(dense(kv.causal(queries, keys), keys), ones.tril())
    lower_right = kv.causal_lower_right(queries, keys)
    same(dense(lower_right, keys), ones.tril(keys - queries))
    assert torch.equal(kv.causal(queries), kv.causal(queries, queries))


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (0, 0), (2, 1), (-1, 0), (1, -1), (20, 20)])
def test_sliding_window(queries: int, keys: int, left: int, right: int) -> None:
    for lower_right in (False, True):

        def near(b: int, i: int, j: int, lower_right: bool = lower_right) -> bool:
            place = i + (keys - queries if lower_right else 0)
            return (left < 0 or j >= place - left) and (right < 0 or j <= place + right)

        ours = kv.sliding_window(queries, keys, left, right, lower_right=lower_right)
        same(dense(ours, keys), mask_of(1, queries, keys, near))


def test_sliding_window_is_that_of_transformers(hf: ModuleType) -> None:
    theirs = hf.masking_utils.sliding_window_causal_mask_function(3)
    same(dense(kv.sliding_window(9, 9, 2, 0), 9), hf_mask(theirs, 1, 9, 9))


def test_prefix_lm() -> None:
    lengths = [0, 1, 4, 6]
    theirs = mask_of(4, 6, 6, lambda b, i, j: j <= i or j < lengths[b])
    same(dense(kv.prefix_lm(lengths, 6), 6), theirs)
    same(dense(kv.prefix_lm(torch.tensor(lengths), 6), 6), theirs)
    same(dense(kv.prefix_lm(4, 6), 6), theirs[2:3])


def config(hf: ModuleType, **kwargs: Any) -> Any:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    made = hf.Gemma3TextConfig(**sizes, head_dim=4, **kwargs)
    made._attn_implementation = "sdpa"
    return made


def padding_mask(lengths: list[int], n: int, side: str) -> Tensor:
    place = torch.arange(n).expand(len(lengths), n)
    count = torch.tensor(lengths)[:, None]
    return place < count if side == "right" else place >= n - count


@pytest.mark.parametrize("side", ["right", "left"])
def test_prefix_lm_is_paligemmas(hf: ModuleType, side: str) -> None:
    """Tokens of type 0 (image, prompt) see each other, those of type 1 (the answer) are causal."""
    n, prefix, lengths = 8, [3, 5], [8, 7]
    tokens = padding_mask(lengths, n, side)
    starts = [0, 0] if side == "right" else [n - length for length in lengths]
    ends = torch.tensor([p + s for p, s in zip(prefix, starts)])
    types = (torch.arange(n) >= ends[:, None]).long()
    theirs = hf.masking_utils.create_causal_mask(
        config=config(hf),
        inputs_embeds=torch.zeros(2, n, 8),
        attention_mask=tokens.long(),
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=torch.where(types == 0, 0, -1),
    )
    ours = kv.intersect(kv.prefix_lm(ends, n), kv.padding(lengths, n, side=side))
    real = tokens[:, :, None]  # transformers lets padding see something, against NaN
    same(dense(ours, n) & real, theirs[:, 0] & real)


def test_image_blocks() -> None:
    n = IMAGE_IDS.shape[1]

    def allowed(b: int, i: int, j: int) -> bool:
        low, high = sorted((i, j))
        image = int(IMAGE_IDS[b, i])
        one_image = image >= 0 and bool((IMAGE_IDS[b, low : high + 1] == image).all())
        return j <= i or one_image

    theirs = mask_of(2, n, n, allowed)
    same(dense(kv.image_blocks(IMAGE_IDS), n), theirs)
    same(dense(kv.image_blocks(IMAGE_IDS[1]), n), theirs[1:])
    assert kv.image_blocks(IMAGE_IDS[:, :0]).shape == (2, 1, 0, 2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_image_blocks_are_gemma3s(hf: ModuleType, side: str) -> None:
    """Global and local layers, with padding; images that touch are one image there."""
    from transformers.models.gemma3 import modeling_gemma3 as gemma3

    n, window, lengths = IMAGE_IDS.shape[1], 4, [12, 10]
    tokens = padding_mask(lengths, n, side)
    is_image = (IMAGE_IDS >= 0) & tokens
    theirs = gemma3.create_masks_for_vision_model(
        config(hf, sliding_window=window),
        torch.zeros(2, n, 8),
        tokens.long(),
        None,
        None,
        gemma3.get_block_sequence_ids_for_mask(is_image.long()),
    )
    ours = kv.intersect(kv.image_blocks(is_image), kv.padding(lengths, n, side=side))
    real = tokens[:, :, None]
    same(dense(ours, n) & real, theirs["full_attention"][:, 0] & real)
    local = kv.intersect(ours, kv.sliding_window(n, n, window - 1, -1))
    same(dense(local, n) & real, theirs["sliding_attention"][:, 0] & real)


PLACED = torch.tensor(
    [
        [0, 1, 0, 0, 1, 1, 0],  # no image, one, two that touch
        [1, 0, 0, 1, 0, 0, 0],
    ]
).bool()


@pytest.mark.parametrize("tokens", [[4, 4, 4], [2, 0, 5]])
def test_per_image_cross_attention(tokens: list[int]) -> None:
    images = [image for image, count in enumerate(tokens) for _ in range(count)]  # of each key

    def last(b: int, i: int) -> int:
        return int(PLACED[b, : i + 1].sum()) - 1

    def flamingo(b: int, i: int, j: int) -> bool:
        return images[j] == last(b, i)

    def all_preceding(b: int, i: int, j: int) -> bool:
        return images[j] <= last(b, i)

    counts: list[int | Tensor] = [torch.tensor(tokens), torch.tensor([tokens, tokens])]
    if len(set(tokens)) == 1:
        counts.append(tokens[0])
    index = torch.tensor([[last(b, i) for i in range(7)] for b in range(2)])
    for count in counts:
        for which in (PLACED, index, index.int()):
            ours = kv.per_image_cross_attention(which, count)
            same(dense(ours, len(images)), mask_of(2, 7, len(images), flamingo))
            ours = kv.per_image_cross_attention(which, count, all_preceding=True)
            same(dense(ours, len(images)), mask_of(2, 7, len(images), all_preceding))


def test_per_image_cross_attention_takes_an_image_that_is_not_there_as_none() -> None:
    index = torch.tensor([0, 1, 7, -3])
    for count in (torch.tensor([2, 3]), 2):
        ours = dense(kv.per_image_cross_attention(index, count), 5)[0]
        assert ours[:2].any(1).all()
        assert not ours[2:].any()


def test_per_image_cross_attention_takes_tokens_of_each_sequence() -> None:
    counts = torch.tensor([[1, 3], [2, 2]])
    ours = kv.per_image_cross_attention(torch.tensor([1]), counts)
    assert ours[:, 0, 0].tolist() == [[1, 4], [2, 4]]


def test_per_image_cross_attention_is_that_of_idefics(hf: ModuleType) -> None:
    """Idefics, the open Flamingo: text behind an end of document sees no image."""
    from transformers.models.idefics import processing_idefics as idefics

    end, images, tokens = 2, 3, 4
    ids = torch.tensor([[5, IMAGE, 5, 5, IMAGE, IMAGE, 5], [IMAGE, 5, end, 5, IMAGE, 5, 5]])
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda _: IMAGE, eos_token_id=end)
    index, _ = idefics.image_attention_mask_for_packed_input_ids(ids, tokenizer, "pt")
    binary = idefics.incremental_to_binary_attention_mask(index.clone(), "pt", num_classes=images)
    theirs = binary.bool().repeat_interleave(tokens, dim=-1)
    keys = images * tokens
    same(dense(kv.per_image_cross_attention(index, tokens), keys), theirs)
    ours = dense(kv.per_image_cross_attention(ids[0] == IMAGE, tokens), keys)
    same(ours, theirs[:1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side: str) -> None:
    lengths = [0, 2, 5]
    theirs = padding_mask(lengths, 5, side)[:, None]
    same(dense(kv.padding(lengths, 5, 3, side=side), 5), theirs.expand(3, 3, 5))
    same(dense(kv.padding(torch.tensor(lengths), 5, side=side), 5), theirs.expand(3, 5, 5))
    same(dense(kv.padding(2, 5, side=side), 5), theirs[1:2].expand(1, 5, 5))


@pytest.mark.parametrize("lengths_k", [[2, 3, 0, 4, 1], [3, 1, 2, 0, 2]])
def test_from_cu_seqlens(lengths_k: list[int]) -> None:
    lengths = [2, 3, 0, 4, 1]
    bounds, bounds_k = (np.concatenate([[0], np.cumsum(x)]) for x in (lengths, lengths_k))
    rows, keys = bounds[-1] + 2, bounds_k[-1] + 1  # some in no segment

    def allowed(b: int, i: int, j: int, causal: bool = False) -> bool:
        for s in range(len(lengths)):
            if bounds[s] <= i < bounds[s + 1] and bounds_k[s] <= j < bounds_k[s + 1]:
                shift = lengths_k[s] - lengths[s]
                return not causal or j - bounds_k[s] <= i - bounds[s] + shift
        return False

    cu, cu_k = torch.tensor(bounds), torch.tensor(bounds_k)
    for dtype in (torch.int32, torch.int64):
        ours = kv.from_cu_seqlens(cu.to(dtype), rows, cu_k.to(dtype))
        same(dense(ours, keys), mask_of(1, rows, keys, allowed))
    ours = kv.from_cu_seqlens(cu, rows, cu_k, is_causal=True)
    same(dense(ours, keys), mask_of(1, rows, keys, lambda b, i, j: allowed(b, i, j, True)))
    if lengths == lengths_k:
        assert torch.equal(kv.from_cu_seqlens(cu, rows), kv.from_cu_seqlens(cu, rows, cu))
    assert not dense(kv.from_cu_seqlens(torch.tensor([0]), 3), 3).any()


def test_from_cu_seqlens_is_pixtrals_block_mask(hf: ModuleType) -> None:
    from transformers.models.pixtral import modeling_pixtral as pixtral

    patches = [3, 1, 5]
    theirs = pixtral.generate_block_attention_mask(patches, torch.zeros(1, sum(patches), 1)) == 0
    cu = torch.tensor([0, *np.cumsum(patches).tolist()])
    same(dense(kv.from_cu_seqlens(cu, 9), 9), theirs[:, 0])


def test_intersect_and_to_mask() -> None:
    ranges = [kv.prefix_lm([2, 3], 6), kv.padding([5, 6], 6), kv.sliding_window(6, 6, 2, 1)]
    both = kv.intersect(*ranges)
    assert both.shape == (2, 1, 6, 2)
    same(kv.to_mask(both, 6)[:, 0], dense(both, 6))
    one_by_one = [kv.to_mask(r, 6) for r in ranges]
    assert torch.equal(kv.to_mask(both, 6), one_by_one[0] & one_by_one[1] & one_by_one[2])
    assert torch.equal(kv.intersect(ranges[0]), ranges[0])
    # What does not meet sees nothing; heads may differ.
    heads = torch.cat([kv.padding(2, 6), kv.padding(4, 6, side="left")], dim=1)
    assert kv.to_mask(kv.intersect(heads, kv.padding(2, 6)), 6).sum((2, 3)).tolist() == [[12, 0]]


@pytest.mark.parametrize(
    "kv_range",
    [
        kv.image_blocks(IMAGE_IDS),
        kv.intersect(kv.padding([3, 12], 12, side="left"), kv.prefix_lm([4, 5], 12)),
        kv.per_image_cross_attention(torch.tensor([[-1, 0, 1, 2], [0, 0, 5, 9]]), 4),
        kv.from_cu_seqlens(torch.tensor([0, 3, 3, 10]), 12, is_causal=True),
    ],
    ids=["image_blocks", "padding and prefix_lm", "per_image", "from_cu_seqlens"],
)
def test_attention_takes_them(kv_range: Tensor) -> None:
    """Images that are not there included: their ranges lie behind the last key."""
    query = torch.randn(2, 2, kv_range.shape[2], 24)
    key, value = torch.randn(2, 2, 2, 12, 24)
    mask = kv.to_mask(kv_range, 12)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    theirs = torch.where(mask.any(-1, keepdim=True), theirs, 0.0)
    close(vlm_kernels.attention(query, key, value, kv_range=kv_range), theirs)


# Rotary tables ----------------------------------------------------------------------------------


def rotate(x: Tensor, table: tuple[Tensor, Tensor], style: str = "half") -> Tensor:
    """By the definition: pairs are complex numbers, x (B, H, N, D)."""
    cos, sin = (t if t.dim() == 2 else t[:, None] for t in table)
    half = cos.shape[-1]
    part = x[..., : 2 * half]
    pairs = part.unflatten(-1, (2, half) if style == "half" else (half, 2))
    a, b = pairs.unbind(-2 if style == "half" else -1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    axis = -2 if style == "half" else -1
    part = torch.stack([turned.real, turned.imag], dim=axis).flatten(-2)
    return torch.cat([part, x[..., 2 * half :]], dim=-1)


def angles(table: tuple[Tensor, Tensor]) -> Tensor:
    """(cos, sin) as one complex tensor."""
    for t in table:
        assert t.dtype == torch.float32
    return torch.complex(*table)


def exact(positions: Tensor, frequencies: list[float]) -> Tensor:
    """e^(i position frequency) from fp64: positions (..., R/2) or (..., 1)."""
    phase = positions.double() * torch.tensor(frequencies, dtype=torch.float64)
    return torch.complex(phase.cos(), phase.sin()).to(torch.complex64)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rotary_dim", [2, 32, 80])
def test_rope_1d(rotary_dim: int) -> None:
    frequencies = [500.0 ** (-2 * k / rotary_dim) for k in range(rotary_dim // 2)]
    place = torch.tensor([[0, 7, 3], [2, 2, 30]])
    theirs = exact(place[..., None], frequencies)
    close(angles(rope.rope_1d(place, rotary_dim, 500.0)), theirs)
    close(angles(rope.rope_1d(place[1], rotary_dim, 500.0)), theirs[1])
    close(angles(rope.rope_1d(place.double(), rotary_dim, 500.0)), theirs)
    counted = angles(rope.rope_1d(8, rotary_dim, 500.0))
    assert torch.equal(counted, angles(rope.rope_1d(torch.arange(8), rotary_dim, 500.0)))


@pytest.mark.parametrize("convention", ["qwen2_vl", "pixtral"])
def test_rope_2d(convention: str) -> None:
    height, width, dim = 3, 5, 24
    if convention == "qwen2_vl":
        rows = columns = [10000.0 ** (-2 * k / 12) for k in range(6)]
    else:
        rows = [10000.0 ** (-2 * k / 24) for k in range(0, 12, 2)]
        columns = [10000.0 ** (-2 * k / 24) for k in range(1, 12, 2)]
    grid = torch.tensor([[y, x] for y in range(height) for x in range(width)])
    theirs = exact(grid.repeat_interleave(6, dim=1), rows + columns)
    close(angles(rope.rope_2d((height, width), dim, convention=convention)), theirs)
    batch = torch.stack([grid, grid.flip(0)])
    ours = angles(rope.rope_2d(batch, dim, convention=convention))
    close(ours, torch.stack([theirs, theirs.flip(0)]))


def test_rope_1d_is_llamas(hf: ModuleType) -> None:
    from transformers.models.llama import modeling_llama as llama

    place = torch.stack([torch.arange(20), torch.arange(1000, 1020)])
    made = hf.LlamaConfig(hidden_size=64, num_attention_heads=2, rope_theta=1e5)
    theta = made.rope_parameters["rope_theta"]
    q, k = torch.randn(2, 2, 20, 32), torch.randn(2, 1, 20, 32)
    cos, sin = llama.LlamaRotaryEmbedding(made)(q, place)
    table = rope.rope_1d(place, 32, theta)
    theirs = llama.apply_rotary_pos_emb(q, k, cos, sin)
    close(rotate(q, table), theirs[0])
    close(rotate(k, table), theirs[1])
    close(table[0], cos[..., :16])  # as the module's docstring says
    close(table[1], sin[..., :16])


def test_rope_1d_is_that_of_gptj_and_cohere(hf: ModuleType) -> None:
    """Both pair neighbours; GPT-J turns a part of the features."""
    from transformers.models.cohere import modeling_cohere as cohere
    from transformers.models.gptj import modeling_gptj as gptj

    x = torch.randn(1, 3, 10, 48)  # (B, H, N, D); GPT-J takes (B, N, H, D)
    table = rope.rope_1d(10, 32)
    sin, cos = gptj.create_sinusoidal_positions(10, 32)[None].chunk(2, dim=-1)
    part = gptj.apply_rotary_pos_emb(x.transpose(1, 2)[..., :32], sin, cos).transpose(1, 2)
    theirs = torch.cat([part, x[..., 32:]], dim=-1)
    close(rotate(x, table, "interleaved"), theirs)

    made = hf.CohereConfig(hidden_size=144, num_attention_heads=3)
    table = rope.rope_1d(10, 48, made.rope_parameters["rope_theta"])
    cos, sin = cohere.CohereRotaryEmbedding(made)(x, torch.arange(10)[None])
    close(rotate(x, table, "interleaved"), cohere.apply_rotary_pos_emb(x, x, cos, sin)[0])
    close(table[0], cos[0, :, ::2])


@pytest.mark.parametrize("merge_size", [1, 2])
def test_rope_2d_is_that_of_qwen2_vls_tower(hf: ModuleType, merge_size: int) -> None:
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

    vision_utils = pytest.importorskip("transformers.vision_utils", reason="needs vision_utils")
    made = hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(embed_dim=160, num_heads=2)
    grids = torch.tensor([[1, 4, 6], [2, 2, 4]])  # an image, a video of two frames
    place = vision_utils.get_vision_position_ids(grids, merge_size)
    q, k = torch.randn(len(place), 2, 80), torch.randn(len(place), 2, 80)
    cos, sin = qwen2_vl.Qwen2VLVisionRotaryEmbedding(made)(q, place)
    theirs = qwen2_vl.apply_rotary_pos_emb_vision(q, k, cos, sin)
    ours = torch.cat(
        [
            rope.grid_positions(4, 6, merge_size=merge_size),
            rope.grid_positions(2, 4, merge_size=merge_size).repeat(2, 1),
        ]
    )
    assert torch.equal(ours, place)
    table = rope.rope_2d(ours, 80)
    for x, turned in ((q, theirs[0]), (k, theirs[1])):
        close(rotate(x.transpose(0, 1)[None], table)[0].transpose(0, 1), turned)
    alone = rope.rope_2d((4, 6), 80, merge_size=merge_size)
    assert torch.equal(angles(alone), angles(table)[:24])


def test_rope_2d_is_pixtrals(hf: ModuleType) -> None:
    from transformers.models.pixtral import modeling_pixtral as pixtral

    made = hf.PixtralVisionConfig(hidden_size=128, num_attention_heads=2)
    place = torch.cat([rope.grid_positions(3, 5), rope.grid_positions(4, 2)])
    q, k = torch.randn(1, 2, 23, 64), torch.randn(1, 2, 23, 64)
    cos, sin = pixtral.PixtralVisionRotaryEmbedding(made)(q, place)
    theirs = pixtral.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=0)
    table = rope.rope_2d(place, 64, made.rope_parameters["rope_theta"], convention="pixtral")
    close(rotate(q, table), theirs[0])
    close(rotate(k, table), theirs[1])


def multimodal_positions() -> Tensor:
    """(3, 2, 16): text, 2 x 3 patches of two frames, text; as `get_rope_index` counts."""
    text = torch.arange(2).expand(3, 2)
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).T + 2
    end = torch.arange(5, 7).expand(3, 2)
    one = torch.cat([text, grid, end], dim=1)
    return torch.stack([one, one + 100], dim=1)


@pytest.mark.parametrize(
    ("layout", "sections"),
    [
        ("chunked", (16, 24, 24)),
        ("chunked", (8, 3, 5)),
        ("chunked", (3, 0, 5)),
        ("interleaved", (24, 20, 20)),
        ("interleaved", (8, 3, 5)),
        ("interleaved", (4, 4, 4)),
        ("interleaved", (4, 0, 2)),
    ],
)
def test_mrope(hf: ModuleType, layout: str, sections: tuple[int, int, int]) -> None:
    """Against Qwen2-VL (chunked) and Qwen3-VL (interleaved)."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

    place, pairs = multimodal_positions(), sum(sections)
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    # Of a configuration the embeddings read no more.
    made = SimpleNamespace(
        rope_parameters=parameters, head_dim=2 * pairs, max_position_embeddings=1024
    )
    module = {
        "chunked": qwen2_vl.Qwen2VLRotaryEmbedding,
        "interleaved": qwen3_vl.Qwen3VLTextRotaryEmbedding,
    }[layout](made)
    apply = {"chunked": qwen2_vl, "interleaved": qwen3_vl}[layout].apply_rotary_pos_emb
    q, k = torch.randn(2, 3, 16, 2 * pairs), torch.randn(2, 1, 16, 2 * pairs)
    cos, sin = module(q, place)
    table = rope.mrope(place, sections, 1e6, layout=layout)
    assert table[0].shape == (2, 16, pairs)
    theirs = apply(q, k, cos, sin)
    close(rotate(q, table), theirs[0])
    close(rotate(k, table), theirs[1])
    one = rope.mrope(place[:, 0], sections, 1e6, layout=layout)
    assert torch.equal(angles(one), angles(table)[0])


@pytest.mark.parametrize("layout", ["chunked", "interleaved"])
def test_mrope_by_its_definition(layout: str) -> None:
    sections, place = (4, 2, 3), multimodal_positions()
    axes = {"chunked": "ttttyyxxx", "interleaved": "tyxtyxttx"}[layout]
    frequencies = [1e6 ** (-2 * k / 18) for k in range(9)]
    theirs = exact(torch.stack([place["tyx".index(a)] for a in axes], dim=-1), frequencies)
    close(angles(rope.mrope(place, sections, 1e6, layout=layout)), theirs)


def test_tables_are_constants() -> None:
    place = torch.arange(4.0, requires_grad=True)
    assert not rope.rope_1d(place, 8)[0].requires_grad


# Both -------------------------------------------------------------------------------------------

CU = torch.tensor([0, 2, 2, 5])
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "causal": (lambda n: kv.causal(n, 9), ()),
    "causal_lower_right": (lambda n: kv.causal_lower_right(n, 9), ()),
    "sliding_window": (lambda n: kv.sliding_window(n, 9, 2, 1, lower_right=True), ()),
    "prefix_lm": (kv.prefix_lm, (torch.tensor([1, 4]),)),
    "image_blocks": (lambda ids, n: kv.image_blocks(ids[:, :n]), (IMAGE_IDS,)),
    "image_blocks of bool": (lambda ids, n: kv.image_blocks(ids[:, :n]), (IMAGE_IDS >= 0,)),
    "per_image": (lambda at, n: kv.per_image_cross_attention(at[:, :n], 4), (PLACED,)),
    "per_image, counted": (
        lambda at, count, n: kv.per_image_cross_attention(at[:, :n], count, all_preceding=True),
        (PLACED, torch.tensor([2, 3, 4])),
    ),
    "padding": (lambda lengths, n: kv.padding(lengths, 9, n, side="left"), (torch.tensor([1, 9]),)),
    "from_cu_seqlens": (kv.from_cu_seqlens, (CU,)),
    "from_cu_seqlens, causal": (
        lambda cu, cu_k, n: kv.from_cu_seqlens(cu, n, cu_k, is_causal=True),
        (CU, CU + torch.arange(4)),
    ),
    "intersect": (
        lambda a, n: kv.intersect(kv.causal(n), a[:, :, :n]),
        (kv.padding([3, 6], 9),),
    ),
    "to_mask": (lambda a, n: kv.to_mask(a, n), (kv.causal(4),)),
    "rope_1d": (lambda at, n: rope.rope_1d(at[:n], 8), (torch.arange(9),)),
    "rope_1d of a number": (lambda n: rope.rope_1d(n, 8), ()),
    "rope_2d": (lambda at, n: rope.rope_2d(at[:n], 8), (rope.grid_positions(3, 3),)),
    "rope_2d of a grid": (lambda n: rope.rope_2d((4, n), 8, convention="pixtral"), ()),
    "mrope": (
        lambda at, n: rope.mrope(at[..., :n], (2, 1, 1), 1e6, layout="interleaved"),
        (multimodal_positions(),),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_compile(call: str) -> None:
    """Without graph breaks, and once for all lengths."""
    function, tensors = CALLS[call]
    torch._dynamo.reset()
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 5, 6):
        torch.testing.assert_close(compiled(*tensors, n), function(*tensors, n), rtol=0, atol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize("call", CALLS)
def test_no_value_on_a_device_is_read(call: str) -> None:
    """Tensors of the meta device have none to read."""
    function, tensors = CALLS[call]
    if not tensors:
        with torch.device("meta"):
            ours = function(5)
    elif call == "intersect":
        ours = kv.intersect(*(tensors[0].to("meta"), kv.causal(9, device="meta")))
    else:
        ours = function(*(t.to("meta") for t in tensors), 5)
    for t in ours if isinstance(ours, tuple) else (ours,):
        assert t.device.type == "meta"


ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: kv.causal(-1), ValueError, "causal: num_queries is -1"),
    (lambda: kv.causal_lower_right(2, -3), ValueError, "num_keys is -3"),
    (lambda: kv.sliding_window(4, 4, -2, 0), ValueError, "left, right are -2, 0, expected"),
    (lambda: kv.prefix_lm([3, 9], 4), ValueError, "prefix_lengths holds 9, expected 0 to 4"),
    (lambda: kv.prefix_lm([0.5], 4), TypeError, "prefix_lengths holds torch.float32, expected int"),
    (lambda: kv.prefix_lm([[1]], 4), ValueError, r"shape \(1, 1\), expected \(B,\)"),
    (lambda: kv.image_blocks([0, 1]), TypeError, "image_ids is list, expected a tensor"),
    (lambda: kv.image_blocks(torch.zeros(3)), TypeError, "image_ids is torch.float32"),
    (
        lambda: kv.image_blocks(torch.zeros(1, 2, 3).long()),
        ValueError,
        r"image_ids has shape \(1, 2, 3\), expected \(B, N\) or \(N,\)",
    ),
    (lambda: kv.per_image_cross_attention(PLACED, -4), ValueError, "tokens_per_image is -4"),
    (
        lambda: kv.per_image_cross_attention(PLACED, torch.tensor([4, -4])),
        ValueError,
        "tokens_per_image holds -4",
    ),
    (
        lambda: kv.per_image_cross_attention(PLACED, torch.ones(3, 2).long()),
        ValueError,
        "image_index has 2 rows and tokens_per_image 3",
    ),
    (lambda: kv.padding([5], 4), ValueError, "lengths holds 5, expected 0 to 4"),
    (lambda: kv.padding([2], 4, side="top"), ValueError, "side is 'top', expected 'right' or"),
    (lambda: kv.from_cu_seqlens(CU[None, :0], 5), ValueError, r"expected \(segments \+ 1,\)"),
    (lambda: kv.from_cu_seqlens(CU + 1, 5), ValueError, "cu_seqlens_q begins with 1, expected 0"),
    (lambda: kv.from_cu_seqlens(CU, 5, CU[:3]), ValueError, r"shapes \(4,\) and \(3,\)"),
    (
        lambda: kv.from_cu_seqlens(torch.tensor([0, 3, 2]), 5),
        ValueError,
        "cu_seqlens_q decreases, expected running sums of lengths",
    ),
    (lambda: kv.intersect(), ValueError, "no range came"),
    (lambda: kv.intersect(kv.causal(3).long()), TypeError, "a range is torch.int64, expected an"),
    (
        lambda: kv.intersect(kv.causal(3), kv.causal(4)),
        ValueError,
        r"shapes \(1, 1, 3, 2\) and \(1, 1, 4, 2\)",
    ),
    (lambda: kv.to_mask(kv.causal(3)[0], 3), ValueError, r"expected \(B or 1, H or 1, Nq, 2\)"),
    (lambda: rope.rope_1d(4, 7), ValueError, "rotary_dim is 7, expected a positive multiple of 2"),
    (lambda: rope.rope_1d(4, 8, 0.0), ValueError, "theta is 0.0, expected a positive number"),
    (lambda: rope.rope_1d(-4, 8), ValueError, "positions is -4"),
    (lambda: rope.rope_1d(PLACED, 8), TypeError, "positions are torch.bool, expected integers or"),
    (lambda: rope.rope_1d(torch.zeros(1, 1, 4), 8), ValueError, r"expected \(N,\) or \(B, N\)"),
    (lambda: rope.rope_2d((4, 4), 6), ValueError, "expected a positive multiple of 4"),
    (lambda: rope.rope_2d((4, 4), 8, convention="x"), ValueError, "convention is 'x', expected"),
    (lambda: rope.rope_2d(5, 8), TypeError, r"positions is 5, expected \(height, width\) or"),
    (lambda: rope.rope_2d(torch.zeros(4, 3), 8), ValueError, r"shape \(4, 3\), expected \(N, 2\)"),
    (
        lambda: rope.rope_2d(torch.zeros(4, 2), 8, merge_size=2),
        ValueError,
        "give it to grid_positions",
    ),
    (lambda: rope.grid_positions(3, 4, merge_size=2), ValueError, "are 3, 4, expected multiples"),
    (
        lambda: rope.mrope(torch.zeros(2, 4), (2, 1, 1), 1e6),
        ValueError,
        r"shape \(2, 4\), expected \(3, N\)",
    ),
    (lambda: rope.mrope(torch.zeros(3, 4), (2, 1), 1e6), ValueError, r"sections are \(2, 1\)"),
    (
        lambda: rope.mrope(torch.zeros(3, 4), (1, 1, 4), 1e6, layout="interleaved"),
        ValueError,
        "within the 6 pairs",
    ),
    (lambda: rope.mrope(torch.zeros(3, 4), (2, 1, 1), 1e6, layout="x"), ValueError, "layout is"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_examples_of_the_docstrings(module: ModuleType) -> None:
    finder = doctest.DocTestFinder(recurse=True)
    shown = {test.name.rpartition(".")[2] for test in finder.find(module) if test.examples}
    assert shown == set(PUBLIC[module])
    assert doctest.testmod(module).failed == 0
