"""Memory that is kept: once, on glibc alone, and not against the user's own settings."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from blip_ft.system import allocator

GLIBC = platform.libc_ver()[0] == "glibc"
#: takes and frees ten blocks of 8 MB together, again and again, and counts the pages that it got
FAULTS = """
import json, resource, sys
import numpy as np
from blip_ft.system.allocator import keep_memory
made = keep_memory() if {call} else None
def work():
    for _ in range(10):
        [np.ones(2**20) for _ in range(10)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(json.dumps([made, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def run(call: bool, **environment: str) -> tuple[bool | None, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    code = FAULTS.format(call=call)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean | environment
    )
    made, faults = json.loads(done.stdout)
    return made, faults


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    _, without = run(call=False)
    made, faults = run(call=True)
    assert made
    assert faults < 0.1 * without, (faults, without)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"),
    ],
)
def test_what_a_user_sets_is_left_alone(name: str, value: str):
    assert run(call=True, **{name: value})[0] is False


def test_other_tunables_are_no_reason():
    assert run(call=True, GLIBC_TUNABLES="glibc.rtld.optional_static_tls=512")[0] is GLIBC


@pytest.mark.parametrize("error", [OSError("no library"), TypeError("Windows"), AttributeError("musl")])
def test_nothing_happens_elsewhere(monkeypatch: pytest.MonkeyPatch, error: Exception):
    for name in ("GLIBC_TUNABLES", "LD_PRELOAD", *allocator._USERS):
        monkeypatch.delenv(name, raising=False)

    def library(name: object) -> object:
        raise error

    monkeypatch.setattr(allocator.ctypes, "CDLL", library)
    assert allocator.keep_memory.__wrapped__() is False
