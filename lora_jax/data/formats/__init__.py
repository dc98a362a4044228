"""Data files → rows, one module a format, compressed or not; `files` chooses the format.

May import `data.examples`.
"""
