"""For tests of adapters, families and terms, ours and those of other packages."""
