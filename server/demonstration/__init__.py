"""The demonstration's federation: real server and device processes, compared with devices alone and pooled images."""
