"""May one run molecular dynamics with this model? Checks of any model, and a verdict."""
