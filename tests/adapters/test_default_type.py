"""What belongs to the whole process: threads that want different default types take turns, and share silence."""

from __future__ import annotations

import sys
import threading
import time
import warnings

import torch

from blip_ft.adapters.shared.vendor import default_dtype, quiet
from blip_ft.system.side_by_side import side_by_side


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


def test_silence_of_threads_that_overlap_ends_with_the_last(capsys):
    """The first to come leaves first: on its own each would put back what the other has put there."""
    output, filters = sys.stdout, list(warnings.filters)
    second_is_in, first_is_out = threading.Event(), threading.Event()

    def first() -> None:
        with quiet():
            second_is_in.wait(30)
        first_is_out.set()

    def second() -> None:
        with quiet():
            second_is_in.set()
            first_is_out.wait(30)
            print("not heard")

    one = threading.Thread(target=first)
    one.start()
    while sys.stdout is output:
        time.sleep(0.001)
    second()
    one.join()
    assert sys.stdout is output
    assert warnings.filters == filters
    print("heard")
    assert capsys.readouterr().out == "heard\n"
