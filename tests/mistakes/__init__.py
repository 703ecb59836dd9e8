"""Plugins with mistakes that somebody makes in a first block or model; tests/test_mistakes.py says how each is reported."""
