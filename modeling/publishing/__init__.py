"""Export, inspect, open through every door, upload."""
