"""What a run trains: one adapter, or all adapters of a sweep at the same time."""
