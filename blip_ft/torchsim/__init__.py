"""TorchSim with error bars: many structures relaxed or run at once, on one potential.

:class:`TorchSimModel` is a potential as TorchSim's integrators, optimisers and batchers take models. docs/torchsim.md
shows it.
"""

from blip_ft.torchsim.model import Results, TorchSimModel

__all__ = ["Results", "TorchSimModel"]
