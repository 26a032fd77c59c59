"""Adapters: the only modules that know a vendor's package.

Each module here wraps one vendor behind :class:`blip_ft.backbones.protocol.Backbone` and is found through
the entry-point group ``blip_ft.adapters``; third-party packages can add theirs to that group.
Importing an adapter's module does not import its backend: that happens when a model is loaded,
and a missing backend is then an ``ImportError`` that names the extra to install.
``blip_ft/testing/contract.py`` holds what every adapter must fulfil.
"""
