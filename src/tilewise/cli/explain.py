"""`tilewise explain`: plan a call that nobody makes, and print why it would run as it would.

The arrays of the call are outlines: a single zero, seen as q, k and v of any size. What the machine at hand lacks does
not matter either, since a problem holds the framework and the device by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import typer

from ..distributed.explain import over_ranks
from ..distributed.explain import rows as rows_of_choice
from ..distributed.machine import MACHINES, Machine, machine_of
from ..plan.catalog import PRESETS, preset
from ..plan.choose import choose
from ..plan.explain import rows as rows_of
from ..plan.explain import with_details
from ..plan.measured import architecture_of
from ..plan.preset import Preset, Shape, outline
from ..problem import AttentionProblem, Gradient
from ..validate import prepare
from .expression import parse
from .output import heading, reported, rows

_DEVICES = {"numpy": ("cpu",), "torch": ("cpu", "cuda", "mps", "xpu"), "jax": ("cpu", "cuda", "tpu")}
_SHAPE = Shape(1, 8, 8, 2048, 2048, 64, 64)
PLAIN = Preset("plain", "no model in particular", _SHAPE, _SHAPE)


def explain(
    preset_name: Annotated[str | None, typer.Option("--preset", help="A model's call; see --list.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the presets and leave.")] = False,
    seq: Annotated[
        int | None, typer.Option(min=1, help="Sequence length: of the preset, or of queries and keys.")
    ] = None,
    q_len: Annotated[int | None, typer.Option(min=0, help="Queries.")] = None,
    k_len: Annotated[int | None, typer.Option(min=0, help="Keys.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size.")] = None,
    q_heads: Annotated[int | None, typer.Option(min=1, help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Width of queries and keys.")] = None,
    value_dim: Annotated[int | None, typer.Option(min=1, help="Width of values.")] = None,
    mask: Annotated[str | None, typer.Option(help="A mask, written as for the command mask.")] = None,
    softcap: Annotated[float | None, typer.Option(help="Cap of the scores.")] = None,
    dtype: Annotated[Literal["float64", "float32", "float16", "bfloat16"], typer.Option()] = "float32",
    framework: Annotated[Literal["numpy", "torch", "jax"], typer.Option()] = "torch",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, tpu or another name of torch or jax; a GPU's model as in cuda:H200.")
    ] = "cpu",
    backward: Annotated[bool, typer.Option("--backward", help="Want the gradients, too.")] = False,
    kernel: Annotated[str | None, typer.Option(help="Ask for this kernel by name.")] = None,
    allow_quadratic: Annotated[bool, typer.Option("--allow-quadratic", help="Accept memory in Sq * Sk.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="Spread the sequence over this many ranks.")] = None,
    shards: Annotated[
        Literal["contiguous", "zigzag", "stripe"] | None, typer.Option(help="How it lies over them; else compared.")
    ] = None,
    machine: Annotated[str | None, typer.Option(help=f"Ranks and links: {', '.join(MACHINES)}.")] = None,
    flops: Annotated[float | None, typer.Option(help="Operations a second of a rank, in place of its own.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes a second between nodes.")] = None,
    latency: Annotated[float | None, typer.Option(help="Seconds of a message between nodes.")] = None,
) -> None:
    """Show which kernel would run a call, and why no other would; with --ranks, which strategy over several devices.

    The call is a preset's or a plain one, with the sizes that are given in place of its own. Nothing is computed.
    """
    if show_list:
        rows((known.name, known.about) for known in PRESETS.values())
        return
    sizes = {
        "q_len": q_len,
        "k_len": k_len,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
    }
    with reported():
        model = preset(preset_name) if preset_name else PLAIN
        shape = replace(model.at(seq, batch), **{name: size for name, size in sizes.items() if size is not None})
        kind, gpu = _device(device, framework)
        given: dict[str, Any] = {"softcap": softcap, "mask": parse(mask) if mask is not None else None}
        problem, lowered = _problem(model, shape, {name: value for name, value in given.items() if value is not None})
        problem = replace(
            problem,
            dtype=dtype,
            family=framework,
            device=kind,
            model=gpu,
            architecture=architecture_of(gpu),
            bias=replace(problem.bias, dtypes=(dtype,) * len(problem.bias.dense)),
        )
        if backward:
            problem = replace(problem, gradients=_gradients(problem), traced=framework == "jax")
        plan = with_details(choose(problem, kernel, allow_quadratic), lowered)
        rates = {"flops": flops, "bandwidth": bandwidth, "latency": latency}
        choice = over_ranks(problem, lowered, ranks, shards, _machine(problem, machine, rates)) if ranks else None
    rows(rows_of(plan))
    if choice is not None:
        heading(f"\nover {ranks} ranks")
        rows(rows_of_choice(choice))


def _device(text: str, framework: str) -> tuple[str, str]:
    """The kind of device and a GPU's name, "" where none is given: what the arrays of a framework can be on."""
    kind, colon, gpu = text.partition(":")
    if kind not in _DEVICES[framework]:
        expected = ", ".join(_DEVICES[framework])
        raise ValueError(f"device: got {text!r}, expected one of {expected}, where {framework} arrays can be")
    if colon and (kind != "cuda" or not gpu or gpu.isdecimal()):
        raise ValueError(f"device: got {text!r}, expected {kind!r}, or a GPU by its name, as in 'cuda:H200'")
    return kind, gpu


def _machine(problem: AttentionProblem, name: str | None, rates: dict[str, float | None]) -> Machine:
    """The machine of that name, or the device's own, with the rates that are given."""
    if name is not None and name not in MACHINES:
        raise ValueError(f"machine: got {name!r}, expected one of {', '.join(MACHINES)}")
    known = MACHINES[name] if name else machine_of(problem.device)
    given = {rate: value for rate, value in rates.items() if value is not None}
    return replace(known, **given, name=known.name + (", changed" if given else ""))  # type: ignore[arg-type]


def _problem(model: Preset, shape: Shape, options: dict[str, Any]) -> tuple[AttentionProblem, Any]:
    """The problem of a call and its lowered mask, from outlines of its arrays."""
    call = outline(model, shape)
    defaults = {
        "mask": None,
        "bias": None,
        "scale": None,
        "softcap": None,
        "sinks": None,
        "dropout": None,
        "layout": "bhsd",
    }
    prepared = prepare(call.q, call.k, call.v, **{**defaults, **call.options, **options}, return_lse=False)
    return prepared.problem, prepared.operands.mask


def _gradients(problem: AttentionProblem) -> frozenset[Gradient]:
    """Everything that could be differentiated."""
    wanted: set[Gradient] = {"q", "k", "v"}
    optional: list[tuple[Gradient, bool]] = [
        ("bias", bool(problem.bias.dense)),
        ("table", problem.bias.table),
        ("sinks", problem.sinks),
    ]
    return frozenset(wanted | {name for name, present in optional if present})
