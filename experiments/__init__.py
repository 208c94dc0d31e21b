"""Experiments: one file a run. `python -m experiments.NAME --help` lists its settings."""
