"""Experiments: one file per run. `python -m experiments.NAME --help` lists its settings."""
