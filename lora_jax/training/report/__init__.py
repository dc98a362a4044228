"""The report.html of a run, made from its run.json and metrics.jsonl."""
