"""The tuner runs to its end without a GPU, and the table that it writes is the one that is read."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tilewise.kernels.triton.tiles import blocks_for
from tilewise.kernels.triton.tuned import Blocks, Key, read, write
from tilewise.problem import AttentionProblem, MaskFacts

ARCHES = ("sm_80", "sm_90")
SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu_tiles.py"
CAUSAL = AttentionProblem(
    "torch", "cuda", "bfloat16", batch=1, q_heads=2, kv_heads=2, q_len=512, k_len=512, head_dim=100, value_dim=128,
    mask=MaskFacts("causal()", ranges=1, diagonal=0),
)  # fmt: skip


def test_it_runs_without_a_gpu_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(path), "--kinds", "causal", "decode"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tuned = read(path)
    assert tuned.architecture == "interpreter"
    assert {(key.purpose, key.kind) for key in tuned.entries} == {
        ("decode", "decode"), *((purpose, "causal") for purpose in ("forward", "d_q", "d_kv", "d_qkv"))
    }  # fmt: skip


def test_an_entry_serves_its_own_class_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, chosen = tmp_path / "tiles.json", Blocks(32, 16, 2, 5)
    write(path, "sm_90", [(Key("forward", "causal", "bfloat16", 128), chosen, 0.5)], device="a GPU")
    own = {(purpose, arch): blocks_for(purpose, arch, CAUSAL) for purpose in ("forward", "d_q") for arch in ARCHES}
    monkeypatch.setenv("TILEWISE_TILES", str(path))
    for (purpose, arch), blocks in own.items():
        served = (purpose, arch) == ("forward", "sm_90")
        assert blocks_for(purpose, arch, CAUSAL) == (chosen if served else blocks)
    for other in (replace(CAUSAL, dtype="float16"), replace(CAUSAL, softcap=2.0), replace(CAUSAL, head_dim=129)):
        assert blocks_for("forward", "sm_90", other) != chosen


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"architecture": "sm_90", "entries": [{"pass": "sideways"}]},
        {"architecture": "sm_90", "entries": [
            {"pass": "d_q", "kind": "full", "dtype": "float16", "width": 64, "blocks": [48, 64, 4, 1]}]},
    ],
)  # fmt: skip
def test_a_file_that_holds_no_tile_sizes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: object
) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(held))
    monkeypatch.setenv("TILEWISE_TILES", str(path))
    with pytest.raises(ValueError, match=r"^TILEWISE_TILES: .*tiles.json holds no tile sizes"):
        blocks_for("forward", "sm_90", CAUSAL)
