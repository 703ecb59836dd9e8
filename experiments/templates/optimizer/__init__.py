"""Say here what the idea is."""
