"""Fine-tuning: Lightning module and data module, safety gates, and the whole run."""
