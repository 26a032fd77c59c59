"""Models of fairchem-core: UMA and eSEN."""
