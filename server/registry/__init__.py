"""The registry: versions of the encoder with their files, lineage and history, one of them serving."""
