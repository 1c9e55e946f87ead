"""A run in, a folder out: recipes, cached pairs, two trainers, mining, teachers."""
