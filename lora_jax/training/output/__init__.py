"""The output folder of a run: run.json, metrics, checkpoints, and how a run is resumed from it."""
