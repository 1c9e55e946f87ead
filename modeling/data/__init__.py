"""A corpus, queries and judgments, from wherever they lie."""
