"""Every misuse raises ValueError or TypeError whose first word is the argument, and changes nothing."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest

import tilewise as tw


def arrays(family: str = "numpy", **shapes: tuple[int, ...]) -> dict[str, Any]:
    """q (2, 4, 5, 8), k (2, 2, 7, 8), v (2, 2, 7, 6), unless told otherwise."""
    default = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 6)}
    made = {name: np.ones(shape, np.float32) for name, shape in {**default, **shapes}.items()}
    if family == "numpy":
        return made
    xp = pytest.importorskip("torch" if family == "torch" else "jax.numpy")
    return {name: xp.asarray(array) for name, array in made.items()}


def refuses(kind: type[Exception], argument: str, call: dict[str, Any]) -> str:
    """The message, after checking that both doors raise it."""
    messages = []
    for door in (tw.attention, tw.explain):
        with pytest.raises(kind) as caught:
            door(**call)
        assert type(caught.value) is kind
        messages.append(str(caught.value))
    assert re.match(rf"{argument}\b", messages[0]), f"{argument!r} is not the first word of {messages[0]!r}"
    assert messages[0] == messages[1]
    return messages[0]


SHAPES = [
    ("q", {"q": (4, 5, 8)}, "4 axes"),
    ("k", {"k": (2, 7, 8)}, "4 axes"),
    ("v", {"v": (2, 2, 2, 7, 6)}, "4 axes"),
    ("k", {"k": (3, 2, 7, 8)}, "expected 2"),
    ("v", {"v": (1, 2, 7, 6)}, "expected 2"),
    ("k", {"k": (2, 2, 7, 9)}, "expected 8"),
    ("v", {"v": (2, 4, 7, 6)}, "expected 2"),
    ("v", {"v": (2, 2, 8, 6)}, "expected 7"),
    ("k", {"k": (2, 3, 7, 8), "v": (2, 3, 7, 6)}, "divisor"),
    ("k", {"k": (2, 0, 7, 8), "v": (2, 0, 7, 6)}, "divisor"),
    ("k", {"k": (2, 8, 7, 8), "v": (2, 8, 7, 6)}, "divisor"),
    ("q", {"q": (2, 4, 5, 0), "k": (2, 2, 7, 0)}, "at least 1"),
    ("v", {"v": (2, 2, 7, 0)}, "at least 1"),
]


@pytest.mark.parametrize("family", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("argument", "shapes", "words"), SHAPES)
def test_shapes(family, argument, shapes, words):
    message = refuses(ValueError, argument, arrays(family, **shapes))
    assert words in message


def test_open_sizes_of_a_jax_export():
    jax = pytest.importorskip("jax")
    export = pytest.importorskip("jax.export")
    q = jax.ShapeDtypeStruct((*export.symbolic_shape("b, 4, s"), 8), "float32")
    with pytest.raises(ValueError, match=r"^q: has shape \(b, 4, s, 8\)"):
        export.export(jax.jit(lambda q: tw.attention(q, q, q)))(q)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [None, 3.0, "q", [[1.0]], object()])
def test_what_is_no_array(name, value):
    assert "expected" in refuses(TypeError, name, {**arrays(), name: value})


@pytest.mark.parametrize("dtype", ["int32", "int64", "bool", "complex64", "uint8", "longdouble", "object", ">f4"])
def test_dtypes_that_are_no_floats(dtype):
    call = {name: array.astype(dtype) for name, array in arrays().items()}
    assert "expected float64" in refuses(TypeError, "q", call)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "bias", "sinks"])
def test_masked_arrays_are_refused(name):
    # Their own mask would be read by nobody.
    call = {**arrays(), "mask": np.ones((5, 7), bool), "bias": FLOATS, "sinks": FLOATS[:4, 0]}
    call[name] = np.ma.masked_array(call[name], mask=True)
    assert "MaskedArray" in refuses(TypeError, name, call)


@pytest.mark.parametrize(("name", "dtype"), [("k", "float64"), ("v", "float16")])
def test_dtypes_that_differ_are_both_named(name, dtype):
    call = arrays()
    call[name] = call[name].astype(dtype)
    message = refuses(TypeError, name, call)
    assert dtype in message and "float32" in message


def test_frameworks_that_differ():
    torch = pytest.importorskip("torch")
    call = arrays()
    call["k"] = torch.asarray(call["k"])
    assert "torch" in refuses(TypeError, "k", call)
    call = arrays("torch")
    for argument, kind, value in [
        ("mask", TypeError, _jax_bools(5, 7)),
        ("bias", TypeError, _jax_bools(5, 7).astype("float32")),
        ("sinks", TypeError, _jax_bools(4).astype("float32")),
    ]:
        refuses(kind, argument, {**call, argument: value})


def _jax_bools(*shape: int) -> Any:
    return pytest.importorskip("jax.numpy").ones(shape, bool)


def test_devices_that_differ():
    torch = pytest.importorskip("torch")
    call = arrays("torch")
    call["k"] = torch.ones(call["k"].shape, device="meta")
    assert "meta" in refuses(ValueError, "k", call)
    call = arrays("torch")
    refuses(ValueError, "bias", {**call, "bias": torch.ones(5, 7, device="meta")})
    refuses(ValueError, "sinks", {**call, "sinks": torch.ones(4, device="meta")})
    refuses(ValueError, "mask", {**call, "mask": torch.ones(5, 7, dtype=torch.bool, device="meta")})


FLOATS = np.ones((5, 7), np.float32)
RAGGED: list[Any] = [[True, False], [True]]
OPTIONS: list[tuple[type[Exception], str, Any]] = [
    (ValueError, "mask", np.ones((5, 8), bool)),
    (ValueError, "mask", np.ones((3, 1, 5, 7), bool)),
    (ValueError, "mask", np.ones((1, 1, 1, 5, 7), bool)),
    (TypeError, "mask", FLOATS),
    (TypeError, "mask", FLOATS.astype(int)),
    (ValueError, "mask", RAGGED),
    (ValueError, "bias", [[1.0, 2.0], [3.0]]),
    (ValueError, "sinks", [[1.0, 2.0], [3.0]]),
    (TypeError, "mask", "causal"),
    (TypeError, "mask", tw.causal),
    (ValueError, "mask", tw.causal()),
    (ValueError, "mask", tw.window(3, 0)),
    (ValueError, "mask", tw.lengths(k=np.arange(3))),
    (TypeError, "mask", tw.predicate(lambda b, h, i, j: i + j)),
    (ValueError, "bias", np.ones((5, 8))),
    (ValueError, "bias", np.ones((2, 3, 5, 7))),
    (ValueError, "bias", np.ones((1, 2, 4, 5, 7))),
    (TypeError, "bias", np.ones((5, 7), bool)),
    (TypeError, "bias", np.ones((5, 7), int)),
    (TypeError, "bias", tw.causal("end")),
    (TypeError, "bias", np.ones((5, 7), np.longdouble)),
    (TypeError, "bias", 1.0),
    (TypeError, "bias", FLOATS.astype(">f4")),
    (ValueError, "bias", tw.alibi(np.ones(3), "end")),
    (ValueError, "bias", tw.alibi(np.ones(4))),
    (ValueError, "bias", tw.relative(np.ones(12))),
    (TypeError, "scale", "big"),
    (TypeError, "scale", np.ones(2)),
    (TypeError, "scale", True),
    (TypeError, "scale", 1j),
    (ValueError, "scale", float("nan")),
    (ValueError, "scale", float("inf")),
    (ValueError, "scale", 10**400),
    (ValueError, "softcap", 0.0),
    (ValueError, "softcap", -1.0),
    (ValueError, "softcap", float("nan")),
    (TypeError, "softcap", "50"),
    (ValueError, "sinks", np.ones(3, np.float32)),
    (ValueError, "sinks", np.ones((1, 4), np.float32)),
    (TypeError, "sinks", np.ones(4, int)),
    (TypeError, "sinks", [1.0, 2.0, 3.0, 4.0, "x"]),
    (TypeError, "sinks", np.ones(4, np.longdouble)),
    (TypeError, "sinks", "zero"),
    (ValueError, "sinks", float("nan")),
    (TypeError, "dropout", 0.1),
    (ValueError, "dropout", tw.Dropout(1.5)),
    (ValueError, "dropout", tw.Dropout(-0.1)),
    (ValueError, "dropout", tw.Dropout(float("nan"))),
    (TypeError, "dropout", tw.Dropout("half")),
    (TypeError, "dropout", tw.Dropout(0.1, seed=1.5)),
    (TypeError, "dropout", tw.Dropout(0.1, seed=np.arange(3))),
    (ValueError, "dropout", tw.Dropout(0.1, seed=2**64)),
    (ValueError, "dropout", tw.Dropout(0.1, strides=5)),  # type: ignore[arg-type]
    (ValueError, "dropout", tw.Dropout(0.1, stream=-1)),
    (ValueError, "dropout", tw.Dropout(0.1, stream=2**64)),
    (ValueError, "layout", "sbhd"),
    (ValueError, "layout", None),
    (ValueError, "layout", ["bhsd"]),
    (ValueError, "kernel", "fastest"),
    (ValueError, "kernel", ""),
    (ValueError, "kernel", 3),
]


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda n: f"{OPTIONS[n][1]}-{n}")
def test_options(number):
    kind, argument, value = OPTIONS[number]
    message = refuses(kind, argument, {**arrays(), argument: value})
    assert any(word in message for word in ("got", "expected", "has", "needs"))


MADE: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "size", lambda: tw.blocks(np.ones((2, 2), bool), True)),
    (TypeError, "max_distance", lambda: tw.t5(np.ones((8, 4)), max_distance=1.5)),  # type: ignore[arg-type]
    (TypeError, "max_distance", lambda: tw.t5(np.ones((8, 4)), max_distance="far")),  # type: ignore[arg-type]
    (ValueError, "max_distance", lambda: tw.t5(np.ones((32, 4)), max_distance=8)),
    (ValueError, "max_distance", lambda: tw.t5(np.ones((32, 4)), max_distance=16, bidirectional=False)),
    (TypeError, "offset", lambda: tw.t5(np.ones((8, 4)), offset=None)),  # type: ignore[arg-type]
    (TypeError, "offset", lambda: tw.t5(np.ones((8, 4)), offset=0.5)),  # type: ignore[arg-type]
    (TypeError, "slopes", lambda: tw.alibi(np.ones(4, np.longdouble))),
    (ValueError, "mask", lambda: tw.dense(RAGGED)),
    (ValueError, "map", lambda: tw.blocks(RAGGED, 16)),
    (ValueError, "k_ids", lambda: tw.documents([0, 0], RAGGED)),
    (ValueError, "stops", lambda: tw.intervals([0, 0], RAGGED)),
    (ValueError, "k", lambda: tw.lengths(k=RAGGED)),  # type: ignore[arg-type]
    (ValueError, "offset", lambda: tw.causal(offset=RAGGED)),  # type: ignore[arg-type]
    (ValueError, "n", lambda: tw.prefix(RAGGED)),  # type: ignore[arg-type]
    (ValueError, "table", lambda: tw.relative(RAGGED)),
]


@pytest.mark.parametrize("number", range(len(MADE)), ids=lambda n: f"{MADE[n][1]}-{n}")
def test_masks_and_biases_are_checked_when_made(number):
    kind, argument, make = MADE[number]
    with pytest.raises(kind, match=rf"^{argument}: "):
        make()


@pytest.mark.parametrize("family", ["numpy", "torch", "jax"])
def test_sinks_in_a_list_and_without_weight(family):
    call = arrays(family)
    out = np.asarray(tw.attention(**call))
    np.testing.assert_array_equal(tw.attention(**call, sinks=-float("inf")), out)
    np.testing.assert_array_equal(tw.attention(**call, sinks=[-float("inf")] * 4), out)
    sinks = [0.0, 1.0, 2.0, 3.0]
    in_a_list = np.asarray(tw.attention(**call, sinks=sinks))
    np.testing.assert_array_equal(tw.attention(**call, sinks=np.array(sinks)), in_a_list)
    assert not np.array_equal(in_a_list, out)
    refuses(ValueError, "sinks", {**call, "sinks": float("inf")})


def test_torch_numbers_of_eight_bits_and_seeds_elsewhere():
    torch = pytest.importorskip("torch")
    call = arrays("torch")
    refuses(TypeError, "bias", {**call, "bias": torch.ones(5, 7).to(torch.float8_e4m3fn)})
    refuses(TypeError, "sinks", {**call, "sinks": torch.ones(4).to(torch.float8_e5m2)})
    seed = torch.empty((), dtype=torch.int64, device="meta")
    refuses(ValueError, "dropout", {**call, "dropout": tw.Dropout(0.5, seed)})
    # A name travels inside a text, and must not bring options of its own.
    refuses(ValueError, "kernel", {**call, "kernel": "reference;allow_quadratic=1"})


def test_boolean_arrays_are_sent_to_mask_and_floats_to_bias():
    assert "mask=" in refuses(TypeError, "bias", {**arrays(), "bias": np.ones((5, 7), bool)})
    assert "bias=" in refuses(TypeError, "mask", {**arrays(), "mask": FLOATS})


THD = {"q": (12, 4, 8), "k": (12, 2, 8), "v": (12, 2, 6)}


@pytest.mark.parametrize(
    ("kind", "argument", "change"),
    [
        (ValueError, "q", {"q": (1, 12, 4, 8)}),
        (ValueError, "v", {"v": (11, 2, 6)}),
        (ValueError, "k", {"k": (12, 3, 8), "v": (12, 3, 6)}),
    ],
)
def test_packed_layout(kind, argument, change):
    refuses(kind, argument, {**arrays(**{**THD, **change}), "layout": "thd"})


def test_packed_layout_takes_masks_over_all_tokens():
    refuses(ValueError, "mask", {**arrays(**THD), "layout": "thd", "mask": tw.documents(np.zeros(11, int))})


def test_the_other_layout_is_checked_in_its_own_order():
    call = arrays(q=(2, 5, 4, 8), k=(2, 7, 2, 8), v=(2, 7, 2, 6))
    assert tw.attention(**call, layout="bshd").shape == (2, 5, 4, 6)
    refuses(ValueError, "k", {**arrays(q=(2, 5, 4, 8), k=(2, 7, 3, 8), v=(2, 7, 3, 6)), "layout": "bshd"})


def test_a_forced_kernel_that_cannot_lists_every_reason():
    biases = tw.relative(np.ones(11)) + FLOATS
    for _ in range(4):
        biases = biases + FLOATS
    with pytest.raises(tw.KernelRefused) as caught:
        tw.attention(**arrays(), kernel="native", bias=biases)
    assert caught.value.kernel == "native" and caught.value.reasons
    assert all(reason in str(caught.value) for reason in caught.value.reasons)
    assert str(caught.value).startswith("kernel: 'native'")
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.reasons == caught.value.reasons and str(again) == str(caught.value)


def test_a_kernel_of_quadratic_memory_must_be_allowed():
    with pytest.raises(tw.QuadraticMemory, match=r"^allow_quadratic: "):
        tw.attention(**arrays(), kernel="reference")
    tw.attention(**arrays(), kernel="reference", allow_quadratic=True)


def test_nothing_is_changed_by_a_call_that_fails():
    call = arrays()
    before = {name: array.copy() for name, array in call.items()}
    with pytest.raises(ValueError, match=r"^mask"):
        tw.attention(**call, mask=np.ones((5, 8), bool))
    for name, array in call.items():
        np.testing.assert_array_equal(array, before[name])
