"""What the project claims about speed, measured: `python -m benchmarks.NAME`, one table and one small JSON each."""
