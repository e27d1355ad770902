"""What every reference network is tested for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from reference_logits import read_fixture

import jaxrmils as jr
from jaxrmils.zoo import reference

FIXTURES = Path(__file__).parent / "fixtures"


def assert_original_logits(name):
    """The logits are those of the original in PyTorch, up to float32 rounding."""
    state_dict, images, logits = read_fixture(FIXTURES / f"{name}.npz")
    entry = reference(name)
    ours = jax.jit(entry.module.apply)(entry.from_state_dict(state_dict), images)
    largest = np.abs(logits).max()
    # Another image changes them by a hundredth at least.
    assert np.ptp(logits, axis=0).max() > 1e-2 * largest
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, logits, rtol=0, atol=5e-5 * largest)


def parameter_count(name):
    """Trained numbers, without BatchNorm's statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(reference(name).shapes()["params"]))


def assert_all_kernels_are_sites(name):
    """`trace` finds every convolution and dense layer, and nothing besides."""
    entry = reference(name)
    size = entry.input_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    graph = jr.trace(*jr.from_linen(entry.module, entry.shapes()), images)
    kernels = ["/".join(p) for p in flatten_dict(entry.shapes()["params"]) if p[-1] == "kernel"]
    assert sorted(site.name for site in graph.sites) == sorted(kernels)
    assert [e.status for e in graph.coverage.entries] == ["site"] * len(kernels)
