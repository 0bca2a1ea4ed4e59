"""What people look at: reports, pictures, descriptions, costs."""
