"""The machine and its processes: memory, threads, ranks, signals, progress."""
