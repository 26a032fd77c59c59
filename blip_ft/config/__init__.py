"""Every option of a recipe: type, default, meaning. One definition gives validation and docs.

A recipe is a YAML file with the keys of :class:`Recipe`. Unknown keys are refused at every
depth with the nearest valid name; ``trainer.*`` is checked against Lightning's own ``Trainer``.
Loading this package imports neither a backend nor Lightning.
"""

from blip_ft.config.data import (
    DataConfig,
    Quantity,
    ReferenceSetsConfig,
    ReplayConfig,
    Source,
    SourceConfig,
    SplitConfig,
    StreamConfig,
    StressOrder,
)
from blip_ft.config.loading import apply_override, load_recipe, parse_recipe, recipe_summary, shipped
from blip_ft.config.posterior import PosteriorConfig
from blip_ft.config.recipe import (
    LoraOptions,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PlainConfig,
    Recipe,
    UncertaintyConfig,
)

__all__ = [
    "DataConfig",
    "LoraOptions",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PlainConfig",
    "PosteriorConfig",
    "Quantity",
    "Recipe",
    "ReferenceSetsConfig",
    "ReplayConfig",
    "Source",
    "SourceConfig",
    "SplitConfig",
    "StreamConfig",
    "StressOrder",
    "UncertaintyConfig",
    "apply_override",
    "load_recipe",
    "parse_recipe",
    "recipe_summary",
    "shipped",
]
