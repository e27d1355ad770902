"""Tests that need a compiler for another device are skipped where it is not installed."""

import pytest

from jaxrmils.lowering.ahead import find_target

_COMPILERS = {
    "test_billion_decoder.py": ("tpu:v5e", "needs libtpu: make tpu"),
    "test_cuda_compiler.py": ("cuda:h100", "needs jax's CUDA plugin"),
    "test_tpu_compiler.py": ("tpu:v5e", "needs libtpu: make tpu"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        target, reason = _COMPILERS.get(item.path.name, (None, ""))
        if target and not find_target(target).is_installed:
            item.add_marker(pytest.mark.skip(reason=reason))
