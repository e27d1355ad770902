"""Tests that need a compiler are collected where it is installed."""

from jaxrmils.lowering.ahead import find_target

_COMPILERS = {
    "test_billion_decoder.py": "tpu:v5e",
    "test_cuda_compiler.py": "cuda:h100",
    "test_tpu_compiler.py": "tpu:v5e",
}

collect_ignore = [name for name, t in _COMPILERS.items() if not find_target(t).is_installed]
