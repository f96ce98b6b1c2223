"""Encoders as ONNX files: made, checked against the network they come from, described, shrunk, adopted."""
