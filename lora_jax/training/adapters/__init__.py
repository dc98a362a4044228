"""What a run trains: one adapter, or the adapters of a sweep side by side."""
