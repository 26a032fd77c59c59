"""What to label next: candidates, what the model does not know of them, and batches of them. docs/select.md."""
