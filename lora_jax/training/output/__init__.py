"""What a run leaves on disk: its folder, run.json, checkpoints, and how it goes on from them."""
