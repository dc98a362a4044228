"""The page report.html, made of run.json and metrics.jsonl."""
