"""Judging encoders: what is judged, its features, and the tasks that say how good they are."""
