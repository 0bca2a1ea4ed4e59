"""What people read: reports, tables, pictures, descriptions, costs."""
