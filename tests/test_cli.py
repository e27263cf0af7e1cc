"""The command line: what it prints for people, for pipes, and when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

import tilewise
from tilewise import causal, documents, lengths, prefix, window

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner, Result

from tilewise.cli import findings
from tilewise.cli.app import app
from tilewise.cli.expression import parse
from tilewise.plan.catalog import PRESETS

ESCAPE = "\x1b"


def run(*arguments: str) -> Result:
    """One command, in this process, its output not a terminal."""
    return CliRunner().invoke(app, list(arguments))


def run_apart(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("causal", causal()),
        ("causal()", causal()),
        ("causal & window(256)", causal() & window(256)),
        ("causal('end') | prefix(4)", causal("end") | prefix(4)),
        ("~(causal(offset=-3) | window(2, None))", ~(causal(offset=-3) | window(2, None))),
        ("lengths(k=100) & ~causal", lengths(k=100) & ~causal()),
    ],
)
def test_an_expression_is_the_mask_that_python_would_make(text: str, mask: tilewise.Mask):
    assert parse(text) == mask


def test_an_expression_may_hold_lists():
    assert parse("documents([0, 0, 1])").structure() == documents([0, 0, 1]).structure()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1 +",
        "nonsense",
        "__import__('os').system('true')",
        "causal.__class__",
        "causal().__class__",
        "(lambda: 0)()",
        "window(2 ** 9)",
        "window(len('ab'))",
        "window(*[1, 2])",
        "causal(**{})",
        "causal and window(1)",
        "not causal",
        "predicate(print)",
        "[causal for _ in 'ab']",
        "~" * 5000 + "causal",
        "causal" + " & causal" * 20_000,
    ],
)
def test_what_is_no_mask_is_refused_by_name(text: str):
    with pytest.raises(ValueError, match=r"^mask: "):
        parse(text)


def test_a_refused_expression_says_where_and_why():
    with pytest.raises(ValueError, match=r"'windw\(3\)' \(column 10 of .* expected blocks, causal"):
        parse("causal & windw(3)")
    with pytest.raises(ValueError, match="write & for and"):
        parse("causal and causal")
    with pytest.raises(TypeError, match=r"^mask: window: .*left"):
        parse("window")


def test_mask_draws_in_plain_lines():
    result = run("mask", "causal & window(256)", "--seq", "2048")
    assert result.exit_code == 0, result.output
    assert "causal() & window(256, None), 2048 queries" in result.output
    assert "█" in result.output and "full" in result.output
    assert ESCAPE not in result.output


def test_mask_takes_two_lengths_and_writes_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "out.png"
    result = run("mask", "causal('end')", "--q-len", "100", "--k-len", "300", "--png", str(png))
    assert result.exit_code == 0, result.output
    assert "100 queries (down) x 300 keys" in result.output
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["mask", "causal", "--q-len", "3"], "mask:"),
        (["mask", "windw"], "mask:"),
        (["mask", "window(-1)"], "left:"),
        (["mask", "causal", "--seq", "-1"], "q_len:"),
        (["mask", "causal", "--png", "/no/such/folder/out.png"], "No such file"),
        (["explain", "--preset", "nonsense"], "preset: got 'nonsense', expected one of bert-base"),
        (["explain", "--preset", "vit-b16", "--seq", "5"], "seq:"),
        (["explain", "--kv-heads", "3"], "k: has 3 heads"),
        (["explain", "--softcap", "-1"], "softcap:"),
        (["explain", "--framework", "numpy", "--device", "cuda"], "device:"),
        (["explain", "--framework", "torch", "--device", "tpu"], "device: got 'tpu', expected one of cpu, cuda"),
        (["explain", "--framework", "jax", "--device", "gpu"], "device: got 'gpu', expected one of cpu, cuda, tpu"),
        (["explain", "--framework", "torch", "--device", "cuda:0"], "device: got 'cuda:0'"),
        (["explain", "--device", "cpu:1"], "device: got 'cpu:1'"),
        (["explain", "--kernel", "nonsense"], "kernel: got 'nonsense'"),
        (["explain", "--kernel", "reference"], "allow_quadratic:"),
        (["explain", "--ranks", "4", "--machine", "abacus"], "machine: got 'abacus'"),
        (["explain", "--ranks", "4", "--bandwidth", "0"], "bandwidth: got 0"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_two(arguments: list[str], word: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("tilewise: ") and word in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_explain_prints_the_plan_of_a_preset():
    result = run("explain", "--preset", "llama3-8b", "--seq", "8192")
    assert result.exit_code == 0, result.output
    assert ESCAPE not in result.output
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines() if not line.startswith((" ", "not ")))
    assert lines["problem"] == "batch 1, heads 32/8, queries 8192, keys 8192, width 128"
    assert lines["mask"] == "causal() -> 1 range a row"
    assert lines["kernel"] in ("native", "portable")
    assert "not reference  it runs only when asked for by name" in result.output


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_explained_with_its_gradients(name: str):
    result = run("explain", "--preset", name, "--backward", "--framework", "jax")
    assert result.exit_code == 0, result.stderr
    assert "gradients to" in result.output and "backward" in result.output


def test_explain_makes_no_array_of_the_call():
    run("explain", "--preset", "llama3-8b", "--seq", "64")  # what is imported late is not counted
    tracemalloc.start()
    result = run("explain", "--preset", "llama3-8b", "--seq", "65536", "--dtype", "bfloat16", "--device", "cuda")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.exit_code == 0, result.stderr
    assert peak < 32e6, "q alone would take 537 MB, the mask as booleans 4.3 GB"
    assert "torch bfloat16 on cuda" in result.output


def test_explain_takes_sizes_and_masks_in_place_of_the_presets_own():
    result = run("explain", "--preset", "llama3-8b", "--q-len", "1", "--mask", "window(7, 0, 'end')", "--softcap", "30")
    assert result.exit_code == 0, result.stderr
    assert "queries 1, keys 8192" in result.output
    assert 'window(7, 0, "end")' in result.output and "softcap 30" in result.output


def test_explain_compares_strategies_over_ranks():
    result = run("explain", "--preset", "llama3-8b", "--ranks", "8", "--device", "cuda", "--bandwidth", "5e9")
    assert result.exit_code == 0, result.stderr
    assert "kernel" in result.output and "over 8 ranks" in result.output
    assert "5 GB/s" in result.output and "ring, zigzag" in result.output and "ulysses, stripe" in result.output
    assert result.output.count("chosen: ") == 1
    one = run("explain", "--preset", "llama3-8b", "--ranks", "8", "--shards", "zigzag")
    assert "contiguous" not in one.output and "backward" not in one.output


def test_explain_lists_the_presets():
    result = run("explain", "--list")
    assert [line.split()[0] for line in result.output.splitlines()] == list(PRESETS)


def test_doctor_reports_every_kernel_framework_and_thread():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert ESCAPE not in result.output
    for card in tilewise.kernels.cards():
        assert f"  {card.name} " in result.output
    for word in (tilewise.__version__, "numpy", "torch", "jax", "native code"):
        assert word in result.output


def test_every_absence_has_a_reason_and_a_cure(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str, *_: object) -> None:
        return None

    monkeypatch.setattr(findings, "find_spec", absent)
    monkeypatch.setattr(findings, "EXTRAS", {"no_such_package": ("cli", "nothing")})
    monkeypatch.setattr(findings.shutil, "which", absent)
    monkeypatch.setattr(findings.sysconfig, "get_path", lambda name: "/no/such/folder")
    missing = [finding for look in (findings.native, findings.frameworks, findings.extras) for finding in look()]
    missing = [finding for finding in missing if finding.name != "numpy"]
    assert [finding.name for finding in missing] == ["compiler", "headers", "torch", "jax", "no_such_package"]
    for finding in missing:
        assert not finding.present and finding.text and finding.cure
    assert "g++" in missing[0].cure and "python3-dev" in missing[1].cure


def test_a_framework_whose_import_fails_is_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch):
    def broken(name: str) -> None:
        raise OSError(f"lib{name}.so: undefined symbol")

    monkeypatch.setattr(findings, "import_module", broken)
    reports = {finding.name: finding for finding in findings.frameworks()}
    assert all(
        "undefined symbol" in reports[name].text
        for name in ("torch", "jax")
        if name in reports and findings.find_spec(name)
    )


def test_an_unknown_page_is_reported_and_not_raised():
    pytest.importorskip("tilewise._native")
    ran = run_apart(
        "from tilewise.cli import main; import sys; sys.argv = ['tilewise', 'doctor']; main()", TILEWISE_ISA="nonsense"
    )
    assert ran.returncode == 0, ran.stderr
    assert "nonsense" in ran.stdout and "unset TILEWISE_ISA" in ran.stdout


def test_variables_that_are_not_understood_are_said():
    wrong = {"TILEWISE_NUM_THREADS": "two", "TILEWISE_DETERMINISTIC": "false"}
    ran = run_apart("from tilewise.cli import main; import sys; sys.argv = ['tilewise', 'doctor']; main()", **wrong)
    assert ran.returncode == 0, ran.stderr
    for variable, value in wrong.items():
        assert f"RuntimeWarning: {variable}: got {value!r}, expected" in ran.stderr
        assert f"{variable}  " in ran.stdout and f"={value}" not in ran.stdout
    for right in ({"TILEWISE_NUM_THREADS": "3", "TILEWISE_DETERMINISTIC": "0"}, dict.fromkeys(wrong, "")):
        assert run_apart("import tilewise", **right).stderr == ""


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_the_command_line_names_the_extra(package: str):
    ran = run_apart(f"import sys; sys.modules['{package}'] = None; from tilewise.cli import main; main()")
    assert ran.returncode == 1
    assert ran.stderr.strip() == (
        f"tilewise: the command line needs {package}, which is not installed: pip install 'tilewise[cli]'"
    )


def test_version_and_module_entry():
    ran = subprocess.run([sys.executable, "-m", "tilewise", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"tilewise {tilewise.__version__}\n"


def test_a_terminal_gets_colours_and_the_same_words():
    program = "import sys; from tilewise.cli import main; sys.argv = ['tilewise', 'explain']; main()"
    plain = run_apart(program).stdout
    coloured = run_apart(program, FORCE_COLOR="1", COLUMNS="200").stdout
    assert ESCAPE in coloured and ESCAPE not in plain
    assert "batch 1, heads 8" in plain and "batch 1, heads 8" in coloured
