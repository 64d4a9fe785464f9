"""Datasets: recipes, their runs, and the shards that runs write."""
