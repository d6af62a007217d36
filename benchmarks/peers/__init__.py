"""FastServe beside other engines: the same model in the formats they read, one process each, a table."""
