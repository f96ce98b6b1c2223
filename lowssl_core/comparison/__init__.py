"""Runs side by side: read from their folders, compared in tables, charts and words, put on one page."""
