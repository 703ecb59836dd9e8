"""Comparing several models: verdicts, curves, diffs, probes, and scaling."""
