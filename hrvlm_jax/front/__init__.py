"""The front door: a loaded model, its inputs as people have them, and fine-tuning in one call."""
