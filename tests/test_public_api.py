"""The public API: what it is called, how it is called, and what importing it costs."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_kernels
from vlm_kernels import _load, nn
from vlm_kernels.ops import attention as attention_ops

PUBLIC = [
    "__version__",
    "attention",
    "attention_varlen",
    "causal_lower_right",
    "clip_loss",
    "collect_env",
    "empty_cache",
    "explain",
    "fold_normalization",
    "image_blocks",
    "interpolate_pos_embed",
    "mrope",
    "nn",
    "patch_embed",
    "patch_embed_packed",
    "patchify",
    "per_image_cross_attention",
    "prefix_lm",
    "register_attention",
    "rope_1d",
    "rope_2d",
    "siglip_loss",
    "sliding_window",
]
# What only attention's own module has: names that say little without it.
BUILDERS = {"causal", "from_cu_seqlens", "grid_positions", "intersect", "padding", "to_mask"}
REQUIRED = inspect.Parameter.empty
CONTRASTIVE = [
    ("image_features", REQUIRED),
    ("text_features", REQUIRED),
    ("logit_scale", REQUIRED),
    ("logit_bias", None),
]
PIXELS = [("images", REQUIRED), ("weight", REQUIRED), ("bias", None)]
PATCHES: list[tuple[str, Any]] = [
    ("patch_size", REQUIRED),
    ("stride", None),
    ("layout", "nchw"),
    ("k_order", "cyx"),
    ("mean", None),
    ("std", None),
    ("rescale", 1 / 255),
]
AROUND = [("prefix", None), ("newline", None)]
GROUPED = [("merge", 1), ("temporal", 1), ("pad_space", "raw")]
PROJECTED = [("query", REQUIRED), ("key", REQUIRED), ("value", REQUIRED)]
SIGNATURES: list[tuple[Callable[..., Any], list[tuple[str, Any]], list[tuple[str, Any]]]] = [
    (
        vlm_kernels.clip_loss,
        CONTRASTIVE,
        [
            ("image_ids", None),
            ("text_ids", None),
            ("labels", None),
            ("weights", None),
            ("label_smoothing", 0.0),
            ("ignore_same_ids", False),
            ("directions", "both"),
            ("reduction", "mean"),
            ("workspace_mb", None),
            ("return_metrics", False),
            ("backend", "auto"),
        ],
    ),
    (
        vlm_kernels.siglip_loss,
        CONTRASTIVE,
        [
            ("image_ids", None),
            ("text_ids", None),
            ("labels", None),
            ("weights", None),
            ("ignore_same_ids", False),
            ("reduction", "mean"),
            ("workspace_mb", None),
            ("return_metrics", False),
            ("backend", "auto"),
        ],
    ),
    (
        vlm_kernels.attention,
        [*PROJECTED, ("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False)],
        [
            ("scale", None),
            ("enable_gqa", False),
            ("window", None),
            ("kv_range", None),
            ("softcap", 0.0),
            ("rope", None),
            ("q_norm", None),
            ("k_norm", None),
            ("return_lse", False),
            ("backend", "auto"),
        ],
    ),
    (
        vlm_kernels.attention_varlen,
        [*PROJECTED, ("cu_seqlens_q", REQUIRED), ("cu_seqlens_k", REQUIRED)],
        [
            ("is_causal", False),
            ("scale", None),
            ("window", None),
            ("softcap", 0.0),
            ("rope", None),
            ("q_norm", None),
            ("k_norm", None),
            ("return_lse", False),
            ("backend", "auto"),
        ],
    ),
    (
        vlm_kernels.patch_embed,
        PIXELS,
        [*PATCHES, ("pos", None), *AROUND, *GROUPED, ("backend", "auto")],
    ),
    (
        vlm_kernels.patch_embed_packed,
        PIXELS,
        [
            *PATCHES,
            ("pos", None),
            ("pos_table", None),
            ("pos_mode", "bicubic"),
            *AROUND,
            *GROUPED,
            ("backend", "auto"),
        ],
    ),
    (
        vlm_kernels.patchify,
        [("images", REQUIRED), ("patch_size", REQUIRED)],
        [*PATCHES[1:], *GROUPED, ("dtype", torch.float32)],
    ),
    (
        vlm_kernels.fold_normalization,
        [(name, REQUIRED) for name in ("weight", "bias", "mean", "std")] + [("dtype", None)],
        [("rescale", 1 / 255), ("k_order", "cyx")],
    ),
    (
        vlm_kernels.interpolate_pos_embed,
        [("table", REQUIRED), ("grid", REQUIRED)],
        [
            ("mode", "bicubic"),
            ("antialias", False),
            ("align_corners", False),
            ("offset", 0.0),
            ("prefix", 0),
            ("merge", 1),
            ("table_grid", None),
        ],
    ),
    (
        nn.PatchEmbed,
        [("in_channels", 3), ("embed_dim", 768)],
        [
            *PATCHES[:2],
            ("bias", True),
            *PATCHES[2:],
            *GROUPED,
            ("remainder", "pad"),
            ("backend", "auto"),
            ("device", None),
            ("dtype", None),
        ],
    ),
    (
        nn.PatchEmbed.forward,
        [("self", REQUIRED), ("images", REQUIRED), ("pos", None), *AROUND],
        [],
    ),
    (
        nn.Attention,
        [("dim", REQUIRED), ("num_heads", 8)],
        [
            ("num_kv_heads", None),
            ("head_dim", None),
            ("qkv_bias", False),
            ("qk_norm", None),
            ("norm_eps", 1e-6),
            ("proj_bias", True),
            ("is_causal", False),
            ("backend", "auto"),
        ],
    ),
    (
        nn.Attention.forward,
        [("self", REQUIRED), ("x", REQUIRED), ("context", None), ("attn_mask", None)],
        [("window", None), ("kv_range", None), ("rope", None)],
    ),
    (
        nn.ClipLoss,
        [
            ("local_loss", False),
            ("gather_with_grad", False),
            ("cache_labels", False),
            ("rank", 0),
            ("world_size", 1),
            ("use_horovod", False),
        ],
        [("backend", "auto")],
    ),
    (
        nn.SigLipLoss,
        [("cache_labels", False), ("rank", 0), ("world_size", 1), ("dist_impl", None)],
        [("backend", "auto")],
    ),
    (nn.ClipLoss.forward, [("self", REQUIRED), *CONTRASTIVE, ("output_dict", False)], []),
    (
        nn.SigLipLoss.forward,
        [("self", REQUIRED), *CONTRASTIVE[:3], ("logit_bias", REQUIRED), ("output_dict", False)],
        [],
    ),
]


def test_names() -> None:
    assert sorted(vlm_kernels.__all__) == PUBLIC
    assert sorted(nn.__all__) == ["Attention", "ClipLoss", "PatchEmbed", "SigLipLoss"]
    for module in (vlm_kernels, nn, attention_ops):
        for name in module.__all__:
            assert hasattr(module, name), name


def test_attention_and_its_builders_stand_together() -> None:
    """Those with a name that speaks for itself are in the package too, as the same function."""
    own = set(attention_ops.__all__)
    assert own >= BUILDERS
    shared = own & set(PUBLIC)
    assert own - shared == BUILDERS
    for name in shared:
        assert getattr(vlm_kernels, name) is getattr(attention_ops, name)
    for name in own:
        assert inspect.getdoc(getattr(attention_ops, name)), name


@pytest.mark.parametrize(
    ("function", "positional", "keyword_only"),
    SIGNATURES,
    ids=[function.__qualname__ for function, _, _ in SIGNATURES],
)
def test_signature(
    function: Callable[..., Any],
    positional: list[tuple[str, Any]],
    keyword_only: list[tuple[str, Any]],
) -> None:
    expected = [(name, "POSITIONAL_OR_KEYWORD", default) for name, default in positional]
    expected += [(name, "KEYWORD_ONLY", default) for name, default in keyword_only]
    parameters = inspect.signature(function).parameters.values()
    assert [(p.name, p.kind.name, p.default) for p in parameters] == expected


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ("__version__", "nn")])
def test_docstrings(name: str) -> None:
    assert inspect.getdoc(getattr(vlm_kernels, name))


def test_extension_stub() -> None:
    if _load._C is None:
        pytest.skip(f"needs the extension: {_load.load_error}")
    tree = ast.parse((_load.FOLDER / "_C.pyi").read_text())
    declared = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    declared |= {
        node.target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert declared == {name for name in dir(_load._C) if not name.startswith("__")}


def test_import_is_light() -> None:
    """Over torch's own import: at most 0.1 s, the best of three, and nothing heavy."""
    code = (
        "import sys, time, torch; before, start = set(sys.modules), time.perf_counter()\n"
        "import vlm_kernels, json; seconds = time.perf_counter() - start\n"
        "print(json.dumps([seconds, sorted({m.split('.')[0] for m in sys.modules} - {'__main__'}),"
        " sorted(set(sys.modules) - before)]))"
    )
    fastest = float("inf")
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root()
        )
        seconds, packages, added = json.loads(done.stdout)
        heavy = [m for m in added if m.startswith(("torch._dynamo", "torch._inductor", "triton"))]
        assert not heavy
        assert not {"triton", "vlm_models", "numba"} & set(packages)
        fastest = min(fastest, seconds)
        if fastest <= 0.1:
            return
    pytest.fail(f"importing vlm_kernels takes {fastest:.3f} s over torch's import")


def root() -> Path:
    return _load.FOLDER.parent


def test_collect_env() -> None:
    report = vlm_kernels.collect_env()
    assert json.loads(json.dumps(report)) == report
    failed = {name: value for name, value in report.items() if "failed:" in str(value)}
    assert not failed
    assert report["vlm_kernels"]["version"] == vlm_kernels.__version__


def test_collect_env_stands_alone(tmp_path: Path) -> None:
    """The file alone, where neither torch nor vlm_kernels can be imported, still reports."""
    script = tmp_path / "vlm_kernels" / "collect_env.py"
    script.parent.mkdir()
    script.write_text((_load.FOLDER / "collect_env.py").read_text())
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "--json"],  # -S: no site-packages
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["torch"].startswith("failed: ModuleNotFoundError")
    assert report["python"]["executable"] == sys.executable
    assert report["cpu"]["cores"] >= 1
