"""Results of checks, the report that holds them, and its forms: text, JSON, tables, web pages."""
