"""From the bytes of images to embeddings: decoding within limits, execution, and versions that replace each other."""
