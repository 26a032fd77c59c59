"""Data: sources read into one schema, divided into roles, checked, and batched.

``load_splits`` (or ``load_source`` for one set) gives Hugging Face data sets with the columns of
:data:`FEATURES`; ``check_frames`` and ``check_units`` look at them before training, and
``examine`` compares every label with the pretrained model; :class:`FrameDataset`, :func:`collate` and :class:`EpochBatchSampler` make batches of them;
``fit_references`` finds the energy per element by which they differ from a pretrained model.
"""

from blip_ft.data.checks import check_frames, check_units
from blip_ft.data.dataset import FrameDataset, Item, collate, content_key, make_item, to_atoms
from blip_ft.data.examine import DataReport, examine
from blip_ft.data.findings import Finding
from blip_ft.data.references import References, fit_references
from blip_ft.data.sampler import EpochBatchSampler
from blip_ft.data.schema import FEATURES
from blip_ft.data.sources import fingerprint, load_source
from blip_ft.data.splits import Splits, check_disjoint, load_splits

__all__ = [
    "FEATURES",
    "DataReport",
    "EpochBatchSampler",
    "Finding",
    "FrameDataset",
    "Item",
    "References",
    "Splits",
    "check_disjoint",
    "check_frames",
    "check_units",
    "collate",
    "content_key",
    "examine",
    "fingerprint",
    "fit_references",
    "load_source",
    "load_splits",
    "make_item",
    "to_atoms",
]
