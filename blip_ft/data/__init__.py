"""Data: sources are read (``read``), divided into roles (``split``), batched (``batch``), checked (``check``),
written (``write``).

:func:`~blip_ft.data.split.splits.load_splits`, or :func:`~blip_ft.data.read.sources.load_source` for one set, gives
Hugging Face data sets with the columns of :data:`~blip_ft.data.read.schema.FEATURES`. What lies here, beside the
folders, is known to several of them.
"""
