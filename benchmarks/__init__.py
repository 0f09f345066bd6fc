"""Measurements of the project's claims about speed: `python -m benchmarks.NAME`, one table and one small JSON each."""
