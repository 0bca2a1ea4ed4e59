"""Output to read: reports, tables, pictures, descriptions, costs."""
