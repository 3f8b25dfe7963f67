"""attn_implementation="vlm_kernels" against transformers' own sdpa, on models of random weights."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import _load
from vlm_kernels.integrations.transformers import attention_forward, attention_mask
from vlm_kernels.testing.tolerances import assert_close

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers >= 5.23, whose masks it lists"
)
from transformers import masking_utils as masks  # noqa: E402

from tests.integrations import tiny_models  # noqa: E402
from tests.integrations.tiny_models import MODELS  # noqa: E402

NAME = "vlm_kernels"
SDPA = "aten::scaled_dot_product_attention"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered for one test: the registries are as before after it."""
    for registry in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))
    vlm_kernels.register_attention()
    torch.set_num_threads(1)  # the models are tiny


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the mask function returned: none, kv_range, dense."""
    seen: set[str] = set()
    mapping = transformers.AttentionMaskInterface._global_mapping
    function = mapping[NAME]

    def spy(**arguments: Any) -> Tensor | None:
        mask = function(**arguments)
        seen.add(kind(mask))
        return mask

    monkeypatch.setitem(mapping, NAME, spy)
    return seen


def kind(mask: Tensor | None) -> str:
    if mask is None:
        return "none"
    return "kv_range" if mask.dtype == torch.int32 else "dense"


def build(tiny: tiny_models.Tiny, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights whenever it is called, large enough for attention to matter."""
    torch.manual_seed(0)
    model = tiny.build().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype)


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def result(tiny: tiny_models.Tiny, implementation: str, dtype: torch.dtype) -> list[Tensor]:
    """The output and all gradients as one vector."""
    model = build(tiny, dtype)
    model.set_attn_implementation(implementation)
    out = tiny.output(model, cast(tiny.inputs(), dtype))
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    found = torch.autograd.grad((out * weight).sum(), list(model.parameters()), allow_unused=True)
    return [out.detach(), torch.cat([g.flatten() for g in found if g is not None])]


def ops_of(function: Callable[[], Any]) -> dict[str, int]:
    """How often each op ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, kinds: set[str]) -> None:
    """Output and gradients as near to fp64 as sdpa's, without a dense mask."""
    tiny = MODELS[name]
    exact = result(tiny, tiny.peer, torch.float64)
    peer = result(tiny, tiny.peer, torch.float32)
    assert not kinds
    ours = result(tiny, NAME, torch.float32)
    assert_close("output", ours[0], peer[0], exact[0])
    assert_close("gradients", ours[1], peer[1], exact[1], "bwd")
    assert kinds == tiny.masks


@pytest.mark.parametrize("name", ["vit", "llava-right"])
def test_our_kernel_is_what_runs(name: str) -> None:
    if _load._C is None:
        pytest.skip(f"needs the extension: {_load.load_error}")
    ran = ops_of(lambda: result(MODELS[name], NAME, torch.float32))
    layers = {"vit": 2, "llava-right": 4}[name]
    assert ran["vlm_kernels::attention_fwd"] == layers
    assert ran["vlm_kernels::attention_bwd"] == layers
    assert SDPA not in ran


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llava-left", "gemma3", "qwen2_5_vl"])
def test_generation(name: str, cache: str | None, kinds: set[str]) -> None:
    """The same tokens with a growing and with a preallocated cache."""
    tiny = MODELS[name]
    model, inputs = build(tiny), cast(tiny.inputs(), torch.float32)
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    generated = []
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        generated.append(
            model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
        )
    assert generated[0].shape[1] == inputs["input_ids"].shape[1] + 6
    assert torch.equal(*generated)
    assert kinds == {"kv_range", "dense"}  # the prompt, and single queries


def test_packed_vision() -> None:
    """With "flash" in the name transformers hands over cu_seqlens: one call a layer."""
    tiny = MODELS["qwen2_5_vl"]
    model, inputs = build(tiny), cast(tiny.inputs(), torch.float32)
    vlm_kernels.register_attention("vlm_kernels_flash")
    outputs, calls = [], []
    for vision in ("sdpa", "vlm_kernels_flash"):
        model.set_attn_implementation({"": NAME, "vision_config": vision, "text_config": NAME})
        with count_calls() as count:
            outputs.append(tiny.output(model, inputs))
        calls.append(count[0])
    exact = tiny.output(build(tiny, torch.float64), cast(inputs, torch.float64))
    assert_close("logits", outputs[1], outputs[0], exact)
    assert calls == [2, 4]  # two text layers; and two layers of the vision tower


class count_calls:
    """Calls of the two functions of vlm_kernels.ops.attention that the integration makes."""

    def __enter__(self) -> list[int]:
        from vlm_kernels.integrations import transformers as integration

        self.patch, count = pytest.MonkeyPatch(), [0]

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                count[0] += 1
                return function(*args, **kwargs)

            return call

        for name in ("attention", "attention_varlen"):
            self.patch.setattr(integration, name, counting(getattr(integration, name)))
        return count

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


LENGTH = 9
IDS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1], [0, 0, -1, -1, 1, 1, 1, 2, 2]])
SPLIT = torch.tensor([[-1, 0, 0, 0, -1, -1, 0, 0, -1], [0, 0, -1, -1, 1, 1, 1, 2, 2]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
PACKED = masks.find_packed_sequence_indices(POSITIONS)
CAUSAL = masks.causal_mask_function
PADDING = {
    "none": None,
    "ones": torch.ones(2, LENGTH).bool(),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]).bool(),
    "right": torch.tensor([[1] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool(),
    "empty": torch.tensor([[0] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool(),
    "short": torch.tensor([[1] * 7, [0] * 2 + [1] * 5]).bool(),
}
INTERVALS = {
    "causal": CAUSAL,
    "bidirectional": masks.bidirectional_mask_function,
    "sliding": masks.sliding_window_causal_mask_function(3),
    "sliding both ways": masks.sliding_window_bidirectional_mask_function(2),
    "chunked": masks.chunked_causal_mask_function(4, torch.tensor([2, 0])),
    "blocks": masks.or_masks(CAUSAL, masks.blockwise_overlay(IDS)),
    "blocks in a window": masks.and_masks(
        masks.or_masks(CAUSAL, masks.blockwise_overlay(IDS)), masks.sliding_window_overlay(4)
    ),
    "packed": masks.packed_sequence_compatibility_function(CAUSAL, POSITIONS, PACKED),
    "packed in a window": masks.packed_sequence_compatibility_function(
        masks.sliding_window_causal_mask_function(2), POSITIONS, PACKED
    ),
    "packed blocks": masks.or_masks(
        masks.packed_sequence_compatibility_function(CAUSAL, POSITIONS, PACKED),
        masks.blockwise_overlay(IDS),
    ),
}
OTHERS = {
    "unknown": lambda batch, head, query, key: (query + key) % 2 == 0,
    "a block in two runs": masks.or_masks(CAUSAL, masks.blockwise_overlay(SPLIT)),
    "packed chunks": masks.packed_sequence_compatibility_function(
        masks.chunked_causal_mask_function(2, torch.tensor([0, 0])), POSITIONS, PACKED
    ),
    "other positions": masks.and_masks(
        masks.packed_sequence_mask_function(PACKED),
        masks.remap_positions_for_packed_sequence(CAUSAL, POSITIONS // 2),
    ),
    "apart": masks.or_masks(masks.sliding_window_overlay(0), masks.blockwise_overlay(IDS)),
}
SPANS = [  # queries, offset of the first, offset of the first key, keys
    (9, 0, 0, 9),
    (4, 5, 0, 9),
    (4, 5, 3, 6),
    (4, 0, 0, 9),
    (4, torch.tensor(5), 0, 9),
]


def mask_arguments(function: Any, padding: Tensor | None, span: Any) -> dict[str, Any]:
    queries, q_offset, kv_offset, keys = span
    return {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding,
        "allow_is_causal_skip": function is CAUSAL,
        "allow_is_bidirectional_skip": function is masks.bidirectional_mask_function,
        "device": "cpu",
    }


def dense(mask: Tensor | None, function: Any, span: Any) -> Tensor:
    """The keys each query sees, (B, 1, Nq, Nk); None is what attention_forward takes it for."""
    queries, _, _, keys = span
    if mask is None:
        seen = torch.ones(2, 1, queries, keys, dtype=torch.bool)
        return seen.tril() if function is CAUSAL else seen
    if mask.dtype == torch.int32:
        key = torch.arange(keys)
        mask = (key >= mask[..., :1]) & (key < mask[..., 1:])
    return mask.expand(2, 1, queries, keys)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", INTERVALS)
def test_intervals(name: str, padding: str) -> None:
    """Each is read as the keys that transformers' dense mask of the same arguments has."""
    function = INTERVALS[name]
    for span in SPANS:
        arguments = mask_arguments(function, PADDING[padding], span)
        mask = attention_mask(**arguments)
        plain = name in ("causal", "bidirectional") and padding in ("none", "ones")
        assert kind(mask) in (("none", "kv_range") if plain else ("kv_range",)), span
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        expected = masks.sdpa_mask(**arguments)
        seen = dense(mask, function, span)
        if PADDING[padding] is not None:  # padding as a query is nobody's key: it may see anything
            rows = torch.arange(span[0]) + span[1]
            real = torch.nn.functional.pad(PADDING[padding], (0, 2))[:, rows][:, None, :, None]
            seen, expected = seen & real, expected & real
        assert torch.equal(seen, expected), span


@pytest.mark.parametrize("name", OTHERS)
def test_no_intervals(name: str) -> None:
    """What is no interval, or unknown, takes the dense mask of transformers."""
    for padding, span in itertools.product(("none", "left"), SPANS):
        arguments = mask_arguments(OTHERS[name], PADDING[padding], span)
        mask = attention_mask(**arguments)
        assert kind(mask) == "dense"
        assert torch.equal(mask, masks.sdpa_mask(**arguments))


def test_padding_with_holes() -> None:
    holes = torch.tensor([[1, 0, 1] * 3, [1] * 9]).bool()
    arguments = mask_arguments(CAUSAL, holes, SPANS[0])
    mask = attention_mask(**arguments)
    assert kind(mask) == "dense"
    assert torch.equal(mask, masks.sdpa_mask(**arguments))


@pytest.mark.parametrize("name", INTERVALS)
def test_device_tensors_are_not_read(name: str) -> None:
    """With the promise that runs are contiguous. Reading a meta tensor would raise."""
    function = on_meta(INTERVALS[name])
    arguments = mask_arguments(function, PADDING["left"].to("meta"), SPANS[0])
    mask = attention_mask(**{**arguments, "device": "meta"}, contiguous=True)
    assert mask is not None
    assert mask.dtype == torch.int32
    assert mask.shape == (2, 1, LENGTH, 2)
    assert mask.is_meta


def on_meta(function: Any) -> Any:
    """The mask function with its tensors on the meta device."""
    if not function.__closure__:
        return function

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta")
        if isinstance(value, tuple):
            return tuple(moved(each) for each in value)
        return on_meta(value) if callable(value) else value

    other = copy.copy(function)
    return type(function)(
        other.__code__,
        other.__globals__,
        closure=tuple(type(cell)(moved(cell.cell_contents)) for cell in function.__closure__),
    )


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaModel(transformers.LlamaConfig(**tiny_models.GQA)).to(dtype).eval()


def test_packed_text(kinds: set[str]) -> None:
    """Sequences packed into a row, told by positions or by cu_seq_lens, do not see each other."""
    lengths = [4, 7, 1, 5]
    ids = torch.randint(3, 50, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    separate = {
        dtype: torch.cat(
            [llama(dtype)(part).last_hidden_state for part in ids.split(lengths, 1)], 1
        )
        for dtype in (torch.float32, torch.float64)
    }
    model = llama()
    model.set_attn_implementation(NAME)
    by_positions = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert kinds == {"kv_range"}
    masked = transformers.AttentionMaskInterface._global_mapping
    masked[NAME] = lambda **_: None  # as for a model that makes no mask
    by_ends = model(
        ids, position_ids=positions, use_cache=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends
    ).last_hidden_state
    for ours in (by_positions, by_ends):
        assert_close("packed", ours, separate[torch.float32], separate[torch.float64])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_window(causal: bool) -> None:
    """A sliding window beside cu_seq_lens, with flash-attention's meaning in transformers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ends, segment = torch.tensor([0, 4, 11, 12]), torch.tensor([0] * 4 + [1] * 7 + [2])
    place = torch.arange(12)
    near = (place[:, None] - place).abs() < 3
    near &= segment[:, None] == segment
    if causal:
        near &= place[:, None] >= place
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    module = torch.nn.Module()
    exact, peer = (
        sdpa_attention_forward(module, *(x.to(dtype) for x in (q, k, v)), near)[0]
        for dtype in (torch.float64, torch.float32)
    )
    packed = {"cu_seq_lens_q": ends.int(), "sliding_window": 3, "is_causal": causal}
    assert_close("packed", attention_forward(module, q, k, v, None, **packed)[0], peer, exact)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_sinks(packed: bool) -> None:
    """gpt-oss: a logit more in each row."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    class Module(torch.nn.Module):
        num_key_value_groups, training, is_causal = 2, False, False

    inputs = [torch.randn(2, heads, 9, 8) for heads in (4, 2, 2)] + [torch.randn(4)]

    def run(function: Callable[..., Any], dtype: torch.dtype, **extra: Any) -> list[Tensor]:
        q, k, v, sinks = leaves = [x.to(dtype).requires_grad_() for x in inputs]
        module = Module()
        module.sinks = torch.nn.Parameter(sinks)
        leaves[3] = module.sinks
        out = function(
            module, q, k, v, None, scaling=0.3, dropout=0.0, **extra, s_aux=module.sinks
        )[0]
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    exact = run(eager_attention_forward, torch.float64)
    eager = run(eager_attention_forward, torch.float32)
    ends = {"cu_seq_lens_q": torch.tensor([0, 9, 18]).int()} if packed else {}
    for i, ours in enumerate(run(attention_forward, torch.float32, **ends)):
        assert_close(f"result {i}", ours, eager[i], exact[i], "bwd" if i else "fwd")


def test_compile() -> None:
    """Without graph breaks, with padding and without."""
    model = llama()
    ids = torch.randint(3, 50, (2, LENGTH))
    model.set_attn_implementation("sdpa")
    exact = llama(torch.float64)
    sdpa = [model(ids, attention_mask=PADDING[p]).last_hidden_state for p in ("none", "left")]
    model.set_attn_implementation(NAME)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name, peer in zip(("none", "left"), sdpa):
        padding = PADDING[name]
        real = torch.ones_like(ids).bool() if padding is None else padding
        ours = compiled(ids, attention_mask=padding, use_cache=False).last_hidden_state
        expected = exact(ids, attention_mask=padding).last_hidden_state
        assert_close(name, ours[real], peer[real], expected[real])


def test_only_its_own_names_are_registered() -> None:
    registries = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    before = [dict(registry._global_mapping) for registry in registries]
    vlm_kernels.register_attention()
    vlm_kernels.register_attention("other", contiguous=True, backend="reference")
    for registry, entries in zip(registries, before):
        after = registry._global_mapping
        assert set(after) == {*entries, "other"}
        assert all(after[name] is entries[name] for name in entries if name != NAME)


def test_the_backend_is_the_one_asked_for() -> None:
    vlm_kernels.register_attention("reference_attention", backend="reference")
    model = llama()
    model.set_attn_implementation("reference_attention")
    ran = ops_of(lambda: model(torch.tensor([[3, 4, 5]])))
    assert "vlm_kernels::attention_fwd" not in ran
    assert "aten::matmul" in ran


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Module()
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1, the kernels have none; set"):
        attention_forward(module, x, x, x, None, dropout=0.1)
    with pytest.raises(ValueError, match="list came as cache=, continuous batching"):
        attention_forward(module, x, x, x, None, cache=[])
    with pytest.raises(ValueError, match="Module selects keys by indices"):
        attention_forward(module, x, x, x, None, indices=torch.zeros(1))
    monkeypatch.setattr(_load, "_warned", set())
    with pytest.warns(UserWarning, match="output_attentions=True: vlm_kernels never forms"):
        assert attention_forward(module, x, x, x, None, output_attentions=True)[1] is None
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers >= 4\.57: pip install"):
        vlm_kernels.register_attention()
