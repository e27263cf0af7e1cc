"""Attention under other versions of jax than the pinned one: `python tools/jax_versions.py 0.4.31 0.5.3 0.6.2`.

Each version is installed into an environment of its own in a temporary folder, beside the tilewise of this environment,
and runs the checks at the end of this file: values, gradients, tangents, vmap, scan, dropout and the drop-in.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def main(versions: list[str]) -> int:
    """Check each version; the number of those that fail."""
    import tilewise
    from tilewise import _native

    failed = 0
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            python, packages = Path(folder) / "bin/python", next(Path(folder).glob("lib/python*/site-packages"))
            wanted = [f"jax=={version}", f"jaxlib=={version}", "numpy<2.3"]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
            (packages / "tilewise").mkdir()
            # The package's own files, wherever an editable install keeps them.
            for source in (*Path(tilewise.__file__).parent.iterdir(), Path(_native.__file__)):
                (packages / "tilewise" / source.name).symlink_to(source)
            failed += subprocess.run([python, __file__, "--here"]).returncode != 0
    return failed


def check() -> None:
    """The checks, against NumPy's results and finite differences."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import tilewise as tw

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, heads, 65, 16), np.float32) for heads in (4, 2, 2)]
    q, k, v = map(jnp.asarray, arrays)
    step = jnp.asarray(rng.standard_normal(q.shape, np.float32))

    def attend(q, k=k, v=v):
        return tw.attention(q, k, v, mask=tw.causal())

    def loss(q):
        return (attend(q) ** 2).sum()

    exact = tw.attention(*arrays, mask=tw.causal())
    assert tw.explain(q, k, v).kernel == "native"
    for function in (attend, jax.jit(attend)):
        np.testing.assert_array_equal(np.asarray(function(q)), exact)
    slope = float((jax.grad(loss)(q) * step).sum())
    np.testing.assert_allclose(slope, float((loss(q + 1e-2 * step) - loss(q - 1e-2 * step)) / 2e-2), rtol=2e-2)
    np.testing.assert_allclose(float(jax.jvp(loss, (q,), (step,))[1]), slope, rtol=1e-4)
    jax.block_until_ready(jax.jvp(jax.grad(loss), (q,), (step,)))
    both = jnp.stack([q, q + step])
    np.testing.assert_array_equal(np.asarray(jax.vmap(attend)(both)[0]), exact)
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(both)[0], jax.grad(loss)(q), atol=1e-5)
    looped = jax.lax.scan(lambda c, _: (jax.checkpoint(attend)(c), None), q, None, length=2)[0]
    np.testing.assert_allclose(looped, attend(attend(q)), atol=1e-6)
    dropped = jax.jit(lambda seed: tw.attention(q, k, v, dropout=tw.Dropout(0.3, seed)))(jnp.int32(3))
    np.testing.assert_allclose(dropped, tw.attention(*arrays, dropout=tw.Dropout(0.3, 3)), atol=2e-6)
    spread = (x.swapaxes(1, 2) for x in (q, k, v))
    np.testing.assert_allclose(tw.jax.dot_product_attention(*spread, is_causal=True).swapaxes(1, 2), exact, atol=2e-6)
    print(f"jax {jax.__version__}: all right")


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        check()
    else:
        sys.exit(main(sys.argv[1:]))
