"""The benchmark suite itself: its rows, and that `--check` is as strict as it says."""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def suite() -> Iterator[ModuleType]:
    """The package `benchmarks`, which is not installed, with all its modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        importlib.import_module("benchmarks.__main__")
        yield importlib.import_module("benchmarks")


@pytest.fixture
def row(suite: ModuleType):
    """Makes a row of a file of results; by default one of ours that counts."""

    def make(kind: str = "time", **fields: Any) -> dict[str, Any]:
        default = {"provider": "vlm_kernels", "ours": True, "backend": "cpu", "counts": True}
        return asdict(suite.record.Row(kind, **{**default, **fields}))

    return make


@pytest.fixture
def passing(suite: ModuleType, row) -> list[dict[str, Any]]:
    """Rows that hold every target, each by a little."""
    targets = suite.targets
    rows = [
        row(
            op=t.op,
            group=t.group,
            mode=t.mode,
            dtype=t.dtype,
            shape=shape,
            workspace_mb=t.workspace_mb,
            speedup=t.geomean * 1.01,
            ratios={"sdpa": 3.01, "eager_batched": 0.5, "stem_conv": 1.6, "bare_linear": 0.96},
            other_load=0.1,
            roofline_pct=50.0,
        )
        for t in targets.SPEED
        # without a floor a target of a CPU looks at the rows of another
        if t.floor and t.device == "cpu"
        for shape in t.shapes
    ]
    n, d = targets.MEMORY_SHAPE
    rows += [
        row("memory", op=t.op, mode="full", dtype=t.dtype, n=n, m=n, d=d, peak_mib=t.limit * 0.99,
            workspace_mb=targets.MEMORY_MB)
        for t in targets.MEMORY
    ]  # fmt: skip
    rows += [row("cost", name=t.name, value=t.limit * 0.99) for t in targets.COST]
    return rows + passing_on_a_gpu(targets, row)


def passing_on_a_gpu(targets: ModuleType, row) -> list[dict[str, Any]]:
    names = {"sdpa*": "sdpa_cudnn", "ops_sdpa*": "ops_sdpa", "*_compile": "open_clip_compile"}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for t in (t for t in targets.SPEED if t.device == "cuda"):
        for shape in t.shapes:
            default = row(op=t.op, group=t.group, mode=t.mode, dtype=t.dtype, shape=shape)
            default |= {"device": "cuda", "backend": "cuda", "speedup": 1.3, "roofline_pct": 75.5}
            one = found.setdefault((t.op, t.mode, shape), default)
            ratios = {names.get(t.against, t.against): t.geomean * 1.01, "slower": 99.0}
            kind = {"ms": "ratios", "eager_ms": "eager_ratios"}[t.of]
            one[kind] = {**(one[kind] or {}), **ratios}
    for limit in targets.TIME:
        found[limit.op, limit.mode, limit.shape]["ms"] = limit.limit * 0.99
    return list(found.values())


def misses(suite: ModuleType, rows: list[dict[str, Any]]) -> list[str]:
    return [str(verdict) for verdict in suite.targets.check(rows) if verdict.ok is False]


def change(rows: list[dict[str, Any]], change: dict[str, Any], **where: Any) -> None:
    """Changes the first row that has these values."""
    found = next(r for r in rows if all(r[key] == value for key, value in where.items()))
    found.update(change)


def test_check_holds_where_every_target_does(suite: ModuleType, passing, capsys) -> None:
    assert all(verdict.ok for verdict in suite.targets.check(passing))
    assert suite.report.show(passing, False, None, True) == 0
    assert "0 missed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "changed", "reason"),
    [
        (
            {"op": "clip_loss", "dtype": "fp32", "shape": "4096x512"},
            {"speedup": 1.24},
            "worst 1.24x",
        ),
        ({"workspace_mb": 16}, {"speedup": 1.04}, "1.04x"),
        ({"op": "siglip_loss"}, {"counts": False, "backend": "reference"}, "backend reference"),
        ({"op": "attention", "mode": "fwd"}, {"speedup": 1.34}, "attention dense fwd fp32"),
        (
            {"group": "dense", "dtype": "bf16"},
            {"ratios": {"sdpa": 1.0, "eager": 9.0}},
            "against sdpa",
        ),
        (
            {"group": "odd_dims"},
            {"ratios": {"sdpa_cudnn": 1.14}},
            "odd_dims fwd bf16 against sdpa*",
        ),
        ({"group": "bwd_short"}, {"ratios": {"sdpa": 1.29}}, "bwd_short bwd bf16"),
        ({"group": "masks_gpu"}, {"ratios": {"flex": 0.1, "sdpa_mask": 3.1}}, "against flex"),
        ({"group": "latency"}, {"eager_ratios": {"sdpa_flash": 1.0}}, "worst 1.00x"),
        ({"group": "decode"}, {"roofline_pct": 74.0}, "share 74-76 % (target 75%)"),
        ({"group": "rope_norm"}, {"status": "error", "reason": "no kernel"}, "no kernel"),
        ({"op": "clip_loss", "shape": "65536x768"}, {"ms": 42.1}, "42.1 ms"),
        ({"group": "packed"}, {"ratios": {"sdpa_mask": 1.0}}, "worst 1.00x"),
        (
            {"group": "uint8", "dtype": "fp32"},
            {"ratios": {"stem_conv": 1.6, "bare_linear": 0.5}},
            "uint8 fwd fp32 against bare_linear",
        ),
        (
            {"group": "float", "dtype": "bf16"},
            {"ratios": {"stem_conv": 1.6, "stem_conv_compile": 1.09, "stem_linear": 0.1}},
            "float full bf16 against stem_conv*",
        ),
        ({"group": "packed"}, {"counts": False, "backend": "reference"}, "attention packed"),
        ({"op": "siglip_loss"}, {"status": "error", "reason": "Boom: no"}, "Boom: no"),
        ({"kind": "time"}, {"speedup": None}, "no peer ran"),
        ({"kind": "memory", "dtype": "fp32"}, {"peak_mib": 40.1}, "40.1 MiB"),
        ({"kind": "memory"}, {"counts": False, "backend": "reference"}, "backend reference"),
        ({"name": "import"}, {"value": 0.11}, "0.11 s"),
        ({"name": "call, no gradients"}, {"status": "skipped", "reason": "no _C"}, "no _C"),
    ],
)
def test_check_fails_for_one_bad_row(
    suite: ModuleType, passing, where, changed, reason, capsys
) -> None:
    change(passing, changed, **where)
    (missed,) = misses(suite, passing)
    assert reason in missed
    assert suite.report.show(passing, False, None, True) == 1
    assert "MISS" in capsys.readouterr().out


def test_rows_of_one_device_hold_no_target_of_another(suite: ModuleType, passing) -> None:
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        rows = [r for r in passing if r["device"] == device and r["op"] == "attention"]
        rows = [{**r, "device": other} for r in rows]
        verdicts = suite.targets.check([r for r in rows if r["kind"] == "time"])
        assert not [v for v in verdicts if v.ok is not None and "quiet" not in v.what]


def test_the_faster_of_two_backends_counts_and_a_broken_one_is_a_miss(
    suite: ModuleType, passing
) -> None:
    first = next(r for r in passing if r["group"] == "odd_dims")
    slow = {**first, "backend": "triton", "ratios": {"sdpa_cudnn": 0.5}}
    assert not misses(suite, [*passing, slow])
    broken = {**slow, "status": "error", "reason": "did not compile"}
    (missed,) = misses(suite, [*passing, broken])
    assert "did not compile" in missed


def test_check_takes_the_geomean_of_all_shapes(suite: ModuleType, passing) -> None:
    for r in passing:
        if (r["op"], r["dtype"], r["kind"], r["device"]) == ("siglip_loss", "bf16", "time", "cpu"):
            r["speedup"] = 1.49  # above the floor everywhere
    (missed,) = misses(suite, passing)
    assert "siglip_loss full bf16" in missed


def test_check_asks_for_a_quiet_machine(suite: ModuleType, passing) -> None:
    for r in passing:
        r["other_load"] = 0.3
    (missed,) = misses(suite, passing)
    assert "quiet machine" in missed


def test_a_loss_is_never_hidden_by_another_row(suite: ModuleType, passing, row) -> None:
    # the worst of several measurements of one cost counts
    passing.append(row("cost", name="import", value=0.5))
    assert len(misses(suite, passing)) == 1


def test_check_of_a_run_that_measured_nothing_fails(suite: ModuleType, row, capsys) -> None:
    rows = [row(op="clip_loss", mode="full", dtype="fp32", n=7, m=7, d=3, speedup=9.0)]
    verdicts = suite.targets.check(rows)
    assert {verdict.ok for verdict in verdicts} == {None}
    assert suite.report.show(rows, False, None, True) == 1
    assert "0 targets hold" in capsys.readouterr().out


def test_check_says_how_many_shapes_were_run(suite: ModuleType, passing) -> None:
    kept = [r for r in passing if r["kind"] == "time" and r["shape"].startswith("2048x")]
    held = [verdict for verdict in suite.targets.check(kept) if verdict.ok]
    held = [verdict for verdict in held if "full" in verdict.what]
    assert len(held) == 4
    assert all("only 2 of 6 shapes" in verdict.got for verdict in held)


def test_run_writes_a_full_row_for_each_provider(suite: ModuleType, tmp_path, capsys) -> None:
    file, picture = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    command = "run --quick --mode fwd,full --shapes 48x16,32x40x16 --peers open_clip --repeats 2"
    command += f" --min-time 0 --json {file} --plot {picture}"
    assert suite.__main__.main(command.split()) == 0
    rows = suite.record.read(str(file))
    # 2 losses, 2 modes, 2 dtypes, 2 shapes, ours and a peer
    assert len(rows) == 32
    for r in rows:
        assert set(r) == set(suite.record.FIELDS)
        assert r["machine"]["torch"] == torch.__version__
        assert r["repro"].startswith("python -m benchmarks run")
        if r["status"] != "ok":
            assert (r["provider"], r["n"], r["m"]) == ("open_clip", 32, 40)
            assert "one to one" in r["reason"]
            continue
        assert r["ms_p20"] <= r["ms"] <= r["ms_p80"]
        assert r["samples"] == 2 or not r["ours"]
        assert r["tflops"] == pytest.approx(r["flops"] / r["ms"] / 1e9)
        assert r["peak_tflops"] > 0
        assert r["roofline_pct"] > 0
        grads = {"image_features", "text_features", "logit_scale", "logit_bias"}
        if r["op"] == "clip_loss":
            grads.remove("logit_bias")
        assert set(r["err"]) == {"loss"} | (grads if r["mode"] == "full" else set())
        assert max(r["err"].values()) < 0.2
        assert r["counts"] == (r["ours"] and r["backend"] == "cpu")
    assert picture.read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert suite.__main__.main(["report", str(file)]) == 0
    assert capsys.readouterr().out == printed
    assert suite.__main__.main(["report", str(file), "--markdown"]) == 0
    assert "| case |" in capsys.readouterr().out


def test_a_fallback_never_counts_as_ours(suite: ModuleType, capsys) -> None:
    command = "run --quick --op siglip_loss --dtype fp32 --shapes 16x8 --peers open_clip"
    command += " --backend reference --repeats 1 --min-time 0 --check"
    assert suite.__main__.main(command.split()) == 1
    printed = capsys.readouterr().out
    assert "not our kernel" in printed
    assert "no row of ours counts" in printed


def provider(suite: ModuleType, name: str, loss: Any) -> Any:
    return suite.peers.Provider(name, lambda dynamic: loss)


def test_what_fails_or_does_not_fit_is_a_row_with_a_reason(suite: ModuleType, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the peer\nhas two lines")

    case = suite.peers.contrastive.Case("clip_loss", "full", "fp32", 16, 16, 8)
    settings = suite.measure.Settings(repeats=1, min_time=0.0)
    rows = suite.measure.time_case(case, [provider(suite, "broken", broken)], settings)
    assert (rows[0].status, rows[0].reason, rows[0].ms) == ("error", "RuntimeError: the peer", None)

    monkeypatch.setattr(suite.measure, "_available", lambda: 16 * 16 * 4)
    (huge, *_) = suite.peers.choose("clip_loss", "open_clip")
    (row,) = suite.measure.time_case(case, [huge], settings)
    assert row.status == "skipped"
    assert row.reason.startswith("needs about")


def test_a_slow_peer_is_timed_once_and_ours_never_dropped(suite: ModuleType, monkeypatch) -> None:
    seconds = {"ours": 9.0, "fast": 1.0, "near": 1.4, "slow": 1.6}

    def interleaved(fns, rounds=None, min_rounds=0, **_):
        count = rounds or min_rounds
        return {name: suite.measure.timing.Timing([seconds[name]] * count) for name in fns}

    monkeypatch.setattr(suite.measure.timing, "interleaved", interleaved)
    settings = suite.measure.Settings(repeats=5)
    times = suite.measure._times(dict.fromkeys(seconds, lambda: None), {"ours"}, settings)
    assert {name: len(t) for name, t in times.items()} == {
        "ours": 5,
        "fast": 5,
        "near": 5,
        "slow": 1,
    }


def test_rows_are_compared_with_the_best_peer_and_the_limit(suite: ModuleType) -> None:
    same: dict[str, Any] = {"op": "clip_loss", "mode": "full", "dtype": "fp32"}
    same |= {"n": 64, "m": 64, "d": 8, "flops": 1e9, "bytes": 1.0}
    rows = [
        suite.record.Row("time", "vlm_kernels", True, ms=2.0, eager_ms=5.0, **same),
        suite.record.Row("time", "slower", False, ms=9.0, eager_ms=10.0, **same),
        suite.record.Row("time", "best", False, ms=3.0, **same),
        suite.record.Row("time", "failed", False, status="error", **same),
        suite.record.Row("time", "elsewhere", False, ms=1.0, **{**same, "d": 16}),
    ]
    limits = suite.roofline.Roofline({"fp32": 4e11}, {"fp32": "mm"}, 1e9)
    suite.run.finish(rows, limits)
    assert (rows[0].best_peer, rows[0].speedup) == ("best", 1.5)
    assert rows[0].eager_ratios == {"slower": 2.0}
    assert rows[0].roofline_pct == pytest.approx(125)
    assert rows[0].suspicious
    assert not rows[1].suspicious
    assert rows[3].speedup is None
    text = suite.report.table([asdict(r) for r in rows])
    assert text.count("SUSPICIOUS") == 2  # ours, and the row of its own case


def test_the_roofline_keeps_the_better_of_two(suite: ModuleType) -> None:
    first = suite.roofline.Roofline({"fp32": 2.0, "bf16": 5.0}, {"fp32": "a", "bf16": "a"}, 3.0)
    second = suite.roofline.Roofline({"fp32": 3.0, "bf16": 4.0}, {"fp32": "b", "bf16": "b"}, 2.0)
    best = first.best(second)
    assert (best.flops, best.bytes) == ({"fp32": 3.0, "bf16": 5.0}, 3.0)
    assert best.source == {"fp32": "b", "bf16": "a"}
    # bound by the bytes, then by the products
    assert best.seconds("fp32", flops=3.0, moved=30.0) == 10.0
    assert best.seconds("fp32", flops=60.0, moved=3.0) == 20.0


def test_memory_sees_the_matrices_that_a_peer_holds(suite: ModuleType) -> None:
    case = suite.peers.contrastive.Case("clip_loss", "full", "fp32", 2048, 2048, 16)
    settings = suite.measure.Settings()
    (peer,) = suite.peers.choose("clip_loss", "open_clip")
    row = suite.measure.memory_case(case, peer, settings)
    assert (row.status, row.reason) == ("ok", "")
    assert row.peak_mib > 2 * 2048**2 * 4 / 2**20
    ours = suite.measure.memory_case(case, suite.peers.ours("clip_loss", 4), settings)
    assert ours.status == "ok"
    if ours.counts:
        assert ours.peak_mib < row.peak_mib / 3


def test_costs(suite: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(suite.cost, "_CALLS", 5)
    monkeypatch.setattr(suite.cost, "_ROUNDS", 2)
    threads = torch.get_num_threads()
    names = ["call, no gradients", "call, gradients", "call and backward"]
    for op in ("clip_loss", "attention", "patch_embed"):
        rows = suite.cost.overhead(op)
        assert torch.get_num_threads() == threads
        assert [(r.name, r.op) for r in rows] == [(name, op) for name in names]
        assert all(r.value is not None or r.reason for r in rows)
    assert 0 < suite.cost.import_seconds(runs=1) < 5


def test_files_are_overwritten_or_appended_to(suite: ModuleType, tmp_path) -> None:
    file = str(tmp_path / "new" / "rows.jsonl")
    one = [suite.record.Row("cost", "vlm_kernels", True, name="import", value=0.1, unit="s")]
    suite.record.write(one, file)
    suite.record.write(one, file)
    assert len(suite.record.read(file)) == 1
    suite.record.write(one, file, append=True)
    assert len(suite.record.read(file)) == 2


@pytest.mark.parametrize("line", ["not json", json.dumps({"kind": "time"})])
def test_a_damaged_file_is_named(suite: ModuleType, tmp_path, line, capsys) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    assert suite.__main__.main(["report", str(file)]) == 2
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument",
    ["--peers nobody", "--shapes 12", "--shapes 0x4", "--dtype int8", "--mode back", "--threads 0"],
)
def test_a_wrong_argument_is_refused_before_anything_runs(suite: ModuleType, argument, capsys):
    with pytest.raises(SystemExit) as stop:
        suite.__main__.main(["run", *argument.split()])
    assert stop.value.code == 2
    assert argument.split()[0] in capsys.readouterr().err


def test_a_commit_travels_in_a_file(suite: ModuleType, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(suite.record, "ROOT", tmp_path)
    suite.record.this_commit.cache_clear()
    try:
        assert suite.record.this_commit() == (None, None)
        (tmp_path / "COMMIT").write_text("abc123 dirty\n")
        suite.record.this_commit.cache_clear()
        assert suite.record.this_commit() == ("abc123", True)
    finally:
        suite.record.this_commit.cache_clear()


# --- attention ---

SMALL = (
    "2x3x37x24",
    "2x3x32x57x24",
    "windows:2x256x24",
    "images:1x16",
    "prefix_lm:2x2x128x16",
    "image_blocks:2x2x128x16",
    "per_image:2x2x128x16",
    "rope_norm:2x2x65x24",
    "decode:2x4x2x77x24",
)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize(("mode", "dtype"), [("full", "fp32"), ("fwd", "bf16"), ("bwd", "fp32")])
def test_ours_and_the_peers_compute_the_same(suite: ModuleType, shape, mode, dtype) -> None:
    """The peers from the rule of a pattern, ours from its kv_range or cu_seqlens."""
    attention = suite.peers.attention
    case = attention.parse(shape, mode, dtype)
    mine = [suite.peers.ours("attention", None, backend) for backend in ("cpu", "reference")]
    rivals = [peer for peer in attention.peers("attention") if case.takes(peer)]
    assert rivals
    for provider in [*mine, *rivals]:
        # what compiles for seconds is called once, below; the mask of the images has 24 M entries
        if provider.name == "flex" or (case.pattern, provider.name) == ("images", "sdpa_mask"):
            continue
        errors, _ = suite.measure._error(case, provider, suite.measure.Settings())
        grads = set() if mode == "fwd" else {"query", "key", "value"}
        if grads and case.pattern == "rope_norm":
            grads |= {"q_weight", "k_weight"}
        assert set(errors) == {"out"} | grads
        assert max(errors.values()) < (2e-6 if dtype == "fp32" else 1e-2), (provider, errors)


def test_flex_attention_computes_the_same_and_has_no_backward(suite: ModuleType) -> None:
    attention = suite.peers.attention
    (flex,) = suite.peers.choose("attention", "flex")
    settings = suite.measure.Settings(repeats=1, min_time=0.0)
    (row,) = suite.measure.time_case(attention.parse(SMALL[4], "fwd", "fp32"), [flex], settings)
    assert (row.status, row.reason) == ("ok", "")
    assert row.err["out"] < 2e-6
    (row,) = suite.measure.time_case(attention.parse(SMALL[4], "full", "fp32"), [flex], settings)
    assert row.status == ("ok" if torch.cuda.is_available() else "skipped")


def test_what_is_wrong_is_not_timed(suite: ModuleType) -> None:
    def unscaled(query, key, value):
        return (query @ key.mT).softmax(-1) @ value

    case = suite.peers.attention.parse(SMALL[0], "full", "fp32")
    wrong = provider(suite, "wrong", lambda inputs: unscaled)
    (row,) = suite.measure.time_case(case, [wrong], suite.measure.Settings(repeats=1, min_time=0))
    assert (row.status, row.ms) == ("error", None)
    assert "wrong: errors above 0.0001" in row.reason


def test_attention_has_the_shapes_of_the_targets(suite: ModuleType) -> None:
    attention = suite.peers.attention
    for group, shapes in suite.targets.ATTENTION.items():
        for shape in shapes:
            case = attention.parse(shape, "fwd", "bf16")
            assert (case.shape, case.group) == (shape, group)
            assert attention.parse(shape, "full", "bf16").flops == 3.5 * case.flops
            assert attention.parse(shape, "bwd", "bf16").flops == 2.5 * case.flops
    # four products of 2 H D for each pair of a query and a key it sees
    dense = attention.parse("8x12x197x64", "fwd", "fp32")
    assert dense.flops == 4 * 8 * 12 * 197 * 197 * 64
    windows = attention.parse("windows:16x4096x80", "fwd", "fp32")
    assert windows.flops == 4 * 16 * 4096 * 64 * 80
    prefix = attention.parse("prefix_lm:2x1x16x1", "fwd", "fp32")
    seen = sum(max(q + 1, 4 + batch + 1) for batch in range(2) for q in range(16))
    assert prefix.flops == 4 * seen


@pytest.mark.parametrize("shape", ["3x4", "nobody:2x3x4x5", "windows:2x100x8", "decode:1x3x2x9x8"])
def test_a_shape_that_attention_does_not_have_is_refused(suite: ModuleType, shape, capsys) -> None:
    assert suite.__main__.main(["run", "--op", "attention", "--shapes", shape]) == 2
    printed = capsys.readouterr().err
    assert "--shapes" in printed
    assert shape in printed


def test_run_of_attention(suite: ModuleType, tmp_path, monkeypatch, capsys) -> None:
    # the limit is measured in the run of the losses
    limits = suite.roofline.Roofline({"bf16": 1e12}, {"bf16": "mm"}, 1e11)
    monkeypatch.setattr(suite.roofline, "measure", lambda *_: limits)
    file, picture = str(tmp_path / "rows.jsonl"), tmp_path / "plot.png"
    command = "run --quick --op attention --mode fwd,full --dtype bf16 --repeats 2 --min-time 0"
    command += f" --json {file} --plot {picture} --peers sdpa,sdpa_mask"
    command += f" --shapes {','.join((SMALL[0], SMALL[2], SMALL[4]))}"
    assert suite.__main__.main(command.split()) == 0
    rows = suite.record.read(file)
    assert len(rows) == 3 * 2 * 2  # shapes, modes, ours and the peer of that shape
    for r in rows:
        assert (r["status"], r["reason"]) == ("ok", "")
        assert r["shape"] in r["repro"]
        assert r["counts"] == (r["ours"] and r["backend"] == "cpu")
        assert set(r["ratios"]) == {r["best_peer"]}
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert suite.__main__.main(["report", file, "--readme"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| attention dense | forward | bf16 | 2x3x37x24 |") == 1


def parsed(suite: ModuleType, command: str) -> Any:
    parser = argparse.ArgumentParser()
    suite.run.add_arguments(parser)
    return parser.parse_args(command.split())


def test_each_target_of_the_gpu_is_a_set_of_shapes(suite: ModuleType) -> None:
    command = "--op attention --device cuda"
    cases = [case for case, _ in suite.run.cases(parsed(suite, command))]
    sets = suite.targets.ATTENTION_GPU
    assert [(c.group, c.mode, c.shape, c.dtype) for c in cases] == [
        (name, mode, shape, "bf16") for name, (mode, shapes) in sets.items() for shape in shapes
    ]
    points = [(c.mode, c.shape) for c in cases]
    assert len(points) == len(set(points))  # a row holds one target's shape
    targets = [t for t in suite.targets.SPEED if t.device == "cuda" and t.op == "attention"]
    assert {(t.group, t.mode, t.shapes) for t in targets} == {(n, *s) for n, s in sets.items()}
    quick = suite.run.cases(parsed(suite, command + " --quick"))
    assert len(quick) == 2 * len(sets)
    both = suite.run.cases(parsed(suite, command + " --group windows,decode --mode fwd,bwd"))
    assert len(both) == 2 * sum(len(sets[name][1]) for name in ("windows", "decode"))
    # somebody to compare with, without a GPU, too
    rivals = suite.peers.peers("attention")
    for target in targets:
        case = suite.peers.attention.parse(target.shapes[0], target.mode, "bf16")
        names = [p.name for p in rivals if case.takes(p, "cuda")]
        assert fnmatch.filter(names, target.against or "*"), target


@pytest.mark.parametrize(
    "command",
    ["--op attention --group dense --device cuda", "--op attention --group latency", "--mode bwd"],
)
def test_a_group_or_a_mode_that_is_not_there_is_refused(suite: ModuleType, command, capsys) -> None:
    assert suite.__main__.main(["run", *command.split()]) == 2
    assert "--group or --mode" in capsys.readouterr().err


def test_a_backward_is_timed_alone(suite: ModuleType) -> None:
    case = suite.peers.attention.parse(SMALL[0], "bwd", "fp32")
    inputs, calls = case.inputs(), []

    def counted(*tensors):
        calls.append(None)
        return torch.nn.functional.scaled_dot_product_attention(*tensors)

    run = case.call(lambda inputs: counted, inputs)
    for _ in range(3):
        grads = run()
    assert len(calls) == 1
    exact = case.exact()
    for name, grad in zip(("query", "key", "value"), grads, strict=True):
        assert suite.measure.relative_error(grad, exact[name]) < 2e-6


def test_a_forced_backend_computes_the_same_or_says_why_not(suite: ModuleType) -> None:
    settings = suite.measure.Settings(repeats=1, min_time=0.0)
    case = suite.peers.attention.parse(SMALL[0], "fwd", "fp32")
    forced = suite.peers.choose("attention", "sdpa_math,sdpa_flash,sdpa_cudnn")
    assert not [peer for peer in forced if case.takes(peer)]
    assert all(case.takes(peer, "cuda") for peer in forced)
    rows = {row.provider: row for row in suite.measure.time_case(case, forced, settings)}
    assert rows["sdpa_math"].status == "ok"
    if not torch.cuda.is_available():
        assert rows["sdpa_flash"].status == "ok"
        assert rows["sdpa_cudnn"].status == "error"
        assert re.search("No (viable|available)", rows["sdpa_cudnn"].reason)
    # a CPU's flash takes no values of another size than queries, and torch warns of it
    q, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 16)
    flash = next(peer for peer in forced if peer.name == "sdpa_flash")
    with flash.around(), pytest.raises(RuntimeError, match=r"No (viable|available)") as refused:
        suite.peers._attention_peers.explained(q, q, v)
    assert "size" in str(refused.value), refused.value


def test_flex_attention_of_packed_images(suite: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # of the rule, not speed
    (flex,) = suite.peers.choose("attention", "flex")
    case = suite.peers.attention.parse("windows:1x256x16", "fwd", "fp32")
    errors, _ = suite.measure._error(case, flex, suite.measure.Settings())
    assert errors["out"] < 2e-6


def test_varlen_attn_is_called_as_torch_has_it(suite: ModuleType, monkeypatch) -> None:
    """torch's kernel runs on a GPU only: here its place takes one that wants the same arguments."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch >= 2.10")
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args, **keywords):
        bound = signature.bind(*args, **keywords).arguments
        query, key, value, cu_q, cu_k, max_q, max_k = bound.values()
        assert max_q == max_k == cu_q.diff().max()
        return suite.peers.attention.reference.attention_varlen(query, key, value, cu_q, cu_k)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    (peer,) = suite.peers.choose("attention", "varlen_attn")
    case = suite.peers.attention.parse(SMALL[2], "fwd", "fp32")
    errors, _ = suite.measure._error(case, peer, suite.measure.Settings())
    assert errors["out"] < 2e-6


def test_kernels_of_a_backend_are_chosen_around_the_call(suite: ModuleType, monkeypatch) -> None:
    chosen = []

    class Extension:
        set_attention_kernels = staticmethod(chosen.append)

    monkeypatch.setattr(suite.peers.attention._load, "_C", Extension)
    provider = suite.peers.ours("attention", None, "cuda:long")
    with provider.around():
        assert chosen == ["long"]
    assert chosen == ["long", "auto"]


def test_peers_may_be_left_out_by_name(suite: ModuleType) -> None:
    kept = {peer.name for peer in suite.peers.choose("attention", "-flex,-eager,-open_clip")}
    assert kept == {peer.name for peer in suite.peers.peers("attention")} - {"flex", "eager"}
    with pytest.raises(ValueError, match="nobody"):
        suite.peers.choose("attention", "-flex,-nobody")


def test_a_run_that_is_stopped_leaves_its_rows(suite: ModuleType, tmp_path, monkeypatch) -> None:
    limits = suite.roofline.Roofline({"fp32": 1e12}, {"fp32": "mm"}, 1e11)
    monkeypatch.setattr(suite.roofline, "measure", lambda *_: limits)
    timed, file = suite.measure.time_case, tmp_path / "rows.jsonl"
    command = "run --op attention --mode fwd --dtype fp32 --peers sdpa --repeats 1 --min-time 0"
    command += f" --json {file} --append --shapes "

    def stopped(case, *args):
        if case.n == 16:
            raise KeyboardInterrupt
        return timed(case, *args)

    monkeypatch.setattr(suite.measure, "time_case", stopped)
    for shapes in ("1x1x8x8,1x1x16x8,1x1x32x8", "1x1x9x8,1x1x16x8"):
        with pytest.raises(KeyboardInterrupt):
            suite.__main__.main((command + shapes).split())
    rows = suite.record.read(str(file))
    assert [row["n"] for row in rows] == [8, 8, 9, 9]
    assert all(row["roofline_pct"] for row in rows)


def test_no_shape_is_begun_after_the_time_limit(suite: ModuleType, monkeypatch, capsys) -> None:
    limits = suite.roofline.Roofline({"fp32": 1e12}, {"fp32": "mm"}, 1e11)
    monkeypatch.setattr(suite.roofline, "measure", lambda *_: limits)
    command = "run --op attention --dtype fp32 --shapes 1x1x8x8 --time-limit 0"
    assert suite.__main__.main(command.split()) == 0
    printed = capsys.readouterr()
    assert "no rows" in printed.out
    assert "no time left for attention full fp32 1x1x8x8" in printed.err


def test_memory_of_attention_sees_the_matrices_that_eager_holds(suite: ModuleType) -> None:
    case = suite.peers.attention.parse("1x4x1024x16", "fwd", "fp32")
    settings = suite.measure.Settings()
    (eager,) = suite.peers.choose("attention", "eager")
    row = suite.measure.memory_case(case, eager, settings)
    assert (row.status, row.reason) == ("ok", "")
    assert row.peak_mib > 1.5 * 4 * 1024**2 * 4 / 2**20
    ours = suite.measure.memory_case(case, suite.peers.ours("attention"), settings)
    assert (ours.status, ours.reason) == ("ok", "")
    assert ours.peak_mib < row.peak_mib / 2


def test_results_of_the_losses_are_still_read(suite: ModuleType, capsys) -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*/contrastive.jsonl"):
        rows = suite.record.read(str(file))
        assert {r["shape"] for r in rows if r["kind"] == "time"} >= {"2048x512", "8192x768"}
        assert suite.__main__.main(["report", str(file)]) == 0
        assert "clip_loss full bf16 4096x768" in capsys.readouterr().out


# --- patch_embed ---

STEMS = ("2x28x42x14x40", "float:3x16x48x16x24")


@pytest.mark.parametrize("shape", STEMS)
@pytest.mark.parametrize(("mode", "dtype"), [("full", "fp32"), ("fwd", "bf16"), ("full", "bf16")])
def test_ours_and_the_stems_compute_the_same(
    suite: ModuleType, shape, mode, dtype, monkeypatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # of the rule, not speed
    case = suite.peers.patch_embed.parse(shape, mode, dtype)
    assert case.shape == shape
    mine = [suite.peers.ours("patch_embed", None, backend) for backend in ("cpu", "reference")]
    rivals = suite.peers.peers("patch_embed")
    assert [p.name for p in rivals if p.floor] == ["bare_linear"]
    for provider in [*mine, *rivals]:
        errors, _ = suite.measure._error(case, provider, suite.measure.Settings())
        grads = {"weight", "bias", "pos", "prefix"} if mode == "full" else set()
        assert set(errors) == {"out"} | grads
        assert max(errors.values()) < (2e-6 if dtype == "fp32" else 1e-2), (provider, errors)


def test_patch_embed_has_the_shapes_of_the_targets(suite: ModuleType) -> None:
    patch_embed, targets = suite.peers.patch_embed, suite.targets
    for group, (mode, shapes) in targets.PATCH_EMBED.items():
        cases = [c for c, _ in suite.run.cases(parsed(suite, f"--op patch_embed --group {group}"))]
        assert [(c.group, c.mode, c.shape) for c in cases] == [
            (group, mode, shape) for _ in ("fp32", "bf16") for shape in shapes
        ]
        for case in cases:
            small = case.for_error(2048)
            assert small.rows <= 2048
            assert small.patch == case.patch
    wanted = [t for t in targets.SPEED if t.op == "patch_embed"]
    names = [p.name for p in suite.peers.peers("patch_embed")]
    assert all(fnmatch.filter(names, t.against) for t in wanted)
    case = patch_embed.parse("16x224x224x16x768", "fwd", "fp32")
    assert case.flops == 2 * 16 * 196 * 768 * 768
    # pixels have no gradient
    assert patch_embed.parse("float:16x224x224x16x768", "full", "fp32").flops == 2 * case.flops
    pixels, weight, pos, tokens = 16 * 224 * 224 * 3, 768 * 768, 197 * 768, 16 * 197 * 768
    assert case.bytes == pixels + 4 * (weight + 2 * 768 + pos + tokens)


@pytest.mark.parametrize(
    "command",
    ["--shapes 2x28x28x14", "--shapes 2x28x30x14x8", "--shapes half:2x28x28x14x8", "--group masks"],
)
def test_what_patch_embed_does_not_have_is_refused(suite: ModuleType, command, capsys) -> None:
    assert suite.__main__.main(["run", "--op", "patch_embed", *command.split()]) == 2
    assert "--shapes" in capsys.readouterr().err


def test_run_of_patch_embed(suite: ModuleType, tmp_path, monkeypatch, capsys) -> None:
    limits = suite.roofline.Roofline({"bf16": 1e12}, {"bf16": "mm"}, 1e11)
    monkeypatch.setattr(suite.roofline, "measure", lambda *_: limits)
    file = str(tmp_path / "rows.jsonl")
    command = f"run --op patch_embed --mode fwd,full --dtype bf16 --shapes {','.join(STEMS)}"
    command += f" --repeats 2 --min-time 0 --peers stem_conv,bare_linear --json {file} --quick"
    assert suite.__main__.main(command.split()) == 0
    rows = suite.record.read(file)
    assert len(rows) == 2 * 2 * 3
    for r in rows:
        assert (r["status"], r["reason"]) == ("ok", "")
        assert r["samples"] == 2
        assert r["counts"] == (r["ours"] and r["backend"] == "cpu")
        # the floor is beside, and never the best: it does a part of the work
        assert r["best_peer"] == "stem_conv"
        assert set(r["ratios"]) == {"stem_conv", "bare_linear"}
    assert "patch_embed float full bf16 float:3x16x48x16x24" in capsys.readouterr().out
