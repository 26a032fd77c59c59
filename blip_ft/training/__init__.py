"""Fine-tuning: Lightning module and data module, sanity checks, and the whole run."""
