"""Threads that want different default types take turns."""

from __future__ import annotations

import threading
import time

import torch
from blip_ft.adapters._vendor import default_dtype

from blip_ft.side_by_side import side_by_side


def test_each_thread_has_the_type_that_it_asked_for():
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    types = [torch.float64, torch.float32] * 6

    def work(dtype: torch.dtype) -> list[torch.dtype]:
        with default_dtype(dtype):
            seen = [torch.zeros(1).dtype]
            time.sleep(0.005)
            with default_dtype(dtype):
                seen.append(torch.zeros(1).dtype)
            return [*seen, torch.zeros(1).dtype]

    torch.set_num_threads(4)
    try:
        assert side_by_side(work, types) == [[dtype] * 3 for dtype in types]
    finally:
        torch.set_num_threads(threads)
    assert torch.get_default_dtype() == before


def test_threads_with_one_type_have_it_together():
    together = threading.Barrier(2, timeout=30)

    def work(_: int) -> None:
        with default_dtype(torch.float64):
            together.wait()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        side_by_side(work, range(2))
    finally:
        torch.set_num_threads(threads)


def test_another_type_within_a_turn():
    before = torch.get_default_dtype()
    with default_dtype(torch.float64):
        with default_dtype(torch.float16):
            assert torch.zeros(1).dtype == torch.float16
        assert torch.zeros(1).dtype == torch.float64
    assert torch.get_default_dtype() == before
