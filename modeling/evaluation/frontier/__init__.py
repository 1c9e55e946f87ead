"""Every way to make an index of one model smaller, in one table."""
