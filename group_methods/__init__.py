"""Which channels belong together, and how to move them."""
