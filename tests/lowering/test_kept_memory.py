"""Memory that a process keeps: page faults counted by the system, in processes of their own."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrmils as jr
from jaxrmils.lowering import LoweringError, kept_memory

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/task").is_dir(),
    reason="not Linux with glibc",
)

FAULTS = """
import json, resource, sys
import jax, jax.numpy as jnp
import jaxrmils as jr
if sys.argv[1] == "keep":
    jr.keep_memory()
# Temporaries of 64 MB: a sum that is read twice is not fused away.
f = jax.jit(lambda s: jnp.cumsum(jnp.broadcast_to(s, (32, 1 << 19)).reshape(-1)).sum())
x, faults, results = jnp.float32(0.5), [], []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    results.append(float(f(x)))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([faults, results]))
"""


def run(*arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@needs_glibc
def test_later_calls_need_no_new_pages():
    found = {}
    for choice in ("keep", "leave"):
        done = run(FAULTS, choice)
        assert done.returncode == 0, done.stderr
        found[choice] = json.loads(done.stdout)
    (kept, results), (left, expected) = found["keep"], found["leave"]
    assert results == expected
    assert kept[0] > 10_000, "the program has no large temporaries"
    assert min(left[1:]) > 10_000
    assert max(kept[2:]) < 100


@needs_glibc
def test_it_must_come_before_the_first_computation():
    script = "import jax, jaxrmils as jr; jax.devices(); jr.keep_memory()"
    done = run(script)
    assert done.returncode != 0
    assert "must come before the first computation" in done.stderr


def test_other_c_libraries(monkeypatch):
    monkeypatch.setattr(kept_memory.platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(LoweringError, match="glibc's allocator, and this process uses another one"):
        jr.keep_memory()
    monkeypatch.setattr(kept_memory.platform, "libc_ver", lambda: ("musl", "1.2"))
    with pytest.raises(LoweringError, match="uses musl"):
        jr.keep_memory()
