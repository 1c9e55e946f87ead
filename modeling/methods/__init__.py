"""One folder a method: what it is, how it is learned, its rows in the frontier."""
