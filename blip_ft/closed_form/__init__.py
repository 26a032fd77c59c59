"""The fit of posteriors that have a closed form: gradients of the labels, byte budget, the fit itself."""
