"""Data: sources read into one schema, divided into roles, checked, and batched.

``load_splits`` (or ``load_source`` for one set) gives Hugging Face data sets with the columns of
:data:`FEATURES`; :class:`FrameDataset`, :func:`collate` and :class:`EpochBatchSampler` make
batches of them.
"""

from blip_ft.data.dataset import FrameDataset, Item, collate, content_key, make_item, to_atoms
from blip_ft.data.sampler import EpochBatchSampler
from blip_ft.data.schema import FEATURES
from blip_ft.data.sources import fingerprint, load_source
from blip_ft.data.splits import Splits, check_disjoint, load_splits

__all__ = [
    "FEATURES",
    "EpochBatchSampler",
    "FrameDataset",
    "Item",
    "Splits",
    "check_disjoint",
    "collate",
    "content_key",
    "fingerprint",
    "load_source",
    "load_splits",
    "make_item",
    "to_atoms",
]
