"""The results of runs: `rows` and `statistics`, `tables`, `plots`, and a `page` that shows them all."""
