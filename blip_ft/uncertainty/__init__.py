"""Uncertainty: predictions with error bars, their calibration, metrics and failure signatures.

``results`` holds the predictions of one set of frames as plain arrays; ``calibration`` fits
the noise and the scale of the error bars; ``metrics`` judges them; ``signatures`` names what
went wrong. None of these four needs torch.
"""
